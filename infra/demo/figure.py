"""A jointed cut-out figure that takes any COCO-18 pose, rendered over a paper stage.

Shapes: keypoints (18, 2) in 0..1 of the frame, frames (H, W, 3) uint8 RGB.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from infra.demo import puppet_parts as parts

SUPERSAMPLE = 2  # drawn at twice the size and averaged: clean edges at any size
SHADOW = 0.30  # how dark the figure's shadow falls on the stage
CARD = np.array([0.80, 0.68, 0.52], np.float32)
GIRTH = 0.0026  # a limb's width a pixel of its sprite, in lengths of the trunk


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One rendered frame (H, W, 3) and the figure's box, xyxy in 0..1."""

    image: np.ndarray
    box: np.ndarray


def draw_figure(
    keypoints: np.ndarray, background: np.ndarray, *, helmet: bool = False, plain: bool = False
) -> Drawn:
    """The figure in a pose over `background` (H, W, 3) uint8.

    `helmet` hides its face; `plain` shows another actor, the same figure in unprinted card.

    Raises ValueError where the keypoints are not (18, 2) finite numbers.
    """
    keypoints = np.asarray(keypoints, np.float32)
    if keypoints.shape != (18, 2) or not np.isfinite(keypoints).all():
        raise ValueError(f"a pose is 18 finite points (18, 2), not {keypoints.shape}")
    height, width = background.shape[:2]
    size = (width * SUPERSAMPLE, height * SUPERSAMPLE)
    points = keypoints * np.array(size, np.float32)
    layer = np.zeros((size[1], size[0], 4), np.float32)
    girth = GIRTH * float(np.linalg.norm(points[1] - (points[8] + points[11]) / 2))
    for part, target in _placed(points, helmet=helmet):
        _paste(layer, part.image, _transform(part.anchors, target, girth))
    layer = cv2.resize(layer, (width, height), interpolation=cv2.INTER_AREA)
    if plain:
        grey = layer[..., :3].mean(axis=-1, keepdims=True)
        layer[..., :3] = CARD * (0.45 * layer[..., 3:] + 0.75 * grey)
    stage = _with_shadow(background.astype(np.float32) / 255, layer[..., 3])
    image = stage * (1 - layer[..., 3:]) + layer[..., :3]
    return Drawn(image=np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8), box=_box(layer[..., 3]))


def _placed(points: np.ndarray, *, helmet: bool) -> list[tuple[parts.Part, np.ndarray]]:
    """Parts from back to front, each with the points its anchors go to."""
    placed: list[tuple[parts.Part, np.ndarray]] = []
    pelvis = (points[8] + points[11]) / 2
    trunk = float(np.linalg.norm(points[1] - pelvis))
    for root, middle, end in ((8, 9, 10), (11, 12, 13)):
        sole = points[end] + _unit(points[end] - points[middle], fallback=(0, 1)) * 0.15 * trunk
        placed += [
            (parts.limb("shin"), points[[middle, end]]),
            (parts.foot(), np.stack([points[end], sole])),
            (parts.limb("thigh"), points[[root, middle]]),
        ]
    torso_bottom = pelvis + (pelvis - points[1]) * 0.04
    placed.append((parts.torso(), np.stack([points[2], points[5], torso_bottom])))
    placed.append((parts.helmet() if helmet else parts.head(), points[list(parts.FACE_POINTS)]))
    for root, middle, end in ((2, 3, 4), (5, 6, 7)):
        tips = points[end] + _unit(points[end] - points[middle], fallback=(0, 1)) * 0.26 * trunk
        placed += [
            (parts.hand(), np.stack([points[end], tips])),
            (parts.limb("forearm"), points[[middle, end]]),
            (parts.limb("upper_arm"), points[[root, middle]]),
        ]
    return placed


def _unit(vector: np.ndarray, *, fallback: tuple[float, float]) -> np.ndarray:
    length = float(np.linalg.norm(vector))
    return vector / length if length > 1e-6 else np.array(fallback, np.float32)


def _transform(anchors: np.ndarray, target: np.ndarray, girth: float) -> np.ndarray:
    """The (2, 3) map from a part's anchors to the figure.

    Two anchors: along the limb the part stretches to its length, across it is `girth` a pixel.
    Three: affine. More: the similarity with the least squared error.
    """
    if len(anchors) == 3:
        return cv2.getAffineTransform(anchors, target.astype(np.float32))
    if len(anchors) > 3:
        source, goal = anchors - anchors.mean(0), target - target.mean(0)
        turn = (source[:, 0] + 1j * source[:, 1]).conj() @ (goal[:, 0] + 1j * goal[:, 1])
        turn /= (source**2).sum()
        matrix = np.array([[turn.real, -turn.imag], [turn.imag, turn.real]])
        return np.column_stack([matrix, target.mean(0) - matrix @ anchors.mean(0)])
    along = anchors[1] - anchors[0]
    goal = target[1] - target[0]
    length = float(np.linalg.norm(along))
    axis, side = along / length, np.array([-along[1], along[0]]) / length
    goal_axis = _unit(goal, fallback=(0, 1))
    goal_side = np.array([-goal_axis[1], goal_axis[0]])
    stretch = float(np.linalg.norm(goal)) / length
    matrix = np.outer(goal_axis, axis) * stretch + np.outer(goal_side, side) * girth
    return np.column_stack([matrix, target[0] - matrix @ anchors[0]])


def _paste(layer: np.ndarray, sprite: np.ndarray, matrix: np.ndarray) -> None:
    """Lay a premultiplied sprite over the layer, touching only the pixels it covers."""
    height, width = sprite.shape[:2]
    corners = np.array([[0, 0], [width, 0], [0, height], [width, height]], np.float64)
    moved = corners @ matrix[:, :2].T + matrix[:, 2]
    left, top = np.maximum(np.floor(moved.min(0)).astype(int), 0)
    right = min(int(np.ceil(moved[:, 0].max())), layer.shape[1])
    bottom = min(int(np.ceil(moved[:, 1].max())), layer.shape[0])
    if left >= right or top >= bottom:
        return
    scale = np.sqrt(abs(np.linalg.det(matrix[:, :2])))
    if scale < 0.5:  # average before shrinking, or fine texture would flicker
        sprite = cv2.resize(sprite, None, fx=2 * scale, fy=2 * scale, interpolation=cv2.INTER_AREA)
        ratio = np.array([width / sprite.shape[1], height / sprite.shape[0]])
        matrix = np.column_stack([matrix[:, :2] * ratio, matrix[:, 2]])
    local = matrix - np.array([[0, 0, left], [0, 0, top]])
    warped = cv2.warpAffine(sprite, local, (right - left, bottom - top), flags=cv2.INTER_LINEAR)
    region = layer[top:bottom, left:right]
    region *= 1 - warped[..., 3:]
    region += warped


def _with_shadow(stage: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """The stage with the figure's soft shadow, a little to the right and below."""
    height = alpha.shape[0]
    shift = np.array([[1, 0, 0.016 * height], [0, 1, 0.012 * height]], np.float32)
    soft = cv2.GaussianBlur(alpha, (0, 0), 0.012 * height)
    shadow = cv2.warpAffine(soft, shift, alpha.shape[::-1])
    return stage * (1 - SHADOW * shadow[..., None])


def _box(alpha: np.ndarray) -> np.ndarray:
    """Box of the covered pixels, xyxy in 0..1; zeros where there are none."""
    rows, columns = np.nonzero(alpha > 0.5)
    if not len(rows):
        return np.zeros(4, np.float32)
    height, width = alpha.shape
    box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    return (np.array(box) / (width, height, width, height)).astype(np.float32)
