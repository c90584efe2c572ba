"""Pairs of poses to learn alignment from: out of curated shards, or out of motion capture.

A pair is two frames of one clip; the second is misaligned by a random similarity (eq. 12).
Shapes: B batch, T frames, N = 18 keypoints of the body. Coordinates are isotropic
(`animator.keypoints`).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from animator.keypoints import (
    BODY,
    VISIBLE,
    SimilarityRange,
    misalignment,
    random_similarity,
    to_isotropic,
)
from animator.similarity import Similarity, apply
from pipelines.clips import ClipStore
from pipelines.draws import uniforms
from pipelines.motion import MotionStore
from pipelines.motion_camera import CameraConfig, PoseSampler
from pipelines.order import ClipOrder
from training.task import Batch, sample_generator, stack

_CHOICE = 2  # stream of random numbers; the sampler has those before it


class PosePairs(Protocol):
    """Where training pairs come from."""

    fingerprint: str
    num_samples: int  # of one epoch

    def batch(self, samples: Sequence[int]) -> Batch:
        """Pairs of these sample numbers, each a pure function of its number.

        reference: `(B, N, 2)`, as a detector finds it
        driven: `(B, N, 2)`, misaligned, as a detector finds it
        weight: confidence that a joint is seen in both, `(B, N)`
        moved, target: `(B, N, 2)`, driven pose without noise, misaligned and as it was
        visible: 1 where a joint counts, `(B, N)`
        """
        ...

    def about(self) -> Mapping[str, Any]:
        """What to record with a model that learned from them."""
        ...


class ShardPairs:
    """Pairs from the poses of curated clips.

    Args:
        holdout_tail: share of each clip, at its end, that is never drawn.
        hide_joints: chance that a joint is hidden, as detectors miss them.
        joint_noise: deviation in each direction, of the longer side.
    """

    def __init__(
        self,
        clips: ClipStore,
        seed: int,
        *,
        limits: SimilarityRange,
        holdout_tail: float,
        hide_joints: float,
        joint_noise: float,
    ):
        self.clips = clips
        self.seed = seed
        self.limits = limits
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
            points = to_isotropic(torch.tensor(track.keypoints[:kept, 0, BODY]), width, height)
            score = torch.tensor(track.score[:kept, 0, BODY])
            threshold = float(self.clips.meta(index).get("pose", {}).get("threshold", VISIBLE))
            self._poses[index] = points.float(), score.float() * (score >= threshold)
        return self._poses[index]

    def batch(self, samples: Sequence[int]) -> Batch:
        return stack([self._example(sample) for sample in samples])

    def _example(self, sample: int) -> dict[str, Tensor]:
        generator = sample_generator(self.seed, sample)
        points, score = self.poses(self.order.clip(sample))
        first, second = torch.randint(len(points), (2,), generator=generator).tolist()
        weight = torch.minimum(score[first], score[second])
        weight = weight * (torch.rand(len(weight), generator=generator) >= self.hide_joints)
        noise = torch.randn(2, *points.shape[1:], generator=generator) * self.noise
        misalign = random_similarity(generator, 1, self.limits)
        moved = apply(Similarity(*misalign), points[second][None])[0]
        return {
            "reference": points[first] + noise[0],
            # The detector's noise scales with the person in the picture.
            "driven": moved + noise[1] * misalign.scale,
            "weight": weight,
            "moved": moved,
            "target": points[second],
            "visible": (score[second] > 0).float(),
        }


class MotionPairs:
    """Pairs from motion capture, seen by random cameras; whole batches at once.

    Args:
        num_frames: frames that stand for a clip; a pair is two of them.
    """

    def __init__(
        self,
        store: MotionStore,
        seed: int,
        *,
        limits: SimilarityRange,
        camera: CameraConfig,
        num_frames: int,
    ):
        if num_frames < 2:
            raise ValueError(
                f"task.clip_frames is {num_frames}, expected at least 2: a pair is two frames."
            )
        self.store = store
        self.seed = seed
        self.limits = limits
        self.num_frames = num_frames
        self.sampler = PoseSampler(store, camera, seed)
        self.fingerprint = store.fingerprint
        self.num_samples = store.num_frames

    def about(self) -> Mapping[str, Any]:
        return {"data": self.fingerprint, "motion": dict(self.store.licences)}

    def batch(self, samples: Sequence[int]) -> Batch:
        chance = uniforms(self.seed, samples, 8, _CHOICE)
        count = self.num_frames
        first = (chance[:, 4] * count).long()
        second = (first + 1 + (chance[:, 5] * (count - 1)).long()) % count
        clips = self.sampler.draw(samples, count, keep=torch.stack([first, second], 1))
        misalign = misalignment(chance[:, :4], self.limits)
        return {
            "reference": clips.observed[:, 0],
            "driven": apply(misalign, clips.observed[:, 1]),
            "weight": clips.score.amin(1),
            "moved": apply(misalign, clips.points[:, 1]),
            "target": clips.points[:, 1],
            "visible": clips.inside[:, 1].float(),
        }
