"""The alignment block's training task: two frames of one clip, one of them misaligned (eq. 12).

Shapes: B batch, N = 18 keypoints of the body. Coordinates are isotropic (`animator.keypoints`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from animator.alignment import AlignmentBlock
from animator.config import AlignmentConfig
from animator.keypoints import SimilarityRange
from animator.losses import alignment_loss
from animator.similarity import MIN_COMMON, apply, fit
from animator.weights import save_model
from pipelines.motion import MotionStore
from pipelines.motion_camera import CameraConfig
from training.frames import open_clips
from training.pose_pairs import MotionPairs, PosePairs, ShardPairs
from training.task import Batch


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """What the alignment block learns from, and how a training pair is drawn."""

    name: ClassVar[str] = "alignment"
    may_change: ClassVar[tuple[str, ...]] = ("shards", "motion")

    shards: str = ""  # poses of curated clips, or
    motion: str = ""  # a folder of motion capture, seen by random cameras
    block: AlignmentConfig = field(default_factory=AlignmentConfig)
    misalignment: SimilarityRange = field(default_factory=SimilarityRange)
    # of shards
    holdout_tail: float = 0.0  # share of each clip, at its end, that is never trained on
    hide_joints: float = 0.1  # chance that a joint is hidden, as detectors miss them
    joint_noise: float = 0.003  # deviation in each direction, of the longer side
    # of motion
    camera: CameraConfig = field(default_factory=CameraConfig)
    clip_frames: int = 8  # frames that stand for a clip when it is framed

    def build_task(self, seed: int) -> "AlignTask":
        if self.motion and self.shards:
            raise ValueError(
                f"Got shards {self.shards} and motion {self.motion}, expected one of them: train "
                "on one, and give only that."
            )
        if not self.motion and not self.shards:
            raise ValueError(
                "There are no poses to learn from: give the folder that `animator curate` wrote, "
                "with --set task.shards=DIR, or a folder of motion capture, with "
                "--set task.motion=DIR."
            )
        return AlignTask(self, self._pairs(seed))

    def _pairs(self, seed: int) -> PosePairs:
        if self.motion:
            return MotionPairs(
                MotionStore(self.motion),
                seed,
                limits=self.misalignment,
                camera=self.camera,
                num_frames=self.clip_frames,
            )
        return ShardPairs(
            open_clips(self.shards),
            seed,
            limits=self.misalignment,
            holdout_tail=self.holdout_tail,
            hide_joints=self.hide_joints,
            joint_noise=self.joint_noise,
        )


class AlignTask:
    """Draws pairs of poses and computes eq. 12 on them."""

    name = "alignment"

    def __init__(self, config: AlignConfig, pairs: PosePairs):
        self.config = config
        self.pairs = pairs
        self.fingerprint = pairs.fingerprint
        self.num_samples = pairs.num_samples

    def build(self) -> nn.Module:
        return AlignmentBlock(self.config.block).train()

    def prepare(self, device: torch.device) -> None:
        pass

    def batch(self, samples: Sequence[int]) -> Batch:
        return self.pairs.batch(samples)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        reference, driven, weight = (batch[k] for k in ("reference", "driven", "weight"))
        # Pairs with too little in common teach nothing about the transform.
        visible = batch["visible"] * ((weight > 0).sum(1, keepdim=True) >= MIN_COMMON)
        # The transform is found from what a detector saw and judged without the detector's noise.
        moved, target = batch["moved"], batch["target"]
        learned = apply(model(reference, driven, weight), moved)
        with torch.no_grad():
            closed_form = apply(fit(driven, reference, weight), moved)
            baseline = alignment_loss(closed_form, target, visible)
            none = alignment_loss(moved, target, visible)
        numbers = {"distance_closed_form": baseline, "distance_none": none}
        return alignment_loss(learned, target, visible), numbers

    def save_model(self, state: dict[str, Tensor], folder: Path) -> None:
        about = {"trained_on": {"alignment": dict(self.pairs.about())}}
        save_model(folder, alignment=(self.config.block, state), about=about)
