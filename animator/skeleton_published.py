"""The drawing that v1's published weights were trained on (v1).

Thin lines on a canvas whose short side is 2160 pixels, scaled down without averaging: in a frame of
a few hundred pixels they break up into dots, which a model trained on other pictures does not know.
Shapes: P people, K keypoints (`animator.keypoints`), H W pixels.
"""

import math

import cv2
import numpy as np

from animator.keypoints import BODY, FACE, HAND_EDGES, LEFT_HAND, LIMBS, RIGHT_HAND, WHOLE_BODY
from animator.skeleton_colours import COLOURS, FACE_COLOUR, HAND_COLOURS, HAND_POINT_COLOUR

SHORT_SIDE = 2160  # pixels of the canvas; the sizes below are its pixels
LIMB = 4  # half width
JOINT = 4  # radius, as are the next two
HAND_POINT = 4
FACE_POINT = 3
HAND_LINE = 2  # width
LIMB_OPACITY = 0.6
_LIMIT = 1e5  # pixels; further out cv2's coordinates overflow


def draw_published(
    people: np.ndarray, scores: np.ndarray, height: int, width: int, threshold: float
) -> np.ndarray:
    """Finite keypoints `(P, K, 2)` and scores `(P, K)` in 0..1 as `(H, W, 3)` uint8 RGB.

    Body joints scored below `threshold` are not drawn. Points of hands and face are, however dark
    their score makes them, unless it is 0.
    """
    scale = SHORT_SIDE / min(height, width)
    size = round(width * scale), round(height * scale)
    canvas = np.zeros((size[1], size[0], 3), np.uint8)
    people = (people.astype(np.float64) * size).clip(-_LIMIT, _LIMIT)
    bodies = list(zip(people[:, BODY], scores[:, BODY], strict=True))
    for joints, confidence in bodies:
        _draw_limbs(canvas, joints, confidence, threshold)
    for joints, confidence in bodies:
        for joint in np.flatnonzero(confidence >= threshold):
            colour = _shade(COLOURS[joint], confidence[joint])
            _dot(canvas, joints[joint].astype(int), JOINT, colour)
    if people.shape[1] == WHOLE_BODY:
        pixels = people.astype(int)
        for hand in (LEFT_HAND, RIGHT_HAND):
            for points, confidence in zip(pixels[:, hand], scores[:, hand], strict=True):
                _draw_hand(canvas, points, confidence)
        for points, confidence in zip(pixels[:, FACE], scores[:, FACE], strict=True):
            for point in np.flatnonzero(_drawable(points, confidence)):
                colour = _shade(FACE_COLOUR, confidence[point])
                _dot(canvas, points[point], FACE_POINT, colour)
    return cv2.resize(canvas, (width, height))


def _draw_limbs(
    canvas: np.ndarray, joints: np.ndarray, confidence: np.ndarray, threshold: float
) -> None:
    seen = confidence >= threshold
    for limb, (a, b) in enumerate(LIMBS):
        if not (seen[a] and seen[b]):
            continue
        x, y = joints[a] - joints[b]
        centre = (joints[a] + joints[b]) / 2
        outline = cv2.ellipse2Poly(
            (int(centre[0]), int(centre[1])),
            (int(math.hypot(x, y) / 2), LIMB),
            int(math.degrees(math.atan2(y, x))),
            0,
            360,
            1,
        )
        colour = _shade(COLOURS[limb], confidence[a] * confidence[b])
        # v1 darkens the canvas once it holds all limbs, which is the same and slower.
        cv2.fillConvexPoly(canvas, np.array(outline), [int(c * LIMB_OPACITY) for c in colour])


def _draw_hand(canvas: np.ndarray, points: np.ndarray, confidence: np.ndarray) -> None:
    drawable = _drawable(points, confidence)
    for edge, (a, b) in enumerate(HAND_EDGES):
        if drawable[a] and drawable[b]:
            colour = _shade(HAND_COLOURS[edge], confidence[a] * confidence[b])
            cv2.line(canvas, points[a].tolist(), points[b].tolist(), colour, HAND_LINE)
    for point in np.flatnonzero(drawable):
        colour = _shade(HAND_POINT_COLOUR, confidence[point])
        _dot(canvas, points[point], HAND_POINT, colour)


def _drawable(points: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """Where a hand's or face's points, in whole pixels, are not missing; v1 marks those by 0."""
    return (points > 0).all(-1) & (confidence > 0)


def _shade(colour: np.ndarray, confidence: float) -> list[int]:
    return [int(c) for c in colour.astype(np.float64) * float(confidence)]


def _dot(canvas: np.ndarray, centre: np.ndarray, radius: int, colour: list[int]) -> None:
    cv2.circle(canvas, centre.tolist(), radius, colour, cv2.FILLED)
