"""The alignment block's training task: two frames of one clip, one of them misaligned (eq. 12).

Shapes: B batch, T frames, N = 18 keypoints of the body. Coordinates are isotropic
(`animator.keypoints`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from animator.alignment import AlignmentBlock
from animator.config import AlignmentConfig
from animator.keypoints import BODY, VISIBLE, SimilarityRange, random_similarity, to_isotropic
from animator.losses import alignment_loss
from animator.similarity import MIN_COMMON, Similarity, apply, fit
from animator.weights import save_model
from pipelines.clips import ClipStore
from pipelines.order import ClipOrder
from training.frames import open_clips
from training.task import Batch, sample_generator, stack


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """What the alignment block learns from, and how a training pair is drawn."""

    name: ClassVar[str] = "alignment"
    may_change: ClassVar[tuple[str, ...]] = ("shards",)

    shards: str = ""
    block: AlignmentConfig = field(default_factory=AlignmentConfig)
    misalignment: SimilarityRange = field(default_factory=SimilarityRange)
    holdout_tail: float = 0.0  # share of each clip, at its end, that is never trained on
    hide_joints: float = 0.1  # chance that a joint is hidden, as detectors miss them
    joint_noise: float = 0.003  # deviation in each direction, of the longer side

    def build_task(self, seed: int) -> "AlignTask":
        return AlignTask(self, open_clips(self.shards), seed)


class AlignTask:
    """Draws pairs of poses and computes eq. 12 on them."""

    name = "alignment"

    def __init__(self, config: AlignConfig, clips: ClipStore, seed: int):
        self.config = config
        self.seed = seed
        self.clips = clips
        self.fingerprint = clips.fingerprint
        self.num_samples = len(clips)
        self.order = ClipOrder(len(clips), seed)
        self._poses: dict[int, tuple[Tensor, Tensor]] = {}

    def build(self) -> nn.Module:
        return AlignmentBlock(self.config.block).train()

    def prepare(self, device: torch.device) -> None:
        pass

    def poses(self, index: int) -> tuple[Tensor, Tensor]:
        """Isotropic joints `(T, N, 2)` and score `(T, N)` of a clip's main person."""
        if index not in self._poses:
            track = self.clips.pose(index)
            height, width = self.clips.size(index)
            kept = max(2, round(len(track.score) * (1 - self.config.holdout_tail)))
            points = to_isotropic(torch.tensor(track.keypoints[:kept, 0, BODY]), width, height)
            score = torch.tensor(track.score[:kept, 0, BODY])
            threshold = float(self.clips.meta(index).get("pose", {}).get("threshold", VISIBLE))
            self._poses[index] = points.float(), score.float() * (score >= threshold)
        return self._poses[index]

    def batch(self, samples: Sequence[int]) -> Batch:
        return stack([self._example(sample) for sample in samples])

    def _example(self, sample: int) -> dict[str, Tensor]:
        config = self.config
        generator = sample_generator(self.seed, sample)
        points, score = self.poses(self.order.clip(sample))
        first, second = torch.randint(len(points), (2,), generator=generator).tolist()
        weight = torch.minimum(score[first], score[second])
        weight = weight * (torch.rand(len(weight), generator=generator) >= config.hide_joints)
        noise = torch.randn(2, *points.shape[1:], generator=generator) * config.joint_noise
        misalign = random_similarity(generator, 1, config.misalignment)
        moved = apply(Similarity(*misalign), points[second][None])[0]
        return {
            "reference": points[first] + noise[0],
            # The detector's noise scales with the person in the picture.
            "driven": moved + noise[1] * misalign.scale,
            "target": points[second],
            "weight": weight,
            "visible": (score[second] > 0).float(),
        }

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        reference, driven, weight = (batch[k] for k in ("reference", "driven", "weight"))
        # Pairs with too little in common teach nothing about the transform.
        visible = batch["visible"] * ((weight > 0).sum(1, keepdim=True) >= MIN_COMMON)
        learned = apply(model(reference, driven, weight), driven)
        with torch.no_grad():
            closed_form = apply(fit(driven, reference, weight), driven)
            baseline = alignment_loss(closed_form, batch["target"], visible)
            none = alignment_loss(driven, batch["target"], visible)
        numbers = {"distance_closed_form": baseline, "distance_none": none}
        return alignment_loss(learned, batch["target"], visible), numbers

    def save_model(self, state: dict[str, Tensor], folder: Path) -> None:
        about = {"trained_on": {"alignment": {"data": self.fingerprint}}}
        save_model(folder, alignment=(self.config.block, state), about=about)
