"""Keypoints of a person: order, parts, coordinates, visibility, random misalignment.

A person has K = 18 keypoints, the body in COCO-18 order, or K = 128: the body, 21 of each hand and
68 of the face, where the pose backend gives them. The body alone decides whether somebody is seen
and how poses are aligned.

Shapes: K keypoints, B batch. Stored keypoints are 0..1 of the frame; the similarity mathematics
happens in isotropic coordinates: the origin is the frame's centre, the unit is its longer side, y
points down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

# Whoever only reads keypoints, such as the processes that decode videos, has no need of torch.
if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from animator.similarity import Similarity

KEYPOINT_NAMES = (
    "nose",
    "neck",
    "right_shoulder",
    "right_elbow",
    "right_wrist",
    "left_shoulder",
    "left_elbow",
    "left_wrist",
    "right_hip",
    "right_knee",
    "right_ankle",
    "left_hip",
    "left_knee",
    "left_ankle",
    "right_eye",
    "left_eye",
    "right_ear",
    "left_ear",
)
NUM_KEYPOINTS = len(KEYPOINT_NAMES)

# The parts of a whole person; each part keeps COCO-WholeBody's order.
BODY = slice(0, NUM_KEYPOINTS)
LEFT_HAND = slice(BODY.stop, BODY.stop + 21)
RIGHT_HAND = slice(LEFT_HAND.stop, LEFT_HAND.stop + 21)
FACE = slice(RIGHT_HAND.stop, RIGHT_HAND.stop + 68)
WHOLE_BODY = FACE.stop
KEYPOINT_COUNTS = (NUM_KEYPOINTS, WHOLE_BODY)

# Drawing order and pairs of OpenPose's body model.
LIMBS = (
    (1, 2),
    (1, 5),
    (2, 3),
    (3, 4),
    (5, 6),
    (6, 7),
    (1, 8),
    (8, 9),
    (9, 10),
    (1, 11),
    (11, 12),
    (12, 13),
    (1, 0),
    (0, 14),
    (14, 16),
    (0, 15),
    (15, 17),
)
# Four bones a finger, from the wrist (0) through the thumb (1-4) to the little finger (17-20).
HAND_EDGES = tuple(
    (0 if bone == 0 else first + bone - 1, first + bone)
    for first in (1, 5, 9, 13, 17)
    for bone in range(4)
)
# The same joint of the other side; in a mirrored picture it has this place in the order.
LEFT_RIGHT = [
    KEYPOINT_NAMES.index(name.replace("left", "~").replace("right", "left").replace("~", "right"))
    for name in KEYPOINT_NAMES
]
VISIBLE = 0.3  # DWPose's threshold: a joint scored below it is missing

Array = TypeVar("Array", np.ndarray, "Tensor")


def to_isotropic(keypoints: Array, width: float, height: float) -> Array:
    """`(..., 2)` in 0..1 of a frame to isotropic coordinates."""
    longer = max(width, height)
    scale = [width / longer, height / longer]
    if isinstance(keypoints, np.ndarray):
        return (keypoints - 0.5) * np.asarray(scale, keypoints.dtype)
    return (keypoints - 0.5) * keypoints.new_tensor(scale)


def from_isotropic(points: Array, width: float, height: float) -> Array:
    """Isotropic coordinates `(..., 2)` to 0..1 of a frame."""
    longer = max(width, height)
    scale = [longer / width, longer / height]
    if isinstance(points, np.ndarray):
        return points * np.asarray(scale, points.dtype) + 0.5
    return points * points.new_tensor(scale) + 0.5


@dataclass(frozen=True, kw_only=True)
class SimilarityRange:
    """Ranges of a random misalignment: a similarity about the frame's centre."""

    scale: float = 2.0  # log-uniform in 1/scale..scale
    rotation: float = 30.0  # degrees, uniform in -rotation..rotation
    shift: float = 0.25  # of the longer side, uniform in each direction

    def __post_init__(self) -> None:
        if self.scale < 1 or self.rotation < 0 or self.shift < 0:
            raise ValueError(
                f"Got scale {self.scale}, rotation {self.rotation}, shift {self.shift}, but "
                "expected scale of at least 1 and the others not negative."
            )


def misalignment(uniform: Tensor, limits: SimilarityRange) -> Similarity:
    """The misalignments that four numbers of 0..1 each, `(B, 4)`, stand for."""
    import torch

    from animator.similarity import Similarity

    uniform = uniform * 2 - 1
    angle = torch.deg2rad(uniform[:, 1] * limits.rotation)
    return Similarity(
        scale=limits.scale ** uniform[:, 0],
        cos=angle.cos(),
        sin=angle.sin(),
        shift=uniform[:, 2:] * limits.shift,
    )


def random_similarity(
    generator: torch.Generator, batch: int, limits: SimilarityRange
) -> Similarity:
    """Misalignments drawn from the given ranges; fields of shape `(B,)` and `(B, 2)`."""
    import torch

    return misalignment(torch.rand(batch, 4, generator=generator), limits)
