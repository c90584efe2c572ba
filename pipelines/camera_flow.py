"""Background points followed by optical flow, forth and back; needs OpenCV alone.

M points, H W height and width
"""

from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np

from pipelines.camera_footage import Footage

CELLS = 8
MAX_POINTS = 160
MAX_CELL_POINTS = 12
CORNER_QUALITY = 0.05  # of the best corner of its cell
CORNER_BLOCK = 5
CORNER_DISTANCE = 5
FORTH_AND_BACK = 1.0  # pixels of the work size
# More rounds change nothing for points that can be followed, and cost the most for the others.
STOP = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 10, 0.03)
Pairs = Sequence[tuple[int, int]]


class FlowBackend:
    """Corners spread over the frame, followed by pyramidal Lucas-Kanade from frame to frame."""

    name = "flow"
    licence = "Apache-2.0"
    needs_models = False

    def __init__(self, reason: str = "asked for"):
        self.reason = reason

    def describe(self) -> dict[str, Any]:
        """Name, licence and settings, for the records."""
        return {
            "name": "optical flow and robust homography",
            "licence": self.licence,
            "points": MAX_POINTS,
        }

    def follow(self, footage: Footage, pairs: Pairs) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Background points (M, 2) of the first frame of each pair, and where the second has them.

        In pixels of the footage's work size; points that cannot be followed are left out.
        """
        for first, second in pairs:
            mask = footage.background(first, second)
            yield _follow(footage.grey(first), footage.grey(second), mask)


def _follow(one: np.ndarray, two: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    points = spread_corners(one, mask)
    if not len(points):
        return points, points
    there, found = _flow(one, two, points)
    last = np.array(two.shape[::-1]) - 1
    x, y = there.clip(0, last).round().astype(int).T
    kept = found & ((there >= 0) & (there <= last)).all(1) & (mask[y, x] > 0)
    points, there = points[kept], there[kept]
    if not len(points):
        return points, points
    back, found = _flow(two, one, there)
    kept = found & (np.linalg.norm(back - points, axis=1) < FORTH_AND_BACK)
    return points[kept], there[kept]


def _flow(one: np.ndarray, two: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points (M, 2) of one frame in the other, and which were found."""
    there, found, _ = cv2.calcOpticalFlowPyrLK(
        one,
        two,
        points[:, None],
        points[:, None].copy(),
        winSize=(21, 21),
        maxLevel=4,
        criteria=STOP,
    )
    return there[:, 0], found.ravel() > 0


def spread_corners(grey: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Corners (M, 2), the best of each cell so that one busy object cannot have them all."""
    strength = cv2.cornerMinEigenVal(grey, CORNER_BLOCK)
    strength[mask == 0] = 0
    side = 2 * CORNER_DISTANCE + 1
    peaks = (strength == cv2.dilate(strength, np.ones((side, side), np.uint8))) & (strength > 0)
    rows, columns = np.nonzero(peaks)
    if not len(rows):
        return np.zeros((0, 2), np.float32)
    value = strength[rows, columns]
    height, width = grey.shape
    cell = rows * CELLS // height * CELLS + columns * CELLS // width
    best = np.zeros(CELLS**2, strength.dtype)
    np.maximum.at(best, cell, value)
    # Where people leave few cells, each has to give more.
    per_cell = min(MAX_CELL_POINTS, MAX_POINTS // np.count_nonzero(best))
    # Order by cell, then best first, so that a corner's rank in its cell is its distance from
    # the cell's start.
    order = np.lexsort((-value, cell))
    rank = np.arange(len(order)) - np.searchsorted(cell[order], cell[order])
    kept = order[(rank < per_cell) & (value >= CORNER_QUALITY * best[cell])[order]]
    return np.stack([columns[kept], rows[kept]], 1).astype(np.float32)
