"""Background points followed by CoTracker3 in its online mode.

Its package and weights are for non-commercial use and come from its authors, not from here: the
package from its repository (it is not on PyPI), the weights as `cotracker/scaled_online.pth` in a
models folder. A TorchScript file `cotracker/scaled_online.ts` with the same inputs and outputs
needs no package. This module alone imports torch for the camera, and only once it is used.

T frames, N points, M points of a pair, H W height and width
"""

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from pipelines.camera import CameraError
from pipelines.camera_footage import Footage
from pipelines.models import ENVIRONMENT, find

PACKAGE = "cotracker"
CHECKPOINT = "cotracker/scaled_online.pth"
SCRIPTED = "cotracker/scaled_online.ts"
LICENCE = "CC BY-NC 4.0 (CoTracker, code and weights): non-commercial use only"
MODEL_SIZE = (384, 512)  # height, width
MODEL_WINDOW = 16  # frames that the network sees at once; each step adds half of them
WINDOW_FRAMES = 60  # followed without starting anew: longer costs memory and drifts
GRID = (12, 9)  # points along the longer and the shorter side
RESEED_FRAMES = 16  # a pan leaves the first points behind

Pairs = Sequence[tuple[int, int]]


class Tracker(Protocol):
    """CoTracker's online predictor, as its package and a TorchScript file of it offer it.

    The first call of a video names the points: `queries` (1, N, 3) of frame, x, y in pixels. Each
    further call gets a chunk (1, 2 * step, 3, H, W) of RGB, 0..255, `step` frames after the last,
    and returns tracks (1, T, N, 2) and visibility (1, T, N) of all frames so far.
    """

    step: int

    def __call__(
        self, video_chunk: Any, is_first_step: bool = False, queries: Any = None
    ) -> tuple[Any, Any]:
        """Tracks and visibility so far; nothing useful at the first step."""
        ...


def missing_part() -> str | None:
    """What keeps CoTracker from being used, and how to mend it; None where all is there."""
    if find(SCRIPTED) is not None:
        return None
    if find(CHECKPOINT) is None:
        return (
            f"CoTracker's weights were not found; put scaled_online.pth as {CHECKPOINT} into a "
            f"folder of {ENVIRONMENT} ({LICENCE})"
        )
    if importlib.util.find_spec(PACKAGE) is None:
        return (
            f"{CHECKPOINT} is there, but not the package {PACKAGE}; install it from its repository "
            f"facebookresearch/co-tracker ({LICENCE})"
        )
    return None


class CoTrackerBackend:
    """Points on a grid over the background, followed through windows of at most 60 frames."""

    name = "cotracker"
    licence = LICENCE
    needs_models = True

    def __init__(self, tracker: Tracker, *, file: str, device: str = "cpu", reason: str = ""):
        self.tracker, self.file, self.device = tracker, file, device
        self.reason = reason or f"asked for {file}"

    @classmethod
    def open(cls, *, device: str | None = None, reason: str = "") -> "CoTrackerBackend":
        """CoTracker from the models folders, on the GPU where there is one.

        Raises:
            CameraError: a part of it is missing, or the file does not hold it.
        """
        missing = missing_part()
        if missing is not None:
            raise CameraError(missing)
        import torch

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        checkpoint = find(CHECKPOINT)
        if checkpoint is not None and importlib.util.find_spec(PACKAGE) is not None:
            tracker, path = _from_package(checkpoint, device), checkpoint
        else:
            path = find(SCRIPTED)
            assert path is not None  # one of the two is there: nothing is missing
            tracker = _from_script(path, device)
        return cls(tracker, file=path.name, device=device, reason=reason)

    def describe(self) -> dict[str, Any]:
        """Name, licence and settings, for the records."""
        return {
            "name": "CoTracker3 online",
            "file": self.file,
            "licence": self.licence,
            "window_frames": WINDOW_FRAMES,
            "grid": list(GRID),
        }

    def follow(self, footage: Footage, pairs: Pairs) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Background points (M, 2) of the first frame of each pair, and where the second has them.

        In pixels of the footage's work size; only points visible and outside people in both.
        """
        for group in _windows(pairs):
            start = group[0][0]
            tracks, visible = self._track(footage, start, max(second for _, second in group) + 1)
            for first, second in group:
                one, two = tracks[first - start], tracks[second - start]
                mask = footage.background(first, second)
                kept = visible[first - start] & visible[second - start]
                kept &= _open(mask, one) & _open(mask, two)
                yield one[kept], two[kept]

    def _track(self, footage: Footage, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tracks (T, N, 2) in work pixels and visibility (T, N) over frames `start` to `stop`.

        A point counts as visible from the frame on in which it was asked for.
        """
        import torch

        length, scale = stop - start, _scale(footage)
        queries = _queries(footage, start, length)
        if not len(queries):
            return np.zeros((length, 0, 2), np.float32), np.zeros((length, 0), bool)
        asked = np.concatenate([queries[:, :1], _to_model(queries[:, 1:], scale)], 1)
        frames = np.stack([_model_frame(footage.frames[n]) for n in range(start, stop)])
        step = int(self.tracker.step)
        tracks = visible = None
        with torch.inference_mode():
            points = torch.from_numpy(asked.astype(np.float32))[None].to(self.device)
            for begin in range(0, max(1, length - step), step):
                chunk = self._chunk(frames, begin, 2 * step)
                if begin == 0:
                    self.tracker(chunk, is_first_step=True, queries=points)
                tracks, visible = self.tracker(chunk)
            tracks, visible = _checked(tracks, visible, length, len(queries), self.file)
        born = np.arange(length)[:, None] >= queries[None, :, 0]
        return _from_model(tracks, scale).astype(np.float32), visible & born

    def _chunk(self, frames: np.ndarray, begin: int, length: int) -> Any:
        """Frames (1, T, 3, H, W) 0..255 from `begin` on; the last is repeated to `length`."""
        import torch

        numbers = np.minimum(np.arange(begin, begin + length), len(frames) - 1)
        video = torch.from_numpy(frames[numbers]).to(self.device).permute(0, 3, 1, 2)
        return video[None].float().contiguous()


def _from_package(path: Path, device: str) -> Tracker:
    """The package's predictor with the weights of a checkpoint; only tensors are unpickled."""
    import torch

    predictor_module = importlib.import_module(f"{PACKAGE}.predictor")
    predictor = predictor_module.CoTrackerOnlinePredictor(checkpoint=None, window_len=MODEL_WINDOW)
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        predictor.model.load_state_dict(weights.get("model", weights))
    except Exception as error:
        raise CameraError(
            f"{path} does not hold CoTracker3's online weights ({str(error)[:200]}); "
            "get scaled_online.pth again"
        ) from None
    return predictor.to(device).eval()


def _from_script(path: Path, device: str) -> Tracker:
    import torch

    try:
        tracker = torch.jit.load(str(path), map_location=device).eval()
        int(tracker.step)
    except Exception as error:
        raise CameraError(
            f"{path} is not a TorchScript file of CoTracker's online predictor "
            f"({str(error)[:200]}); script it again, with its attribute `step`"
        ) from None
    return tracker


def _windows(pairs: Pairs) -> list[list[tuple[int, int]]]:
    """Pairs in runs that lie within WINDOW_FRAMES frames."""
    groups: list[list[tuple[int, int]]] = []
    for pair in pairs:
        if groups and pair[1] - groups[-1][0][0] < WINDOW_FRAMES:
            groups[-1].append(pair)
        else:
            groups.append([pair])
    return groups


def _queries(footage: Footage, start: int, length: int) -> np.ndarray:
    """Points (N, 3) to follow: frame from `start` on, x, y of a grid where nobody is."""
    width, height = footage.size
    columns, rows = GRID if width >= height else GRID[::-1]
    x = (np.arange(columns) + 0.5) * width / columns
    y = (np.arange(rows) + 0.5) * height / rows
    grid = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2).astype(np.float32)
    found = []
    # Asked for near the end of a window, points would be followed for nothing.
    for frame in range(0, max(1, length - RESEED_FRAMES // 2), RESEED_FRAMES):
        points = grid[_open(footage.background(start + frame, start + frame), grid)]
        found.append(np.insert(points, 0, frame, axis=1))
    return np.concatenate(found)


def _open(mask: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Which points (M, 2) lie in the frame and outside the people of a mask (H, W)."""
    last = np.array(mask.shape[::-1]) - 1
    # Not-a-number is not inside either.
    inside = np.all((points >= 0) & (points <= last), axis=1)
    x, y = np.where(inside[:, None], points, 0).round().astype(int).T
    return inside & (mask[y, x] > 0)


def _model_frame(frame: np.ndarray) -> np.ndarray:
    return cv2.resize(frame, MODEL_SIZE[::-1], interpolation=cv2.INTER_AREA)


def _scale(footage: Footage) -> np.ndarray:
    """Pixels of the model's frame for one of the work size, (x, y)."""
    return np.array(MODEL_SIZE[::-1]) / footage.size


def _to_model(points: np.ndarray, scale: np.ndarray) -> np.ndarray:
    # Resizing keeps the frame's edges in place, which lie half a pixel outside the centres.
    return (points + 0.5) * scale - 0.5


def _from_model(points: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return (points + 0.5) / scale - 0.5


def _checked(
    tracks: Any, visible: Any, length: int, num_points: int, file: str
) -> tuple[np.ndarray, np.ndarray]:
    """(T, N, 2) and (T, N) of the frames there are; CameraError for other shapes."""
    expected = (1, length, num_points, 2), (1, length, num_points)
    shapes = [list(getattr(value, "shape", [])) for value in (tracks, visible)]
    # More frames than there are were padding.
    if any(
        [*got[:1], min(got[1:2], default=0) >= length, *got[2:]] != [1, True, *want[2:]]
        for got, want in zip(shapes, expected, strict=True)
    ):
        raise CameraError(
            f"{file} gave tracks {shapes[0]} and visibility {shapes[1]}, expected "
            f"{expected[0]} and {expected[1]}, or more frames: it is not CoTracker's online model"
        )
    return (
        tracks[0, :length].float().cpu().numpy(),
        visible[0, :length].bool().cpu().numpy(),
    )
