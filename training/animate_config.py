"""The settings of the animator's training: what it learns from, and how an example is drawn."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from animator import edm
from animator.config import AnimatorConfig, tiny
from animator.edm import SigmaLaw
from animator.keypoints import SimilarityRange
from animator.trainable import Trainable
from inference.sampler import SamplerConfig
from pipelines.encode.config import parse_size
from pipelines.framing import MODES

if TYPE_CHECKING:
    from training.animate import AnimateTask

PoseAugmentation = Literal["none", "perturbed", "aligned"]


@dataclass(frozen=True, kw_only=True)
class AnimateConfig:
    """What the animator learns from, and how a training example is drawn."""

    name: ClassVar[str] = "animator"
    may_change: ClassVar[tuple[str, ...]] = (
        "shards",
        "latents",
        "validation",
        "alignment",
        "start",  # where it lies: what of it is never trained is compared by contents
        "recompute",
    )

    shards: str = ""
    # What `animator encode` made of the shards: no frame is encoded again, and often none decoded.
    # The reference is then free of noise, whatever noise_augmentation says: only pixels have it.
    latents: str = ""
    validation: str = ""  # shards that are never trained on; without them, what is held out below
    start: str = ""  # a model folder, or one of Stable Video Diffusion, to start from
    alignment: str = ""  # a model folder whose alignment block goes into the released model
    animator: AnimatorConfig = field(default_factory=tiny)
    framing: str = "pad"
    buckets: tuple[str, ...] = ()  # sizes HEIGHTxWIDTH, one a step; none: the model's own
    frame_strides: tuple[int, ...] = (1, 2, 4, 8)  # one is drawn for each example
    holdout_tail: float = 0.0  # share of each clip, at its end, that is never trained on
    sigma: SigmaLaw = "lognormal"  # or v1's cosine-interpolated schedule
    sigma_mean: float = 1.0  # of ln sigma, of the former
    sigma_spread: float = 1.6
    face_mask: bool = True  # weigh faces by (1 + M)² (eq. 25)
    drop_image_token: float = 0.05
    drop_reference: float = 0.05
    drop_face: float = 0.0
    drop_pose: float = 0.0
    # Poses that do not lie quite on the person, as those that alignment gives in use: moved a
    # little, or misaligned as alignment is trained for and aligned again.
    pose_augmentation: PoseAugmentation = "none"
    pose_augmented: float = 0.5  # share of the examples
    perturbation: SimilarityRange = field(
        default_factory=lambda: SimilarityRange(scale=1.05, rotation=2.0, shift=0.02)
    )
    trainable: Trainable = "all"
    lora_rank: int = 16
    lora_alpha: float = 16.0
    face_gradient_limit: float = 0.0  # see `animator.face_gradient`; 0 = none
    recompute: float = 0.0  # share of the blocks that recompute: slower, far less memory
    sampling: SamplerConfig = field(  # what the released model is sampled with by default
        default_factory=lambda: SamplerConfig(steps=16, sigma_min=0.02, sigma_max=80.0)
    )

    def __post_init__(self) -> None:
        if not 0 <= self.holdout_tail < 1:
            raise ValueError(
                f"Got holdout_tail {self.holdout_tail}, but expected a share from 0 (nothing is "
                "held out) to below 1."
            )
        if not self.frame_strides or min(self.frame_strides) < 1:
            raise ValueError(
                f"Got frame_strides {self.frame_strides}, but expected one or more numbers of at "
                "least 1."
            )
        if self.framing not in MODES:
            raise ValueError(
                f"Got framing {self.framing!r}, but expected one of {', '.join(MODES)}."
            )
        for key in (
            "drop_image_token",
            "drop_reference",
            "drop_face",
            "drop_pose",
            "pose_augmented",
            "recompute",
        ):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(
                    f"Got {key} {getattr(self, key)}, but expected a share from 0 to 1."
                )
        if self.lora_rank < 1 or self.lora_alpha <= 0:
            raise ValueError(
                f"Got lora_rank {self.lora_rank} and lora_alpha {self.lora_alpha}, but expected a "
                "rank of at least 1 and a number above 0."
            )
        if not 0 <= self.face_gradient_limit < math.inf:
            raise ValueError(
                f"Got face_gradient_limit {self.face_gradient_limit}, but expected 0 (none) or a "
                "number above it."
            )
        self.sizes()

    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of each bucket, each size once; none where `buckets` is empty.

        Raises:
            ValueError: for what is no size, or one that the network cannot halve often enough.
        """
        sizes = tuple(dict.fromkeys(parse_size(text) for text in self.buckets))
        multiple = self.animator.size_multiple
        for height, width in sizes:
            if min(height, width) < multiple or height % multiple or width % multiple:
                raise ValueError(
                    f"Got a bucket of {height}x{width}, but expected height and width as multiples "
                    f"of {multiple} pixels."
                )
        return sizes

    def draw_sigma(self, generator: torch.Generator) -> Tensor:
        """One noise level, `(1,)`."""
        if self.sigma == "cosine":
            return edm.cosine_sigma(generator)
        return edm.training_sigma(generator, self.sigma_mean, self.sigma_spread)

    def sigma_quartiles(self) -> Tensor:
        """The noise levels that part the draws into four equal shares, `(3,)`."""
        return edm.sigma_quartiles(self.sigma, self.sigma_mean, self.sigma_spread)

    def build_task(self, seed: int, global_batch: int = 1) -> "AnimateTask":
        from training.animate import AnimateTask
        from training.animate_examples import open_examples

        if self.animator.codec == "temporal_vae" and not self.start:
            raise ValueError(
                "This model is built on Stable Video Diffusion: give its folder, or that of a "
                "model to train further, with --set task.start=DIR (`animator models pull svd-xt`)."
            )
        return AnimateTask(self, open_examples(self, seed, global_batch))
