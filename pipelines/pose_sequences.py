"""Sequences of 2-D poses that others made: a folder of .npz files in three layouts.

T frames, P people, N = 18 joints of the body in COCO-18 order; points are isotropic
(`animator.keypoints`).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from animator.keypoints import BODY, NUM_KEYPOINTS, VISIBLE, to_isotropic
from pipelines.draws import between_logs, uniforms
from pipelines.motion_camera import PoseClips
from pipelines.npz_files import NpzError, read_npz
from pipelines.video import probe

SPAN = (2.0, 10.0)  # seconds of a clip, log-uniform, where the sequence is as long
FPS = 30.0  # where a file does not say
_MARGIN = 1.05  # of a frame that is not known, round the points
_CLIP = 4  # stream of random numbers
_VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi")


class PoseFileError(NpzError):
    """A folder or file that holds no poses in a known layout."""


@dataclass(frozen=True)
class PoseSequence:
    """The main person of one recording."""

    name: str
    points: np.ndarray  # (T, 18, 2) float32, isotropic
    score: np.ndarray  # (T, 18), 0 where a joint is not seen
    size: tuple[float, float]  # height and width of the frame
    fps: float


class PoseSequences:
    """The sequences of a folder, in the order of their names, and clips of them.

    A file is one of: `keypoints` (T, P, K, 2) in 0..1 and `score` (T, P, K), as this project
    writes them; `candidate` (T, 18, 2) in 0..1 and `subset` (T, P, 18), DWPose's; `keypoints`
    (T, 18, 2) in pixels and `score` (T, 18), OpenPose's. The frame's shape comes from `size`
    (height, width) in the file, else from the video of the same name beside it, else, for pixels,
    from the points themselves.

    Raises:
        NpzError: for a file that cannot be read; its kind PoseFileError for no such folder,
            nothing in it, or a file in no known layout.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise PoseFileError(
                f"{self.folder} is no folder: expected one with poses in .npz files."
            )
        paths = sorted(self.folder.glob("*.npz"), key=lambda path: path.name)
        if not paths:
            raise PoseFileError(f"{self.folder} holds no .npz file: expected poses, a file a clip.")
        self.sequences = tuple(_read(path) for path in paths)

    def __len__(self) -> int:
        return len(self.sequences)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, points and scores."""
        digest = hashlib.sha256()
        for one in self.sequences:
            digest.update(f"{one.name} {one.points.shape} {one.size}\n".encode())
            digest.update(np.ascontiguousarray(one.points, "<f4").tobytes())
            digest.update(np.ascontiguousarray(one.score, "<f4").tobytes())
        return digest.hexdigest()

    def draw(self, samples: Sequence[int], num_frames: int, seed: int) -> PoseClips:
        """Clips of the sequences in turn; frames come in pairs of neighbours, as a benchmark needs.

        Args:
            samples: sample numbers; with the seed they decide which stretch is taken.
            num_frames: frames of a clip, an even number.
        """
        chance = uniforms(seed, samples, 2, _CLIP)
        points, score, size = [], [], []
        for sample, (start, length) in zip(samples, chance.tolist(), strict=True):
            one = self.sequences[sample % len(self.sequences)]
            last = len(one.points) - 2
            span = min(float(between_logs(torch.tensor(length), SPAN)) * one.fps, last)
            first = start * (last - span)
            frames = np.round(first + span * np.linspace(0, 1, num_frames // 2)).astype(int)
            frames = np.stack([frames, frames + 1], -1).ravel()
            points.append(torch.from_numpy(one.points[frames]))
            score.append(torch.from_numpy(one.score[frames]))
            size.append(torch.tensor(one.size) / max(one.size))
        places, seen = torch.stack(points), torch.stack(score)
        return PoseClips(places, places, seen, seen > 0, torch.stack(size).to(places.dtype))


def _read(path: Path) -> PoseSequence:
    arrays = read_npz(path)
    if {"candidate", "subset"} <= arrays.keys():
        points, score, in_pixels = arrays["candidate"], arrays["subset"], False
        score = score[:, 0] if score.ndim == 3 else score
    elif {"keypoints", "score"} <= arrays.keys():
        points, score = arrays["keypoints"], arrays["score"]
        in_pixels = points.ndim == 3
        if points.ndim == 4 and score.ndim == 3 and points.shape[1] and score.shape[1]:
            points, score = points[:, 0, BODY], score[:, 0, BODY]
    else:
        raise PoseFileError(
            f"{path}: has {', '.join(sorted(arrays)) or 'nothing'}, expected keypoints and score, "
            "or DWPose's candidate and subset."
        )
    shape = (len(points), NUM_KEYPOINTS)
    if points.shape != (*shape, 2) or score.shape != shape or len(points) < 4:
        raise PoseFileError(
            f"{path}: poses are {points.shape} with score {score.shape}, expected (T, "
            f"{NUM_KEYPOINTS}, 2) and (T, {NUM_KEYPOINTS}) of at least 4 frames."
        )
    points, score = points.astype(np.float32), np.nan_to_num(score.astype(np.float32))
    seen = (score >= VISIBLE) & np.isfinite(points).all(-1)
    if not seen.any():
        raise PoseFileError(f"{path}: no joint is scored {VISIBLE} or higher: leave it out.")
    points, score = np.where(seen[..., None], points, 0), np.where(seen, score, 0)
    size = _size(path, arrays, points if in_pixels else None)
    if in_pixels:
        points = points / np.array([size[1], size[0]], np.float32)
    isotropic = to_isotropic(points, size[1], size[0]).astype(np.float32)
    fps = float(arrays["fps"]) if "fps" in arrays and arrays["fps"].ndim == 0 else FPS
    return PoseSequence(path.name.split(".")[0], isotropic, score, size, fps)


def _size(
    path: Path, arrays: dict[str, np.ndarray], pixels: np.ndarray | None
) -> tuple[float, float]:
    if "size" in arrays and arrays["size"].shape == (2,) and (arrays["size"] > 0).all():
        return float(arrays["size"][0]), float(arrays["size"][1])
    for suffix in _VIDEOS:
        video = path.with_name(path.name.split(".")[0] + suffix)
        if video.is_file():
            try:
                info = probe(video)
            except ValueError as error:
                raise PoseFileError(f"{path}: its frame's shape is not known: {error}") from None
            return float(info.height), float(info.width)
    if pixels is None:
        raise PoseFileError(
            f"{path}: the frame's shape is not known: save size=(height, width) in the file, or "
            "put the video of the same name beside it."
        )
    width, height = _MARGIN * pixels.reshape(-1, 2).max(0)
    return float(height), float(width)
