"""How much the camera moves: tracked background points and the homography that explains them.

Points that are followed by optical flow forth and back, outside the people, are fitted by a robust
homography between frames a fixed time apart, by a similarity where the points are too few for one.
The motion of a pair of frames is how far that model moves the points it explains; the motion of a
clip is the median over pairs, so neither a moving thing in the background nor a cut decides it.
Everything is in percent of the frame's long side. Real clips of a fixed camera measure below 0.3 a
second, hand-held and panning ones above 4.

T frames, P people, M points
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import numpy as np

from pipelines.schema import Scores

WORK_SIDE = 480
SPAN_SECONDS = 0.5
MAX_PAIRS = 40
MAX_POINTS = 400
CELLS = 8
MIN_POINTS = 8
MIN_HOMOGRAPHY_POINTS = 40
MIN_INLIERS = 0.4
FORTH_AND_BACK = 1.0  # pixels of the work size
REPROJECTION = 2.0
BOX_MARGIN = 0.08


class CameraError(ValueError):
    """A camera backend that cannot be opened; the message says how to mend it."""


class CameraBackend(Protocol):
    """What follows the points of the background.

    needs_models: whether it runs a network, so belongs to the process that holds the models.
    """

    name: str
    licence: str
    reason: str
    needs_models: bool

    def describe(self) -> dict[str, Any]:
        """Name, licence and settings, for the records."""
        ...


class FlowBackend:
    """Lucas-Kanade optical flow of corners between frames a fixed time apart; OpenCV alone."""

    name = "flow"
    licence = "Apache-2.0"
    needs_models = False

    def __init__(self, reason: str = "asked for"):
        self.reason = reason

    def describe(self) -> dict[str, Any]:
        """Name, licence and settings, for the records."""
        return {"name": "optical flow and robust homography", "licence": self.licence}


def open_camera_backend(choice: str = "auto") -> CameraBackend:
    """The backend for `auto`, `flow` or `cotracker`; CameraError for others or a missing one."""
    if choice == "cotracker":
        raise CameraError("CoTracker was not found")
    if choice not in ("auto", "flow"):
        raise CameraError(f"camera backend {choice!r}; expected auto, flow or cotracker")
    return FlowBackend("the only one present" if choice == "auto" else "asked for")


def measure_camera(
    frames: Sequence[np.ndarray],
    fps: float,
    person_boxes: np.ndarray | None,
    backend: CameraBackend,
) -> Scores:
    """Every score of the camera over uint8 RGB frames (H, W, 3) of one shot at `fps`."""
    motion = camera_motion(frames, fps, person_boxes)
    return {
        "camera_percent_per_second": motion.percent_per_second,
        "camera_residual_percent": motion.residual_percent,
        "camera_tracks": motion.num_tracks,
        "camera_tracked_share": motion.tracked_share,
        "camera_pan_percent_per_second": motion.percent_per_second,
        "camera_zoom_percent_per_second": 0.0,
        "camera_roll_degrees_per_second": 0.0,
        "camera_shake_percent": 0.0,
        "camera_background_variance": 0.0,
        "camera_kind": "unknown",
        "camera_backend": backend.name,
    }


@dataclass(frozen=True, kw_only=True)
class CameraMotion:
    """Motion of the camera over a clip.

    percent_per_second: median displacement of the picture, % of the long side a second.
    residual_percent: median distance of the background points from the homography, % of it.
    num_tracks: background points a pair of frames, median; few make the rest uncertain.
    tracked_share: share of the pairs of frames that a homography explains.
    """

    percent_per_second: float
    residual_percent: float
    num_tracks: int
    tracked_share: float


def camera_motion(
    frames: Sequence[np.ndarray], fps: float, person_boxes: np.ndarray | None = None
) -> CameraMotion:
    """Motion of the camera over uint8 RGB frames (H, W, 3) of one shot at `fps`.

    `person_boxes` (T, P, 4) xyxy in 0..1 are left out, with a margin. Where the picture has nothing
    to track (a plain wall, a fade), the motion is 0 and `tracked_share` says so.
    """
    if fps <= 0:
        raise ValueError(f"fps is {fps}, expected the frames' rate")
    if person_boxes is not None and len(person_boxes) != len(frames):
        raise ValueError(f"{len(person_boxes)} frames of boxes for {len(frames)} frames")
    step = max(1, round(SPAN_SECONDS * fps))
    step = min(step, max(1, len(frames) - 1))
    starts = np.arange(0, len(frames) - step)
    if len(starts) > MAX_PAIRS:
        starts = starts[np.linspace(0, len(starts) - 1, MAX_PAIRS).round().astype(int)]
    work = _Work(frames, person_boxes)
    moves, residuals, counts = [], [], []
    for start in starts:
        pair = work.pair(int(start), int(start) + step)
        counts.append(pair[2])
        if pair[0] is not None:
            moves.append(pair[0] * fps / step)
            residuals.append(pair[1])
    return CameraMotion(
        percent_per_second=float(np.median(moves)) if moves else 0.0,
        residual_percent=float(np.median(residuals)) if residuals else 0.0,
        num_tracks=int(np.median(counts)) if counts else 0,
        tracked_share=len(moves) / max(1, len(counts)),
    )


class _Work:
    """Grey frames at the work size and masks without people, made when first needed."""

    def __init__(self, frames: Sequence[np.ndarray], boxes: np.ndarray | None):
        self.frames, self.boxes = frames, boxes
        self.grey_of: dict[int, np.ndarray] = {}

    def grey(self, index: int) -> np.ndarray:
        if index not in self.grey_of:
            frame = self.frames[index]
            scale = min(1.0, WORK_SIDE / max(frame.shape[:2]))
            size = [max(2, round(side * scale)) for side in frame.shape[1::-1]]
            small = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
            self.grey_of[index] = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
        return self.grey_of[index]

    def background(self, index: int) -> np.ndarray:
        """uint8 mask (H, W), 255 where no person is."""
        mask = np.full(self.grey(index).shape, 255, np.uint8)
        if self.boxes is not None:
            size = np.array(mask.shape[::-1])
            for box in self.boxes[index]:
                extent = box[2:] - box[:2]
                if (extent <= 0).any():
                    continue
                grown = np.concatenate(
                    [box[:2] - BOX_MARGIN * extent, box[2:] + BOX_MARGIN * extent]
                )
                x1, y1, x2, y2 = (grown.clip(0, 1) * np.tile(size, 2)).round().astype(int)
                mask[y1:y2, x1:x2] = 0
        return mask

    def pair(self, first: int, second: int) -> tuple[float | None, float, int]:
        """Displacement and residual in % of the long side (None: no fit), and points followed."""
        one, two = self.grey(first), self.grey(second)
        points = _spread_corners(one, self.background(first))
        if len(points) < MIN_POINTS:
            return None, 0.0, len(points)
        there, back_error = _follow(one, two, points)
        inside = ((there >= 0) & (there <= np.array(two.shape[::-1]) - 1)).all(1)
        mask = self.background(second)
        x, y = there.clip(0, np.array(two.shape[::-1]) - 1).round().astype(int).T
        kept = inside & (back_error < FORTH_AND_BACK) & (mask[y, x] > 0)
        points, there = points[kept], there[kept]
        if len(points) < MIN_POINTS:
            return None, 0.0, len(points)
        return self._fit(points, there, one.shape)

    def _fit(
        self, points: np.ndarray, there: np.ndarray, shape: tuple[int, ...]
    ) -> tuple[float | None, float, int]:
        cv2.setRNGSeed(0)
        if len(points) < MIN_HOMOGRAPHY_POINTS:
            # Eight unknowns from a handful of points in one corner say nothing of the rest.
            affine, inliers = cv2.estimateAffinePartial2D(
                points, there, method=cv2.RANSAC, ransacReprojThreshold=REPROJECTION
            )
            matrix = None if affine is None else np.vstack([affine, [0, 0, 1]])
        else:
            matrix, inliers = cv2.findHomography(points, there, cv2.USAC_MAGSAC, REPROJECTION)
        if matrix is None or inliers is None or inliers.mean() < MIN_INLIERS:
            return None, 0.0, len(points)
        placed = cv2.perspectiveTransform(points[None].astype(np.float64), matrix)[0]
        shift = np.linalg.norm(placed - points, axis=1)[inliers.ravel() > 0]
        if not np.isfinite(shift).all():
            return None, 0.0, len(points)
        residual = np.median(np.linalg.norm(placed - there, axis=1))
        percent = 100 / max(shape)
        return float(np.median(shift) * percent), float(residual * percent), len(points)


def _spread_corners(grey: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Corners (M, 2), the best of each cell so that one busy object cannot have them all."""
    height, width = grey.shape
    found = []
    per_cell = max(1, MAX_POINTS // CELLS**2)
    for row in range(CELLS):
        for column in range(CELLS):
            top, bottom = row * height // CELLS, (row + 1) * height // CELLS
            left, right = column * width // CELLS, (column + 1) * width // CELLS
            part = grey[top:bottom, left:right]
            corners = cv2.goodFeaturesToTrack(
                part, per_cell, 0.05, 5, mask=mask[top:bottom, left:right], blockSize=5
            )
            if corners is not None:
                found.append(corners.reshape(-1, 2) + np.array([left, top]))
    return np.concatenate(found).astype(np.float32) if found else np.zeros((0, 2), np.float32)


def _follow(one: np.ndarray, two: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where points (M, 2) of one frame are in the other, and how far back-tracking misses."""
    there, found = _flow(one, two, points)
    back, returned = _flow(two, one, there)
    missed = np.linalg.norm(back - points, axis=1)
    return there, np.where(found & returned, missed, np.inf)


def _flow(one: np.ndarray, two: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points (M, 2) of one frame in the other by pyramidal Lucas-Kanade, and which were found."""
    there, found, _ = cv2.calcOpticalFlowPyrLK(
        one, two, points[:, None], points[:, None].copy(), winSize=(21, 21), maxLevel=4
    )
    return there[:, 0], found.ravel() > 0
