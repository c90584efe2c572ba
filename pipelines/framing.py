"""Fitting a frame of one shape into another: one scale and one offset, never a stretch.

Images, keypoints and boxes go through the same mapping. Sizes are (height, width) in pixels.
"""

from dataclasses import dataclass

import cv2
import numpy as np

MODES = ("pad", "crop")


@dataclass(frozen=True)
class Framing:
    """Where a source frame lies in a target frame."""

    source: tuple[int, int]
    target: tuple[int, int]
    scale: float  # target pixels a source pixel
    left: float  # of the scaled source in the target; negative where it is cropped
    top: float

    def image(self, frame: np.ndarray) -> np.ndarray:
        """`(H, W, 3)` uint8 to the target size; padding repeats the edge, which keeps plain
        backgrounds plain."""
        if frame.shape[:2] != self.source:
            raise ValueError(
                f"Got a frame of {frame.shape[0]} x {frame.shape[1]}, but this framing maps "
                f"frames of {self.source[0]} x {self.source[1]}."
            )
        height, width = self.target
        inner_h = max(1, round(self.source[0] * self.scale))
        inner_w = max(1, round(self.source[1] * self.scale))
        shrinking = self.scale < 1
        resized = cv2.resize(
            frame,
            (inner_w, inner_h),
            interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC,
        )
        top, left = round(self.top), round(self.left)
        resized = resized[max(0, -top) :, max(0, -left) :][:height, :width]
        top, left = max(0, top), max(0, left)
        bottom = height - top - resized.shape[0]
        right = width - left - resized.shape[1]
        return cv2.copyMakeBorder(resized, top, bottom, left, right, cv2.BORDER_REPLICATE)

    def points(self, keypoints: np.ndarray) -> np.ndarray:
        """`(..., 2)` in 0..1 of the source to 0..1 of the target (may fall outside)."""
        source = np.array(self.source[::-1], np.float32)
        target = np.array(self.target[::-1], np.float32)
        offset = np.array([self.left, self.top], np.float32)
        return (keypoints * source * self.scale + offset) / target

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """`(..., 4)` xyxy in 0..1 of the source to 0..1 of the target; all-zero stays zero."""
        corners = boxes.reshape(*boxes.shape[:-1], 2, 2)
        mapped = self.points(corners).reshape(boxes.shape)
        return np.where(np.any(boxes != 0, axis=-1, keepdims=True), mapped, 0).astype(boxes.dtype)

    def inner_box(self) -> tuple[int, int, int, int]:
        """x0, y0, x1, y1 in target pixels: the part that shows the source, not padding."""
        height, width = self.target
        return (
            max(0, round(self.left)),
            max(0, round(self.top)),
            min(width, round(self.left) + round(self.source[1] * self.scale)),
            min(height, round(self.top) + round(self.source[0] * self.scale)),
        )


def fit(source: tuple[int, int], target: tuple[int, int], mode: str = "pad") -> Framing:
    """Framing that centres the source: `pad` shows all of it, `crop` fills the target.

    Raises:
        ValueError: for another mode or an empty frame.
    """
    if mode not in MODES:
        raise ValueError(f"Got framing mode {mode!r}, but expected one of {', '.join(MODES)}.")
    if min(*source, *target) < 1:
        raise ValueError(f"Got sizes {source} and {target}, but expected at least one pixel.")
    ratios = (target[0] / source[0], target[1] / source[1])
    scale = min(ratios) if mode == "pad" else max(ratios)
    left = (target[1] - source[1] * scale) / 2
    top = (target[0] - source[0] * scale) / 2
    return Framing(source, target, scale, left, top)
