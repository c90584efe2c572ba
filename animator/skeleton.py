"""Keypoints to pose images: limbs and joints in fixed colours, scaled by confidence (v1).

Drawn several times larger and averaged down, so that thin limbs stay smooth at any size.
Shapes: P people, N = 18 keypoints, H W pixels.
"""

import cv2
import numpy as np

from animator.keypoints import LIMBS, VISIBLE

# Hues of OpenPose's body model; in an image read as RGB, limb 0 is red.
COLOURS = np.array(
    [
        (255, 0, 0),
        (255, 85, 0),
        (255, 170, 0),
        (255, 255, 0),
        (170, 255, 0),
        (85, 255, 0),
        (0, 255, 0),
        (0, 255, 85),
        (0, 255, 170),
        (0, 255, 255),
        (0, 170, 255),
        (0, 85, 255),
        (0, 0, 255),
        (85, 0, 255),
        (170, 0, 255),
        (255, 0, 255),
        (255, 0, 170),
        (255, 0, 85),
    ],
    np.float32,
)
STICK = 4 / 2160  # half width of a limb over the frame's short side
MIN_STICK = 1.25  # pixels; thinner limbs vanish in small frames
LIMB_OPACITY = 0.6
_SHIFT = 4  # fractional bits of cv2's sub-pixel coordinates


def draw_pose(
    keypoints: np.ndarray,
    score: np.ndarray,
    height: int,
    width: int,
    threshold: float = VISIBLE,
) -> np.ndarray:
    """One frame's people as a pose image.

    Args:
        keypoints: `(N, 2)` or `(P, N, 2)` in 0..1 of the frame; may lie outside of it.
        score: `(N,)` or `(P, N)`; joints below `threshold` are not drawn.

    Returns:
        `(H, W, 3)` uint8 RGB, black where nothing is drawn.
    """
    people = keypoints.reshape(-1, *keypoints.shape[-2:])
    scores = score.reshape(-1, score.shape[-1])
    factor = max(1, round(512 / min(height, width)))
    canvas = np.zeros((height * factor, width * factor, 3), np.float32)
    size = np.array([width * factor, height * factor], np.float32)
    radius = max(STICK * min(height, width), MIN_STICK) * factor
    for joints, confidence in zip(people * size, scores, strict=True):
        seen = (confidence >= threshold) & np.isfinite(joints).all(-1)
        confidence = np.clip(confidence, 0, 1)
        for limb, (a, b) in enumerate(LIMBS):
            if seen[a] and seen[b]:
                shade = COLOURS[limb] * confidence[a] * confidence[b] * LIMB_OPACITY
                _line(canvas, joints[a], joints[b], radius, shade)
        for joint in np.flatnonzero(seen):
            _dot(canvas, joints[joint], radius, COLOURS[joint] * confidence[joint])
    small = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)
    return np.clip(np.rint(small), 0, 255).astype(np.uint8)


def _fixed(point: np.ndarray) -> tuple[int, int]:
    x, y = np.rint(np.clip(point, -1e5, 1e5) * 2**_SHIFT).astype(int)
    return int(x), int(y)


def _line(
    canvas: np.ndarray, start: np.ndarray, end: np.ndarray, radius: float, shade: np.ndarray
) -> None:
    thickness = max(1, round(2 * radius))
    colour = tuple(float(c) for c in shade)
    cv2.line(canvas, _fixed(start), _fixed(end), colour, thickness, cv2.LINE_8, _SHIFT)


def _dot(canvas: np.ndarray, centre: np.ndarray, radius: float, shade: np.ndarray) -> None:
    colour = tuple(float(c) for c in shade)
    size = round(radius * 1.2 * 2**_SHIFT)
    cv2.circle(canvas, _fixed(centre), size, colour, cv2.FILLED, cv2.LINE_8, _SHIFT)
