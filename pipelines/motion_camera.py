"""Poses in pictures from motion in space: random people, cameras, frames and detectors.

Everything about an example follows from its sample number; batches are computed at once.
Shapes: B examples, T frames, N = 18 joints. Points are isotropic (`animator.keypoints`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from animator.keypoints import KEYPOINT_NAMES, LEFT_RIGHT, LIMBS, NUM_KEYPOINTS
from pipelines.draws import between, between_logs, normals, uniforms
from pipelines.motion import MotionStore

Range = tuple[float, float]

EDGE = 0.02  # of a frame's side: people kept in the frame stay this far inside
_PERSON, _DETECTOR, _OTHER_PERSON = 0, 1, 3  # streams of random numbers
# One factor for each of these: left and right limbs are of equal length.
_BONES = ("shoulder", "elbow", "wrist", "hip", "knee", "ankle", "nose", "eye")
_BONES_OF_EAR = _BONES.index("eye")
_NECK = KEYPOINT_NAMES.index("neck")
# Parts that detectors lose as a whole: arms, legs, face.
_PARTS = ((3, 4), (6, 7), (9, 10), (12, 13), (0, 14, 15, 16, 17))


@dataclass(frozen=True, kw_only=True)
class CameraConfig:
    """How clips of poses are drawn from motion. Ranges are (from, to)."""

    span: Range = (2.0, 60.0)  # seconds from a clip's first frame to its last, log-uniform
    balance: float = 1.0  # a sequence's chance goes with its length to this power
    # camera
    yaw: Range = (-180.0, 180.0)  # degrees round the person; at 0 it is seen from the front
    turn: Range = (0.0, 0.0)  # degrees that the camera goes round during a clip
    pitch: Range = (-10.0, 25.0)  # degrees; above 0 the camera looks down
    roll: Range = (-3.0, 3.0)  # degrees
    distance: Range = (2.5, 8.0)  # metres, log-uniform; the lens follows from the framing
    # frame
    aspect: Range = (9 / 16, 16 / 9)  # width over height, log-uniform
    strip: Range = (0.0, 1.0)  # share of the frame's width that the person has
    full_body: float = 0.6  # chance that the whole body is framed
    body: Range = (0.2, 0.9)  # else: share of the body, from the head down, that is framed
    fill: Range = (0.45, 0.95)  # share of the frame's height that it takes
    walk: float = 0.15  # chance that a person may walk through the frame and leave it
    travel: float = 0.06  # else: largest deviation of its centre, of the longer side
    # person
    limbs: float = 0.08  # deviation of the ln lengths of limbs
    other_person: float = 0.25  # chance that the reference has limbs of its own
    mirror: float = 0.5  # chance that a person is mirrored
    # detector
    perfect: float = 0.3  # chance that nothing is hidden and nothing is noisy
    hide_joints: float = 0.1  # chance that a joint is missing in a frame
    hide_parts: float = 0.08  # chance that an arm, a leg or the face is missing in a clip
    noise: float = 0.008  # deviation in each direction, of the person's height

    def __post_init__(self) -> None:
        for name in ("span", "distance", "aspect", "body", "fill"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} is {low},{high}, expected two numbers above 0 in order.")
        chances = "full_body", "walk", "other_person", "mirror", "perfect", "hide_joints"
        for name in (*chances, "hide_parts"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a chance in 0..1.")
        for name in ("travel", "limbs", "noise"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 or more.")
        if not 0 <= self.strip[0] < self.strip[1] <= 1:
            raise ValueError(f"strip is {self.strip}, expected a part of 0,1.")


# Whole people, every joint visible and kept in the frame, who hardly leave their place, over clips
# as long as the published training videos.
FULL_BODIES = CameraConfig(
    span=(60.0, 60.0), full_body=1.0, fill=(0.6, 0.95), walk=0.0, perfect=1.0, other_person=0.0
)


class PoseClips(NamedTuple):
    """Clips of poses."""

    points: Tensor  # (B, T, N, 2), where the joints are
    observed: Tensor  # (B, T, N, 2), where a detector finds them
    score: Tensor  # (B, T, N), its confidence; 0 where it does not
    inside: Tensor  # (B, T, N), whether the joint is in the frame
    size: Tensor  # (B, 2), height and width of the frame, of its longer side


class _Drawn(NamedTuple):
    """The numbers behind one batch; each `(B,)` but the last two."""

    sequence: Tensor
    start: Tensor
    span: Tensor
    yaw: Tensor
    turn: Tensor
    pitch: Tensor
    roll: Tensor
    distance: Tensor
    aspect: Tensor
    full_body: Tensor
    body: Tensor
    fill: Tensor
    walk: Tensor
    place_x: Tensor
    place_y: Tensor
    mirror: Tensor
    perfect: Tensor
    limbs: Tensor  # (B, 8)
    other_limbs: Tensor  # (B, 8), of the reference
    parts: Tensor  # (B, 5)


class PoseSampler:
    """Draws clips of poses from motion.

    Args:
        seed: with a sample number it decides everything about an example.
    """

    def __init__(self, store: MotionStore, config: CameraConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.joints = torch.cat([torch.from_numpy(m.joints) for m in store.motions])
        lengths = torch.tensor([len(motion.joints) for motion in store.motions])
        self.lengths = lengths
        self.first = lengths.cumsum(0) - lengths
        self.fps = torch.tensor([motion.fps for motion in store.motions])
        share = lengths.double() ** config.balance
        self.share = (share.cumsum(0) / share.sum()).float()
        self.parents, self.paths, self.kinds = _tree()

    def draw(
        self,
        samples: Sequence[int],
        num_frames: int,
        *,
        keep: Tensor | None = None,
        reference: Tensor | None = None,
        sequences: Tensor | None = None,
        in_pairs: bool = False,
    ) -> PoseClips:
        """The clips of these sample numbers.

        Args:
            num_frames: frames of a clip, evenly over its span; at least 2.
            keep: the frames to return, `(B, K)`; all of them by default. Framing and travel are
                those of the whole clip.
            reference: the frame of each clip, `(B,)`, that may be of a person with other limbs.
            sequences: the sequence of each clip, `(B,)`; drawn by default.
            in_pairs: every second frame is the one that follows in the motion, `num_frames` is
                even, and what is said of frames holds for pairs.
        """
        drawn = self._numbers(samples, sequences)
        joints = self._joints(drawn, num_frames, in_pairs)
        limbs = drawn.limbs[:, None].expand(-1, num_frames, -1)
        if reference is not None:
            of_reference = torch.arange(num_frames) == reference[:, None]
            limbs = torch.where(of_reference[..., None], drawn.other_limbs[:, None], limbs)
        shapes = self._project(_with_limbs(joints, limbs, self), drawn)
        shapes = torch.where(
            (drawn.mirror < self.config.mirror)[:, None, None, None],
            shapes[:, :, LEFT_RIGHT] * shapes.new_tensor([-1, 1]),
            shapes,
        )
        half = _half_frames(drawn.aspect)
        points, height = self._frame(shapes, drawn, half)
        if keep is not None:
            points = points.gather(1, keep[:, :, None, None].expand(-1, -1, NUM_KEYPOINTS, 2))
        return self._detect(samples, points, height, half, drawn)

    def _numbers(self, samples: Sequence[int], sequences: Tensor | None) -> _Drawn:
        config = self.config
        u = uniforms(self.seed, samples, 32, _PERSON).unbind(1)
        other = uniforms(self.seed, samples, 1 + len(_BONES), _OTHER_PERSON)
        if sequences is None:
            sequences = torch.searchsorted(self.share, u[0].contiguous()).clamp_max(
                len(self.share) - 1
            )
        limbs = normals(torch.stack(u[17:25], 1)).clamp(-2.5, 2.5) * config.limbs
        other_limbs = normals(other[:, 1:]).clamp(-2.5, 2.5) * config.limbs
        other_limbs = torch.where(other[:, :1] < config.other_person, other_limbs, limbs)
        return _Drawn(
            sequence=sequences,
            start=u[1],
            span=between_logs(u[2], config.span),
            yaw=between(u[3], config.yaw),
            turn=between(u[4], config.turn),
            pitch=between(u[5], config.pitch),
            roll=between(u[6], config.roll),
            distance=between_logs(u[7], config.distance),
            aspect=between_logs(u[8], config.aspect),
            full_body=u[9],
            body=between(u[10], config.body),
            fill=between(u[11], config.fill),
            walk=u[12],
            place_x=2 * u[13] - 1,
            place_y=2 * u[14] - 1,
            mirror=u[15],
            perfect=u[16],
            limbs=limbs.exp(),
            other_limbs=other_limbs.exp(),
            parts=torch.stack(u[25:30], 1),
        )

    def _joints(self, drawn: _Drawn, num_frames: int, in_pairs: bool) -> Tensor:
        """Joints in space, `(B, T, N, 3)`."""
        length = self.lengths[drawn.sequence]
        last = (length - 1).float()
        span = torch.minimum(drawn.span * self.fps[drawn.sequence], last)
        start = drawn.start * (last - span)
        steps = torch.linspace(0, 1, num_frames // 2 if in_pairs else num_frames)
        frames = (start[:, None] + span[:, None] * steps).round().long()
        if in_pairs:
            frames = torch.stack([frames, frames + 1], -1).flatten(1)
        frames = torch.minimum(frames, length[:, None] - 1)
        return self.joints[self.first[drawn.sequence][:, None] + frames]

    def _project(self, joints: Tensor, drawn: _Drawn) -> Tensor:
        """Joints in space to points on a screen, `(B, T, N, 2)`, in no unit yet."""
        x, y, z = (joints - joints.mean((1, 2), keepdim=True)).unbind(-1)
        # Where the person faces: left to right shoulder, across the vertical, at mid-clip.
        left = (joints[:, :, 5] - joints[:, :, 2]).mean(1)
        facing = torch.atan2(-left[:, 2], left[:, 0])
        steps = torch.linspace(-0.5, 0.5, joints.shape[1])
        turned = torch.deg2rad(drawn.yaw[:, None] + drawn.turn[:, None] * steps) - facing[:, None]
        cos, sin = turned.cos()[..., None], turned.sin()[..., None]
        x, z = x * cos + z * sin, z * cos - x * sin
        pitch = torch.deg2rad(drawn.pitch)[:, None, None]
        y, z = y * pitch.cos() - z * pitch.sin(), y * pitch.sin() + z * pitch.cos()
        # Who walks towards the camera does not walk through it.
        distance = torch.maximum(drawn.distance, 1.0 + 1.2 * z.amax((1, 2)))[:, None, None]
        flat = torch.stack([x, -y], -1) * (distance / (distance - z))[..., None]
        roll = torch.deg2rad(drawn.roll)[:, None, None]
        return torch.stack(
            [
                flat[..., 0] * roll.cos() - flat[..., 1] * roll.sin(),
                flat[..., 0] * roll.sin() + flat[..., 1] * roll.cos(),
            ],
            -1,
        )

    def _frame(self, shapes: Tensor, drawn: _Drawn, half: Tensor) -> tuple[Tensor, Tensor]:
        """Points in the frame, and the person's height in it `(B,)`."""
        config = self.config
        full = drawn.full_body < config.full_body
        walks = drawn.walk < config.walk
        body = torch.where(full, torch.ones_like(drawn.body), drawn.body)
        tall = (shapes[..., 1].amax(2) - shapes[..., 1].amin(2)).mean(1).clamp_min(0.1)
        scale = drawn.fill * 2 * half[:, 1] / (body * tall)
        points = shapes * scale[:, None, None, None]
        points = points - (self._excess(points) * ~walks[:, None, None])[:, :, None]
        room = torch.stack([half[:, 0] * (config.strip[1] - config.strip[0]), half[:, 1]], 1)
        room = room * (1 - 2 * EDGE)
        low, high = points.amin((1, 2)), points.amax((1, 2))
        fit = (2 * room / (high - low).clamp_min(1e-6)).amin(1).clamp_max(1)
        fit = torch.where(full & ~walks, fit, torch.ones_like(fit))
        points = points * fit[:, None, None, None]
        low, high = low * fit[:, None], high * fit[:, None]
        place = torch.stack([drawn.place_x, drawn.place_y], 1)
        kept = place * (room - (high - low) / 2) - (high + low) / 2
        # Otherwise the head lies in the upper part, the body about the middle.
        head = points[..., 1].amin(2).mean(1)
        top = half[:, 1] * (-1 + 0.3 * (1 + drawn.place_y) / 2 + 2 * EDGE)
        middle = points[..., 0].mean((1, 2))
        cut = torch.stack([0.4 * room[:, 0] * drawn.place_x - middle, top - head], 1)
        shift = torch.where((full & ~walks)[:, None], kept, cut)
        shift[:, 0] += half[:, 0] * (config.strip[0] + config.strip[1] - 1)
        return points + shift[:, None, None], scale * fit * tall

    def _excess(self, points: Tensor) -> Tensor:
        """What of the travel in each frame is too much, `(B, T, 2)`."""
        centre = points.mean(2)
        travel = centre - centre.mean(1, keepdim=True)
        deviation = travel.square().sum(-1).mean(1).sqrt().clamp_min(1e-6)
        return travel * (1 - (self.config.travel / deviation).clamp_max(1))[:, None, None]

    def _detect(
        self,
        samples: Sequence[int],
        points: Tensor,
        height: Tensor,
        half: Tensor,
        drawn: _Drawn,
    ) -> PoseClips:
        config = self.config
        inside = (points.abs() <= half[:, None, None]).all(-1)
        size = torch.stack([2 * half[:, 1], 2 * half[:, 0]], 1)
        if config.perfect >= 1 or not (config.noise or config.hide_joints or config.hide_parts):
            return PoseClips(points, points, inside.float(), inside, size)
        batch, frames = points.shape[:2]
        count = frames * NUM_KEYPOINTS
        u = uniforms(self.seed, samples, 4 * count, _DETECTOR)
        u = u.reshape(batch, 4, frames, NUM_KEYPOINTS)
        perfect = (drawn.perfect < config.perfect)[:, None, None]
        doubt = torch.where(perfect, torch.zeros_like(u[:, 0]), u[:, 0])
        # Noise grows with the person in the picture, and the score falls with the noise.
        spread = config.noise * (0.5 + doubt) * height[:, None, None] * ~perfect
        noise = normals(u[:, 1:3]).movedim(1, -1) * spread[..., None]
        lost = u[:, 3] < config.hide_joints
        for part, chance in zip(_PARTS, drawn.parts.unbind(1), strict=True):
            lost[:, :, part] |= (chance < config.hide_parts)[:, None, None]
        score = (1 - 0.6 * doubt) * inside * (~lost | perfect)
        return PoseClips(points, points + noise, score, inside, size)


def _half_frames(aspect: Tensor) -> Tensor:
    """Half width and half height `(B, 2)` of frames of this shape, of their longer side."""
    return 0.5 * torch.stack([aspect.clamp_max(1), (1 / aspect).clamp_max(1)], 1)


def _tree() -> tuple[Tensor, Tensor, Tensor]:
    """The skeleton as a tree from the neck: parents `(N,)`, paths `(N, N)`, kinds of bones `(N,)`.

    Bone j ends at joint j; a joint is the neck plus the bones on its path.
    """
    parents = torch.arange(NUM_KEYPOINTS)
    paths = torch.zeros(NUM_KEYPOINTS, NUM_KEYPOINTS)
    for parent, child in LIMBS:
        parents[child] = parent
    for joint in range(NUM_KEYPOINTS):
        step = joint
        while step != _NECK:
            paths[joint, step] = 1
            step = int(parents[step])
    kinds = torch.zeros(NUM_KEYPOINTS, dtype=torch.long)
    for joint, name in enumerate(KEYPOINT_NAMES):
        part = name.rsplit("_", 1)[-1]
        kinds[joint] = _BONES.index(part) if part in _BONES else _BONES_OF_EAR
    return parents, paths, kinds


def _with_limbs(joints: Tensor, factors: Tensor, sampler: PoseSampler) -> Tensor:
    """People with limbs of other lengths: joints `(B, T, N, 3)`, factors `(B, T, 8)`."""
    bones = (joints - joints[:, :, sampler.parents]) * factors[:, :, sampler.kinds, None]
    return joints[:, :, _NECK, None] + torch.einsum("jk,btkc->btjc", sampler.paths, bones)
