"""The alignment block's training task: frames of one clip, all but one misaligned (eq. 12).

Shapes: B batch, F driven frames, N = 18 keypoints of the body. Coordinates are isotropic
(`animator.keypoints`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from animator.alignment import AlignmentBlock
from animator.clip_transform import ClipSums
from animator.config import AlignmentConfig
from animator.keypoints import SimilarityRange
from animator.losses import alignment_loss
from animator.similarity import Similarity, apply, fit, solvable
from animator.weights import save_model
from pipelines.motion import MotionStore
from pipelines.motion_camera import CameraConfig
from training.frames import open_clips
from training.pose_pairs import MisalignmentShares, MotionPairs, PosePairs, ShardPairs
from training.task import Batch, Task

_VALIDATION_SEED = 0
_CERTAINTY = 0.02  # share of the certainty loss; it does not reach the transform


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """What the alignment block learns from, and how a training pair is drawn."""

    name: ClassVar[str] = "alignment"
    may_change: ClassVar[tuple[str, ...]] = ("shards", "motion", "validation")

    shards: str = ""  # poses of curated clips, or
    motion: str = ""  # a folder of motion capture, seen by random cameras
    validation: str = ""  # another folder of the same kind, which is never trained on
    block: AlignmentConfig = field(default_factory=AlignmentConfig)
    misalignment: SimilarityRange = field(default_factory=SimilarityRange)
    aligned: float = 0.1  # chance that there is no misalignment, as where a video drives itself
    wide: float = 0.15  # chance that it may be twice as large, so that such are known too
    driven_frames: int = 2  # of an example, under one misalignment
    clip_weight: float = 0.3  # of the loss of one transform a clip; the rest is each frame's own
    # of shards
    holdout_tail: float = 0.0  # share of each clip, at its end, that is never trained on
    hide_joints: float = 0.1  # chance that a joint is hidden, as detectors miss them
    joint_noise: float = 0.003  # deviation in each direction, of the longer side
    # of motion
    camera: CameraConfig = field(default_factory=CameraConfig)
    clip_frames: int = 8  # frames that stand for a clip when it is framed

    def __post_init__(self) -> None:
        for name in ("aligned", "wide", "clip_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"task.{name} is {getattr(self, name)}, expected 0..1.")
        if self.aligned + self.wide > 1:
            raise ValueError(
                f"task.aligned {self.aligned} and task.wide {self.wide} are more than 1 together."
            )
        if self.driven_frames < 1:
            raise ValueError(f"task.driven_frames is {self.driven_frames}, expected at least 1.")

    def build_task(self, seed: int, global_batch: int = 1) -> "AlignTask":
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
        folder = self.motion or self.shards
        return AlignTask(self, self._pairs_of(folder, seed, tail=self.holdout_tail))

    def held_out_pairs(self) -> PosePairs | None:
        """Poses that are not trained on, the same in every run; None where there are none."""
        if self.validation:
            return self._pairs_of(self.validation, _VALIDATION_SEED, tail=0.0)
        if self.shards and self.holdout_tail > 0:
            tail = self.holdout_tail
            return self._pairs_of(self.shards, _VALIDATION_SEED, tail=tail, held_out=True)
        return None

    def _pairs_of(
        self, folder: str, seed: int, *, tail: float, held_out: bool = False
    ) -> PosePairs:
        if self.motion:
            return MotionPairs(
                MotionStore(folder),
                seed,
                num_driven=self.driven_frames,
                limits=self.misalignment,
                shares=MisalignmentShares(self.aligned, self.wide),
                camera=self.camera,
                num_frames=self.clip_frames,
            )
        return ShardPairs(
            open_clips(folder),
            seed,
            num_driven=self.driven_frames,
            limits=self.misalignment,
            shares=MisalignmentShares(self.aligned, self.wide),
            holdout_tail=tail,
            hide_joints=self.hide_joints,
            joint_noise=self.joint_noise,
            held_out=held_out,
        )


class AlignTask(Task):
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
        shape = batch["weight"].shape[:2]
        reference, frame = (
            batch[name][:, None].expand(-1, shape[1], *batch[name].shape[1:])
            for name in ("reference", "frame")
        )
        driven, weight, moved, target = (
            batch[name] for name in ("driven", "weight", "moved", "target")
        )
        # Pairs with too little in common teach nothing about the transform.
        solved = solvable(driven, reference, weight)
        visible = batch["visible"] * solved[..., None]
        flat = (part.flatten(0, 1) for part in (reference, driven, weight, frame))
        transform, votes, expected = model(*flat)
        transform = Similarity(*(part.unflatten(0, shape) for part in transform))
        expected = expected.unflatten(0, shape)
        votes = votes.unflatten(0, shape)
        sums = ClipSums.of(transform, votes, expected, driven, weight, solved)
        of_clip = Similarity(*(part[:, None] for part in sums.transform()))
        # The transform is found from what a detector saw and judged without the detector's noise.
        aligned = apply(transform, moved)
        frames, clips = (
            alignment_loss(points, target, visible) for points in (aligned, apply(of_clip, moved))
        )
        certainty = _certainty_loss(expected, aligned, target, visible)
        with torch.no_grad():
            closed_form = apply(fit(driven, reference, weight), moved)
            numbers = {
                "distance": frames,
                "distance_clip": clips,
                "distance_closed_form": alignment_loss(closed_form, target, visible),
                "distance_none": alignment_loss(moved, target, visible),
                "certainty_loss": certainty,
            }
        share = self.config.clip_weight
        return (1 - share) * frames + share * clips + _CERTAINTY * certainty, numbers

    def validate(
        self, model: nn.Module, folder: Path, device: torch.device, clips: int
    ) -> Mapping[str, float]:
        from training.align_validation import validate

        return validate(self, model, folder, device, clips)

    def save_model(self, state: dict[str, Tensor], folder: Path) -> None:
        about = {"trained_on": {"alignment": dict(self.pairs.about())}}
        save_model(folder, alignment=(self.config.block, state), about=about)


def _certainty_loss(expected: Tensor, aligned: Tensor, target: Tensor, visible: Tensor) -> Tensor:
    """How far the expected distances `(B, F)` are off, as a factor (ours).

    The minimum is the median of the distance given the poses.
    """
    off = ((aligned - target).norm(dim=-1).detach() * visible).sum(-1)
    count = visible.sum(-1)
    distance = (off / count.clamp_min(1)).clamp_min(1e-4)
    wrong = (expected.clamp_min(1e-6).log() - distance.log()).abs()
    return (wrong * (count > 0)).sum() / (count > 0).sum().clamp_min(1)
