"""Frames of one shot as the camera's measures see them: small, grey, and without the people.

H W height and width of the work size, P people
"""

from collections.abc import Sequence

import cv2
import numpy as np

WORK_SIDE = 480
COLOUR_SIDE = 120
BOX_MARGIN = 0.08
# People who leave less of the frame than this are masked closer: see `Footage.background`.
OPEN_SHARE = 0.2
# A person in their box, xy in 0..1 of it: the head takes its middle, the shoulders its width.
BODY = np.array(
    [(0.15, 0), (0.85, 0), (0.85, 0.35), (1, 0.5), (1, 1), (0, 1), (0, 0.5), (0.15, 0.35)]
)


class Footage:
    """Frames at the work size and masks without people, made when first needed.

    A detector misses people in single frames, so a mask covers every box between two frames.
    """

    def __init__(self, frames: Sequence[np.ndarray], fps: float, boxes: np.ndarray | None):
        self.frames, self.fps, self.boxes = frames, fps, boxes
        self.size = _fitted(frames[0], WORK_SIDE)  # (W, H)
        self._grey: dict[int, np.ndarray] = {}
        self._colour: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def long_side(self) -> int:
        """Pixels of the longer side at the work size."""
        return max(self.size)

    def grey(self, index: int) -> np.ndarray:
        """Brightness (H, W) uint8."""
        if index not in self._grey:
            grey = cv2.cvtColor(self.frames[index], cv2.COLOR_RGB2GRAY)
            self._grey[index] = cv2.resize(grey, self.size, interpolation=cv2.INTER_AREA)
        return self._grey[index]

    def colour(self, index: int) -> np.ndarray:
        """The frame at COLOUR_SIDE pixels of its longer side, uint8 RGB."""
        if index not in self._colour:
            frame = self.frames[index]
            size = _fitted(frame, COLOUR_SIDE)
            self._colour[index] = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
        return self._colour[index]

    def background(self, first: int, last: int, size: tuple[int, int] | None = None) -> np.ndarray:
        """uint8 mask (H, W), 255 where nobody is from frame `first` to `last`; `size` is (W, H).

        A person near the camera has a box as large as the frame; the background then shows beside
        the head, in the upper corners of the box, and hardly anywhere else.
        """
        width, height = size or self.size
        mask = np.full((height, width), 255, np.uint8)
        if self.boxes is None or not self.boxes.shape[1]:
            return mask
        boxes = self.boxes[first : last + 1].reshape(-1, 2, 2)
        boxes = boxes[(boxes[:, 1] > boxes[:, 0]).all(1)]
        margin = BOX_MARGIN * (boxes[:, 1] - boxes[:, 0])
        low = (boxes[:, 0] - margin) * (width, height)
        high = (boxes[:, 1] + margin) * (width, height)
        for (x1, y1), (x2, y2) in zip(_pixels(low), _pixels(high), strict=True):
            mask[max(0, y1) : max(0, y2), max(0, x1) : max(0, x2)] = 0
        if np.count_nonzero(mask) >= OPEN_SHARE * mask.size:
            return mask
        mask[:] = 255
        for corner, extent in zip(low, high - low, strict=True):
            cv2.fillPoly(mask, [_pixels(corner + BODY * extent)], 0)
        return mask

    def forget(self, before: int) -> None:
        """Drop what was made of frames before an index, so that long shots stay small."""
        for kept in (self._grey, self._colour):
            for index in [index for index in kept if index < before]:
                del kept[index]


def _fitted(frame: np.ndarray, side: int) -> tuple[int, int]:
    """(width, height) of a frame shrunk to `side` pixels of its longer side."""
    height, width = frame.shape[:2]
    scale = min(1.0, side / max(height, width))
    return max(2, round(width * scale)), max(2, round(height * scale))


def _pixels(points: np.ndarray) -> np.ndarray:
    return points.round().astype(np.int32)
