"""Face masks as pictures: filled boxes in white on black, all white where no face was found.

H W height and width, F faces
"""

import cv2
import numpy as np

MAX_FACES = 16
_MIN_SIDE = 2  # pixels; less is a trace of scaling
_WHOLE = 0.99  # share of white from which a mask means that no face was found


def draw_mask(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Boxes (F, 4) in 0..1, empty ones not counting, as a mask (H, W) uint8 of 0 and 255."""
    real = boxes[(boxes[:, 2:] > boxes[:, :2]).all(axis=1)]
    if not len(real):
        return np.full((height, width), 255, np.uint8)
    mask = np.zeros((height, width), np.uint8)
    for box in real * (width, height, width, height):
        left, top = np.floor(box[:2] + 0.5).astype(int)
        right, bottom = np.maximum(np.floor(box[2:] + 0.5).astype(int), (left + 1, top + 1))
        mask[max(0, top) : bottom, max(0, left) : right] = 255
    return mask


def mask_boxes(mask: np.ndarray) -> np.ndarray:
    """The boxes (F, 4) in 0..1 around a mask's white areas, largest first, at most MAX_FACES.

    Boxes that touch come back as one, since a mask does not tell them apart. None for a mask that
    is all white.

    Args:
        mask: (H, W) or (H, W, 3) uint8.
    """
    grey = mask if mask.ndim == 2 else mask.max(axis=-1)
    white = (grey > 127).astype(np.uint8)
    if white.mean() >= _WHOLE:
        return np.zeros((0, 4), np.float32)
    height, width = white.shape
    _, _, stats, _ = cv2.connectedComponentsWithStats(white, connectivity=4)
    areas = stats[1:]  # the first is the background
    areas = areas[(areas[:, 2:4] >= _MIN_SIDE).all(axis=1)]
    order = np.argsort(-areas[:, 2] * areas[:, 3], kind="stable")[:MAX_FACES]
    left, top, wide, high = areas[order, :4].T
    boxes = np.stack([left, top, left + wide, top + high], axis=1)
    return (boxes / np.array([width, height, width, height])).astype(np.float32)
