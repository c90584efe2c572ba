"""Keypoints from a file beside the video, in our own arrays or in DWPose's.

T frames of the file, P people, K keypoints (18 or 128)
"""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from animator.keypoints import (
    FACE,
    KEYPOINT_COUNTS,
    LEFT_HAND,
    NUM_KEYPOINTS,
    RIGHT_HAND,
    VISIBLE,
    WHOLE_BODY,
)
from pipelines.pose import (
    PoseError,
    PoseTrack,
    boxes_around,
    calibrate,
    without_outside,
)
from pipelines.video import VideoError, probe

MAX_FILE_BYTES = 256 << 20  # unpacked; hours of one person's keypoints
SUFFIXES = (".pose.npz", ".dwpose.npz")


class FilePoseBackend:
    """Keypoints that lie beside the video: NAME.pose.npz, or NAME.dwpose.npz in DWPose's arrays."""

    name = "file"
    licence = "that of the keypoints file"
    threshold = VISIBLE

    def __init__(self, *, reason: str = "asked for keypoints from a file"):
        self.reason = reason

    @staticmethod
    def find(source: Path | None) -> Path | None:
        """The keypoints file beside `source`, if there is one."""
        if source is None:
            return None
        places = [source.with_name(source.stem + suffix) for suffix in SUFFIXES]
        return next((place for place in places if place.is_file()), None)

    def track(
        self,
        frames: Sequence[np.ndarray],
        *,
        source: Path | None = None,
        times: np.ndarray | None = None,
        rate: float | None = None,
    ) -> PoseTrack:
        """The file's people at `times` (its nearest frame); PoseError where there is no file.

        Where neither the file nor `rate` says how many frames a second, `source` is probed.
        """
        path = self.find(source)
        if path is None or source is None:
            raise PoseError(f"{source}: no keypoints beside it; expected NAME.pose.npz")
        arrays = _read_arrays(path)
        keypoints, score, boxes = _people_of(arrays, path)
        index = _nearest(len(keypoints), len(frames), times, arrays, source, path, rate)
        inside = (index >= 0) & (index < len(keypoints))
        index = index.clip(0, len(keypoints) - 1)
        score = np.where(inside[:, None, None], score[index], 0)
        keypoints, score = without_outside(keypoints[index], score)
        score = calibrate(score, _threshold(arrays, path))
        if boxes is None:
            boxes = boxes_around(keypoints, score)
        else:
            boxes = np.where(inside[:, None, None], boxes[index], 0).clip(0, 1).astype(np.float32)
        order = np.argsort(-np.prod(boxes[..., 2:] - boxes[..., :2], -1).sum(0), kind="stable")
        return PoseTrack(
            keypoints=keypoints[:, order],
            score=score[:, order],
            boxes=boxes[:, order],
            backend=f"{self.name}:{path.name}",
        )


def read_keypoints(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Keypoints (T, P, K, 2), score (T, P, K) and boxes (T, P, 4) or None of a file.

    Raises PoseError for what is no keypoints file.
    """
    return _people_of(_read_arrays(path), path)


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > MAX_FILE_BYTES:
            raise PoseError(f"{path}: unpacks to {size} bytes, expected at most {MAX_FILE_BYTES}")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except PoseError:
        raise
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise PoseError(
            f"{path}: not a keypoints file ({error}); write it with numpy.savez"
        ) from None


def _people_of(
    arrays: dict[str, np.ndarray], path: Path
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Keypoints (T, P, K, 2), score (T, P, K) and boxes (T, P, 4) or None."""
    names = ("candidate", "subset") if "candidate" in arrays else ("keypoints", "score")
    if not all(name in arrays for name in names):
        found = ", ".join(arrays) or "nothing"
        raise PoseError(f"{path}: has {found}; expected keypoints and score (or candidate, subset)")
    keypoints, score = (arrays[name].astype(np.float32) for name in names)
    frames = len(score)
    if not frames or score.shape[-1] < NUM_KEYPOINTS:
        raise PoseError(f"{path}: score is {score.shape}, expected (T, P, {NUM_KEYPOINTS})")
    score = score.reshape(frames, -1, score.shape[-1])
    if keypoints.shape[-1] != 2 or keypoints.size != 2 * score.size:
        raise PoseError(
            f"{path}: {names[0]} is {keypoints.shape}, {names[1]} {score.shape}; "
            f"expected (T, P, {NUM_KEYPOINTS}, 2) and (T, P, {NUM_KEYPOINTS})"
        )
    keypoints = keypoints.reshape(*score.shape, 2)
    boxes = arrays.get("boxes")
    if boxes is not None and boxes.shape != (*score.shape[:2], 4):
        raise PoseError(f"{path}: boxes is {boxes.shape}, expected {(*score.shape[:2], 4)}")
    if score.shape[-1] not in KEYPOINT_COUNTS:
        # What follows the body in other layouts has an order of its own.
        keypoints, score = keypoints[..., :NUM_KEYPOINTS, :], score[..., :NUM_KEYPOINTS]
    if score.max(initial=0) > 1:
        # OpenPose's way: rows of `candidate`, -1 for a missing joint, and no confidence.
        score = (score >= 0).astype(np.float32)
    if "candidate" in arrays:
        keypoints, score = _with_hands_and_faces(arrays, keypoints, score, path)
    return keypoints, score, boxes


def _with_hands_and_faces(
    arrays: dict[str, np.ndarray], keypoints: np.ndarray, score: np.ndarray, path: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Bodies with DWPose's `hands` (T, 2P, 21, 2), all left ones first, and `faces` (T, P, 68, 2).

    Their missing points are -1, and they have no confidence either.
    """
    frames, people = score.shape[:2]
    shapes = {"hands": (frames, 2 * people, 21, 2), "faces": (frames, people, 68, 2)}
    given = {name: arrays[name].astype(np.float32) for name in shapes if name in arrays}
    if not given or score.shape[-1] != NUM_KEYPOINTS:
        return keypoints, score
    for name, points in given.items():
        if points.shape != shapes[name]:
            raise PoseError(f"{path}: {name} is {points.shape}, expected {shapes[name]}")
    whole = np.full((frames, people, WHOLE_BODY, 2), -1, np.float32)
    whole[:, :, :NUM_KEYPOINTS] = keypoints
    if "hands" in given:
        whole[:, :, LEFT_HAND], whole[:, :, RIGHT_HAND] = np.split(given["hands"], 2, axis=1)
    if "faces" in given:
        whole[:, :, FACE] = given["faces"]
    seen = (whole[:, :, NUM_KEYPOINTS:] >= 0).all(-1).astype(np.float32)
    return whole, np.concatenate([score, seen], -1)


def _threshold(arrays: dict[str, np.ndarray], path: Path) -> float:
    threshold = float(arrays.get("threshold", VISIBLE))
    if not 0 < threshold < 1:
        raise PoseError(f"{path}: threshold is {threshold}, expected a score between 0 and 1")
    return threshold


def _nearest(
    available: int,
    wanted: int,
    times: np.ndarray | None,
    arrays: dict[str, np.ndarray],
    source: Path,
    path: Path,
    rate: float | None,
) -> np.ndarray:
    """The file's frame for each frame of the clip; out of range where the file has none."""
    if available == 1:
        return np.zeros(wanted, int)
    if times is None:
        if wanted != available:
            raise PoseError(
                f"{path}: keypoints of {available} frames, the clip has {wanted}; give their times"
            )
        return np.arange(wanted)
    if len(times) != wanted:
        raise PoseError(f"{len(times)} times for {wanted} frames; give one a frame")
    if "fps" in arrays:
        fps = float(arrays["fps"])
    elif rate is not None:
        fps = rate
    else:
        try:
            fps = probe(source).fps
        except VideoError as error:
            raise PoseError(f"{path}: has no fps and its video gives none: {error}") from None
    return np.rint(np.asarray(times) * fps + 1e-6).astype(int)
