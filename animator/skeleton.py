"""Keypoints to pose images: body, hands and face in fixed colours, scaled by confidence.

Two drawings of the same keypoints, named by `PoseStyle`: `bold` keeps limbs, fingers and faces
readable in small frames; `published` (animator.skeleton_published) is what v1's weights know.
Shapes: P people, K keypoints (`animator.keypoints`), H W pixels.
"""

import cv2
import numpy as np

from animator.config import PoseStyle
from animator.keypoints import (
    BODY,
    FACE,
    HAND_EDGES,
    KEYPOINT_COUNTS,
    LEFT_HAND,
    LIMBS,
    RIGHT_HAND,
    VISIBLE,
    WHOLE_BODY,
)
from animator.skeleton_colours import COLOURS, FACE_COLOUR, HAND_COLOURS, HAND_POINT_COLOUR
from animator.skeleton_published import draw_published

STICK = 4 / 2160  # half width of a limb over the frame's short side
MIN_STICK = 1.25  # pixels; thinner limbs vanish in small frames
LIMB_OPACITY = 0.6
FINE = 0.4  # of a limb's width: fingers, and the dots of hands and faces
FAR = 1e6  # frames; as good as infinity, and safe to multiply by a frame's size
_SHIFT = 4  # fractional bits of cv2's sub-pixel coordinates


def draw_pose(
    keypoints: np.ndarray,
    score: np.ndarray,
    height: int,
    width: int,
    threshold: float = VISIBLE,
    style: PoseStyle = "bold",
) -> np.ndarray:
    """One frame's people as a pose image.

    Args:
        keypoints: `(K, 2)` or `(P, K, 2)` in 0..1 of the frame; may lie outside of it. A point that
            is not finite is missing.
        score: `(K,)` or `(P, K)`, confidence, of which 0..1 counts.
        threshold: body joints scored below it are not drawn, nor in `bold` those of hands and face.

    Returns:
        `(H, W, 3)` uint8 RGB, black where nothing is drawn.

    Raises:
        ValueError: for another number of keypoints than a body's or a whole body's.
    """
    if keypoints.shape[-2] not in KEYPOINT_COUNTS:
        body, whole = KEYPOINT_COUNTS
        raise ValueError(
            f"Got {keypoints.shape[-2]} keypoints a person, but expected {body} (body) or {whole} "
            "(body, hands and face)."
        )
    people = keypoints.reshape(-1, *keypoints.shape[-2:])
    scores = score.reshape(-1, score.shape[-1])
    finite = np.isfinite(people).all(-1) & np.isfinite(scores)
    people = np.where(finite[..., None], people, 0).clip(-FAR, FAR)
    scores = np.where(finite, scores, np.nan).clip(0, 1)  # NaN reaches no threshold
    if style == "published":
        return draw_published(people, scores, height, width, threshold)
    return _draw_bold(people, scores, height, width, threshold)


def _draw_bold(
    people: np.ndarray, scores: np.ndarray, height: int, width: int, threshold: float
) -> np.ndarray:
    """Drawn several times larger and averaged down, so that thin lines stay smooth at any size."""
    factor = max(1, round(512 / min(height, width)))
    canvas = np.zeros((height * factor, width * factor, 3), np.float32)
    size = np.array([width * factor, height * factor], np.float32)
    radius = max(STICK * min(height, width), MIN_STICK) * factor
    people = people * size
    # What is fine comes first: in a small frame a hand is no larger than the end of its arm.
    if people.shape[1] == WHOLE_BODY:
        for points, confidence in zip(people, scores, strict=True):
            _draw_hands_and_face(canvas, points, confidence, radius * FINE, threshold)
    for points, confidence in zip(people[:, BODY], scores[:, BODY], strict=True):
        _draw_body(canvas, points, confidence, radius, threshold)
    small = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)
    return np.clip(np.rint(small), 0, 255).astype(np.uint8)


def _draw_body(
    canvas: np.ndarray, joints: np.ndarray, confidence: np.ndarray, radius: float, threshold: float
) -> None:
    seen = confidence >= threshold
    for limb, (a, b) in enumerate(LIMBS):
        if seen[a] and seen[b]:
            shade = COLOURS[limb] * confidence[a] * confidence[b] * LIMB_OPACITY
            _line(canvas, joints[a], joints[b], radius, shade)
    for joint in np.flatnonzero(seen):
        _dot(canvas, joints[joint], radius, COLOURS[joint] * confidence[joint])


def _draw_hands_and_face(
    canvas: np.ndarray, points: np.ndarray, confidence: np.ndarray, radius: float, threshold: float
) -> None:
    for part in (LEFT_HAND, RIGHT_HAND):
        hand, sure = points[part], confidence[part]
        seen = sure >= threshold
        for edge, (a, b) in enumerate(HAND_EDGES):
            if seen[a] and seen[b]:
                shade = HAND_COLOURS[edge] * sure[a] * sure[b]
                _line(canvas, hand[a], hand[b], radius, shade)
        for joint in np.flatnonzero(seen):
            _dot(canvas, hand[joint], radius, HAND_POINT_COLOUR * sure[joint])
    face, sure = points[FACE], confidence[FACE]
    for joint in np.flatnonzero(sure >= threshold):
        _dot(canvas, face[joint], radius, FACE_COLOUR * sure[joint])


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
