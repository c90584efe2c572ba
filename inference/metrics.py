"""Picture metrics: PSNR and SSIM, over whole frames or inside the person's box.

Shapes: T frames, H W pixels. Frames are uint8 RGB; boxes xyxy in 0..1.
"""

from typing import Any

import numpy as np

from animator.keypoints import BODY

PEAK = 255.0
IDENTICAL = 100.0  # dB, what equal frames score instead of infinity


def psnr(frame: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 images in dB, at most 100."""
    error = float(np.mean((frame.astype(np.float64) - truth.astype(np.float64)) ** 2))
    return IDENTICAL if error == 0 else min(IDENTICAL, 10 * np.log10(PEAK**2 / error))


def ssim(frame: np.ndarray, truth: np.ndarray) -> float:
    """Structural similarity of two uint8 RGB images (scikit-image, its default window of 7)."""
    from skimage.metrics import structural_similarity

    window = min(7, *frame.shape[:2])
    window -= 1 - window % 2
    value: Any = structural_similarity(frame, truth, channel_axis=2, win_size=window)
    return float(value)


def pixel_box(box: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A box in 0..1 as x0, y0, x1, y1 in whole pixels inside the frame, at least 8 by 8."""
    height, width = size
    x0, y0 = (max(0, int(np.floor(v))) for v in (box[0] * width, box[1] * height))
    x1 = min(width, max(x0 + 8, int(np.ceil(box[2] * width))))
    y1 = min(height, max(y0 + 8, int(np.ceil(box[3] * height))))
    return max(0, min(x0, x1 - 8)), max(0, min(y0, y1 - 8)), x1, y1


def person_boxes(
    keypoints: np.ndarray, score: np.ndarray, threshold: float, margin: float = 0.1
) -> np.ndarray:
    """Boxes `(T, 4)` around the visible joints of bodies `(T, K, 2)`, grown by a share of them.

    A frame without a visible joint has the whole frame as its box.
    """
    boxes = np.tile(np.array([0, 0, 1, 1], np.float32), (len(keypoints), 1))
    bodies = zip(keypoints[:, BODY], score[:, BODY], strict=True)
    for t, (points, confidence) in enumerate(bodies):
        seen = points[confidence >= threshold]
        if len(seen):
            low, high = seen.min(0), seen.max(0)
            grow = margin * (high - low)
            boxes[t] = np.clip(np.concatenate([low - grow, high + grow]), 0, 1)
    return boxes


def cut(frame: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The part of a frame inside a box in 0..1."""
    x0, y0, x1, y1 = pixel_box(box, frame.shape[:2])
    return frame[y0:y1, x0:x1]


def compare(frames: np.ndarray, truth: np.ndarray, boxes: np.ndarray) -> dict[str, float]:
    """Mean over the frames `(T, H, W, 3)` of each metric, in the person's box and outright."""
    if frames.shape != truth.shape:
        raise ValueError(f"Got frames of shape {frames.shape}, but the truth has {truth.shape}.")
    inside = [(cut(f, b), cut(t, b)) for f, t, b in zip(frames, truth, boxes, strict=True)]
    whole = list(zip(frames, truth, strict=True))
    return {
        "psnr_person": float(np.mean([psnr(*pair) for pair in inside])),
        "ssim_person": float(np.mean([ssim(*pair) for pair in inside])),
        "psnr": float(np.mean([psnr(*pair) for pair in whole])),
        "ssim": float(np.mean([ssim(*pair) for pair in whole])),
    }
