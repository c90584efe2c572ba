"""Poses to learn alignment from: out of curated shards, or out of motion capture.

An example is some frames of one clip: the first is the reference, the others are misaligned by
one random similarity (eq. 12).
Shapes: B batch, F driven frames, N = 18 keypoints of the body. Coordinates are isotropic
(`animator.keypoints`).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from animator.keypoints import (
    BODY,
    VISIBLE,
    SimilarityRange,
    misalignment,
    to_isotropic,
)
from animator.similarity import Similarity, apply, identity
from pipelines.clips import ClipStore
from pipelines.draws import uniforms
from pipelines.motion import MotionStore
from pipelines.motion_camera import CameraConfig, PoseSampler
from pipelines.order import ClipOrder
from training.task import Batch, sample_generator, stack

_CHOICE = 2  # stream of random numbers; the sampler has those before it


class MisalignmentShares(NamedTuple):
    """Shares of the examples that are misaligned otherwise than the limits say."""

    aligned: float = 0.0  # not at all
    wide: float = 0.0  # up to twice as much


class PosePairs(Protocol):
    """Where examples come from."""

    fingerprint: str
    num_samples: int  # of one epoch

    def batch(self, samples: Sequence[int]) -> Batch:
        """Examples of these sample numbers, each a pure function of its number.

        reference: `(B, N, 2)`, as a detector finds it
        driven: `(B, F, N, 2)`, misaligned, as a detector finds it
        weight: confidence that a joint is seen in both, `(B, F, N)`
        moved, target: `(B, F, N, 2)`, driven pose without noise, misaligned and as it was
        visible: 1 where a joint counts, `(B, F, N)`
        frame: height and width of the frame, of its longer side, `(B, 2)`
        """
        ...

    def about(self) -> Mapping[str, Any]:
        """What to record with a model that learned from them."""
        ...


class ShardPairs:
    """Pairs from the poses of curated clips.

    Args:
        num_driven: driven frames of an example.
        limits: of the misalignment.
        shares: of examples with none of it and with more.
        holdout_tail: share of each clip, at its end, that is never drawn.
        hide_joints: chance that a joint is hidden, as detectors miss them.
        joint_noise: deviation in each direction, of the longer side.
        held_out: draw from that share alone, instead of from the rest.
    """

    def __init__(
        self,
        clips: ClipStore,
        seed: int,
        *,
        num_driven: int,
        limits: SimilarityRange,
        shares: MisalignmentShares,
        holdout_tail: float,
        hide_joints: float,
        joint_noise: float,
        held_out: bool = False,
    ):
        self.clips = clips
        self.held_out = held_out
        self.seed = seed
        self.num_driven, self.limits, self.shares = num_driven, limits, shares
        self.holdout_tail, self.hide_joints, self.noise = holdout_tail, hide_joints, joint_noise
        self.fingerprint = clips.fingerprint
        self.num_samples = len(clips)
        self.order = ClipOrder(len(clips), seed)
        self._poses: dict[int, tuple[Tensor, Tensor]] = {}

    def about(self) -> Mapping[str, Any]:
        return {"data": self.fingerprint}

    def poses(self, index: int) -> tuple[Tensor, Tensor]:
        """Isotropic joints `(T, N, 2)` and score `(T, N)` of a clip's main person."""
        if index not in self._poses:
            track = self.clips.pose(index)
            height, width = self.clips.size(index)
            kept = max(2, round(len(track.score) * (1 - self.holdout_tail)))
            part = slice(min(kept, len(track.score) - 1), None) if self.held_out else slice(kept)
            points = to_isotropic(torch.tensor(track.keypoints[part, 0, BODY]), width, height)
            score = torch.tensor(track.score[part, 0, BODY])
            threshold = float(self.clips.meta(index).get("pose", {}).get("threshold", VISIBLE))
            self._poses[index] = points.float(), score.float() * (score >= threshold)
        return self._poses[index]

    def batch(self, samples: Sequence[int]) -> Batch:
        return stack([self._example(sample) for sample in samples])

    def _example(self, sample: int) -> dict[str, Tensor]:
        generator = sample_generator(self.seed, sample)
        index = self.order.clip(sample)
        points, score = self.poses(index)
        chosen = torch.randint(len(points), (1 + self.num_driven,), generator=generator)
        first, driven = chosen[0], chosen[1:]
        weight = torch.minimum(score[first], score[driven])
        weight = weight * (torch.rand(weight.shape, generator=generator) >= self.hide_joints)
        noise = torch.randn(len(chosen), *points.shape[1:], generator=generator) * self.noise
        uniform = torch.rand(1, 5, generator=generator)
        misalign = _misalignment(uniform, self.limits, self.shares)
        moved = apply(misalign, points[driven])
        height, width = self.clips.size(index)
        return {
            "reference": points[first] + noise[0],
            # The detector's noise scales with the person in the picture.
            "driven": moved + noise[1:] * misalign.scale,
            "weight": weight,
            "moved": moved,
            "target": points[driven],
            "visible": (score[driven] > 0).float(),
            "frame": torch.tensor([height, width]) / max(height, width),
        }


class MotionPairs:
    """Pairs from motion capture, seen by random cameras; whole batches at once.

    Args:
        num_driven: driven frames of an example.
        limits: of the misalignment.
        shares: of examples with none of it and with more.
        num_frames: frames that stand for a clip; an example has some of them.
    """

    def __init__(
        self,
        store: MotionStore,
        seed: int,
        *,
        num_driven: int,
        limits: SimilarityRange,
        shares: MisalignmentShares,
        camera: CameraConfig,
        num_frames: int,
    ):
        if num_frames <= num_driven:
            raise ValueError(
                f"task.clip_frames is {num_frames}, expected more than the {num_driven} of "
                "task.driven_frames: one frame of a clip is the reference."
            )
        self.store = store
        self.seed = seed
        self.num_driven, self.limits, self.shares = num_driven, limits, shares
        self.num_frames = num_frames
        self.sampler = PoseSampler(store, camera, seed)
        self.fingerprint = store.fingerprint
        self.num_samples = store.num_frames

    def about(self) -> Mapping[str, Any]:
        return {"data": self.fingerprint, "motion": dict(self.store.licences)}

    def batch(self, samples: Sequence[int]) -> Batch:
        chance = uniforms(self.seed, samples, 5 + self.num_frames, _CHOICE)
        chosen = chance[:, 5:].argsort(1)[:, : 1 + self.num_driven]
        clips = self.sampler.draw(samples, self.num_frames, keep=chosen, reference=chosen[:, 0])
        misalign = _misalignment(chance[:, :5], self.limits, self.shares)
        misalign = Similarity(*(field[:, None] for field in misalign))
        return {
            "reference": clips.observed[:, 0],
            "driven": apply(misalign, clips.observed[:, 1:]),
            "weight": torch.minimum(clips.score[:, :1], clips.score[:, 1:]),
            "moved": apply(misalign, clips.points[:, 1:]),
            "target": clips.points[:, 1:],
            "visible": clips.inside[:, 1:].float(),
            "frame": clips.size,
        }


def _misalignment(
    uniform: Tensor, limits: SimilarityRange, shares: MisalignmentShares
) -> Similarity:
    """Misalignments that five numbers of 0..1 each, `(B, 5)`, stand for."""
    wide = SimilarityRange(
        scale=limits.scale**2, rotation=2 * limits.rotation, shift=2 * limits.shift
    )
    aligned, widely = uniform[:, 4] < shares.aligned, uniform[:, 4] > 1 - shares.wide

    def chosen(none: Tensor, usual: Tensor, more: Tensor) -> Tensor:
        shape = (-1, *[1] * (none.ndim - 1))
        usual = torch.where(widely.reshape(shape), more, usual)
        return torch.where(aligned.reshape(shape), none, usual)

    drawn = (misalignment(uniform[:, :4], each) for each in (limits, wide))
    nothing = identity((len(uniform),), uniform)
    return Similarity(*map(chosen, nothing, *drawn))
