"""Built-in motion: joint-angle curves for a jointed figure and the keypoints they give.

Shapes: T frames, 18 keypoints in COCO order, x to the right and y down in 0..1 of the frame.
Angles are radians from hanging straight down, positive away from the body on either side.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np

SIDES = (-1.0, 1.0)  # the figure faces the viewer: its right is on the left of the picture


@dataclass(frozen=True, kw_only=True)
class Body:
    """Proportions as fractions of the standing height, soles to crown."""

    upper_arm: float = 0.155
    forearm: float = 0.140
    torso: float = 0.275
    shoulders: float = 0.245
    hips: float = 0.130
    thigh: float = 0.190
    shin: float = 0.185
    sole: float = 0.045
    nose: float = 0.165  # above the neck point, which lies between the shoulders


@dataclass(frozen=True, kw_only=True)
class Angles:
    """One curve a joint, each (T,); `lift` in 0..1 raises a knee towards the viewer."""

    sway: np.ndarray  # sideways shift of the pelvis, fractions of the height
    lean: np.ndarray
    tilt: np.ndarray
    right_arm: np.ndarray
    right_elbow: np.ndarray
    left_arm: np.ndarray
    left_elbow: np.ndarray
    right_leg: np.ndarray
    right_knee: np.ndarray
    right_lift: np.ndarray
    left_leg: np.ndarray
    left_knee: np.ndarray
    left_lift: np.ndarray


REST = {"right_arm": 0.3, "left_arm": 0.3, "right_elbow": 0.1, "left_elbow": 0.1}


def _curves(num_frames: int, **given: np.ndarray | float) -> Angles:
    """Named curves over a resting stance."""
    values = {field.name: 0.0 for field in fields(Angles)} | {
        "right_leg": 0.1,
        "left_leg": 0.1,
        **REST,
        **given,
    }
    return Angles(**{name: np.broadcast_to(v, num_frames) for name, v in values.items()})


def _ease(phase: np.ndarray) -> np.ndarray:
    """0 → 1 → 0 once a cycle, with rest at both ends."""
    return 0.5 - 0.5 * np.cos(phase)


def _wave(phase: np.ndarray) -> Angles:
    up = _ease(phase) ** 0.5
    return _curves(
        len(phase),
        right_arm=0.3 + 1.7 * up,
        right_elbow=up * (0.65 + 0.45 * np.sin(4 * phase)),
        tilt=0.10 * np.sin(phase),
        lean=0.04 * np.sin(phase),
        left_arm=0.3 + 0.08 * np.sin(phase),
    )


def _raise_arms(phase: np.ndarray) -> Angles:
    up, late = _ease(phase), _ease(phase - 0.7)
    return _curves(
        len(phase),
        right_arm=0.25 + 2.4 * up,
        left_arm=0.25 + 2.4 * late,
        right_elbow=0.15 + 0.2 * up,
        left_elbow=0.15 + 0.2 * late,
        lean=0.05 * np.sin(phase),
    )


def _sway(phase: np.ndarray) -> Angles:
    side = np.sin(phase)
    return _curves(
        len(phase),
        sway=0.05 * side,
        lean=0.14 * side,
        tilt=-0.12 * side,
        right_arm=0.75 + 0.45 * side,
        left_arm=0.75 - 0.45 * side,
        right_elbow=0.35 - 0.2 * side,
        left_elbow=0.35 + 0.2 * side,
        right_leg=0.14 + 0.08 * side,
        left_leg=0.14 - 0.08 * side,
    )


def _squat(phase: np.ndarray) -> Angles:
    down = _ease(phase)
    return _curves(
        len(phase),
        right_leg=0.12 + 0.75 * down,
        left_leg=0.12 + 0.75 * down,
        right_knee=-0.95 * down,
        left_knee=-0.95 * down,
        right_arm=0.3 + 1.15 * down,
        left_arm=0.3 + 1.15 * down,
    )


def _march(phase: np.ndarray) -> Angles:
    step = np.sin(phase)
    right, left = np.clip(step, 0, 1) ** 1.5, np.clip(-step, 0, 1) ** 1.5
    return _curves(
        len(phase),
        right_lift=right,
        left_lift=left,
        right_leg=0.08 + 0.12 * right,
        left_leg=0.08 + 0.12 * left,
        right_arm=0.25 + 0.35 * left,
        left_arm=0.25 + 0.35 * right,
        right_elbow=0.2 + 1.2 * left,
        left_elbow=0.2 + 1.2 * right,
        sway=0.015 * step,
    )


def _dance(phase: np.ndarray) -> Angles:
    beat, half = np.sin(2 * phase), np.sin(phase)
    return _curves(
        len(phase),
        sway=0.05 * half,
        lean=0.10 * half,
        tilt=0.14 * beat,
        right_arm=1.3 + 0.9 * half,
        left_arm=1.3 - 0.9 * half,
        right_elbow=0.5 + 0.5 * beat,
        left_elbow=0.5 - 0.5 * beat,
        right_leg=0.16 + 0.16 * _ease(2 * phase),
        left_leg=0.16 + 0.16 * _ease(2 * phase + np.pi),
        right_knee=-0.25 * _ease(2 * phase),
        left_knee=-0.25 * _ease(2 * phase + np.pi),
    )


MOTIONS: dict[str, Callable[[np.ndarray], Angles]] = {
    "wave": _wave,
    "raise": _raise_arms,
    "sway": _sway,
    "squat": _squat,
    "march": _march,
    "dance": _dance,
}


def perform(
    motion: str,
    num_frames: int,
    *,
    fps: float,
    aspect: float,
    seed: int = 0,
    body: Body | None = None,
    height: float = 0.78,
    centre: float = 0.5,
    floor: float = 0.94,
) -> np.ndarray:
    """Keypoints (T, 18, 2) in 0..1 of a figure performing `motion` on the spot.

    `aspect` is the frame's width over its height; `height`, `centre` and `floor` place the standing
    figure in fractions of the frame. The seed chooses phase, tempo and a slow drift, smoothly.
    Raises ValueError for a motion that does not exist.
    """
    if motion not in MOTIONS:
        raise ValueError(f"motion {motion!r} does not exist; choose one of {', '.join(MOTIONS)}")
    rng = np.random.default_rng(seed)
    seconds = np.arange(num_frames) / fps
    tempo = rng.uniform(0.38, 0.52)  # cycles a second
    phase = 2 * np.pi * (tempo * seconds + rng.uniform()) + 0.4 * np.sin(
        2 * np.pi * 0.13 * seconds + rng.uniform(0, 2 * np.pi)
    )
    points = body_keypoints(MOTIONS[motion](phase), body or Body())
    drift = 0.015 * np.sin(2 * np.pi * 0.2 * seconds + rng.uniform(0, 2 * np.pi))
    x = centre + (points[..., 0] + drift[:, None]) * height / aspect
    y = floor + points[..., 1] * height
    return np.stack([x, y], axis=-1).astype(np.float32)


def body_keypoints(angles: Angles, body: Body) -> np.ndarray:
    """Forward kinematics: (T, 18, 2) in heights, x from the middle, y from the floor (up < 0)."""
    points = np.zeros((len(angles.lean), 18, 2))
    lean = angles.lean
    pelvis = np.stack([angles.sway, np.zeros_like(lean)], axis=-1)
    neck = pelvis - body.torso * _down(lean)
    across = np.stack([np.cos(lean), -np.sin(lean)], axis=-1)
    points[:, 1] = neck
    limbs = (
        ("right_arm", "right_elbow", None, (2, 3, 4), neck, body.shoulders),
        ("left_arm", "left_elbow", None, (5, 6, 7), neck, body.shoulders),
        ("right_leg", "right_knee", "right_lift", (8, 9, 10), pelvis, body.hips),
        ("left_leg", "left_knee", "left_lift", (11, 12, 13), pelvis, body.hips),
    )
    for upper, bend, lift, (root, middle, end), origin, width in limbs:
        side = SIDES[upper.startswith("left")]
        lengths = (body.thigh, body.shin) if lift else (body.upper_arm, body.forearm)
        # Arms hang from the leaning trunk; legs carry it and stay with the floor.
        base = np.zeros_like(lean) if lift else lean
        raised = getattr(angles, lift) if lift else np.zeros_like(lean)
        first = base + side * getattr(angles, upper)
        second = first + side * getattr(angles, bend)
        points[:, root] = origin + side * width / 2 * across
        upper_length = lengths[0] * (1 - 0.5 * raised)  # a knee towards the viewer looks shorter
        lower_length = lengths[1] * (1 - 0.25 * raised)
        points[:, middle] = points[:, root] + upper_length[:, None] * _down(first)
        points[:, end] = points[:, middle] + lower_length[:, None] * _down(second)
    _add_head(points, neck, lean + angles.tilt, body)
    lowest = points[:, [10, 13], 1].max(axis=1, keepdims=True)
    points[..., 1] -= lowest + body.sole  # the lower foot stands on the floor
    return points


def _add_head(points: np.ndarray, neck: np.ndarray, angle: np.ndarray, body: Body) -> None:
    """The five facial points, rigid about the neck."""
    unit = body.nose
    offsets = {
        0: (0.0, 1.05),
        14: (-0.19, 1.24),
        15: (0.19, 1.22),
        16: (-0.45, 1.17),
        17: (0.46, 1.14),
    }
    up = -_down(angle)
    across = np.stack([np.cos(angle), -np.sin(angle)], axis=-1)
    for index, (x, y) in offsets.items():
        points[:, index] = neck + unit * (x * across + y * up)


def _down(angle: np.ndarray) -> np.ndarray:
    """Unit vectors (T, 2) pointing down, turned by `angle` (positive to the right)."""
    return np.stack([np.sin(angle), np.cos(angle)], axis=-1)
