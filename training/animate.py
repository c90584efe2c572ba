"""The animator's training task: clips to the face-weighted denoising loss (eq. 25).

Shapes: B batch, T frames, H W pixels, C latent channels, h w latent size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from animator import edm, licences
from animator.config import AnimatorConfig, tiny
from animator.losses import denoising_loss
from animator.model import Animator
from animator.stable_video import animator_from_svd
from animator.tensor_files import WeightsError
from animator.weights import add_encoders, load_alignment, read_config, save_model
from inference.conditioning import ReferenceEncoder, face_mask, to_tensor
from inference.sampler import SamplerConfig
from pipelines.clips import ClipStore
from pipelines.faces import Face
from pipelines.order import ClipOrder
from pipelines.overrides import to_dict
from training.frames import FramedClips, open_clips
from training.task import Batch, sample_generator, stack

# Settings that may differ from those of the model a run starts from: no tensor has their size.
FREE_SIZES = (
    "height",
    "width",
    "num_frames",
    "conditioning_fps",
    "motion_bucket",
    "noise_augmentation",
    "pose_style",
    "face_channel_order",
    "face_model",
)


@dataclass(frozen=True, kw_only=True)
class AnimateConfig:
    """What the animator learns from, and how a training example is drawn."""

    name: ClassVar[str] = "animator"
    may_change: ClassVar[tuple[str, ...]] = ("shards", "alignment", "start")

    shards: str = ""
    start: str = ""  # a model folder, or one of Stable Video Diffusion, to start from
    alignment: str = ""  # a model folder whose alignment block goes into the released model
    animator: AnimatorConfig = field(default_factory=tiny)
    framing: str = "pad"
    frame_strides: tuple[int, ...] = (1, 2, 4, 8)  # one is drawn for each example
    holdout_tail: float = 0.0  # share of each clip, at its end, that is never trained on
    sigma_mean: float = 1.0  # of ln sigma
    sigma_spread: float = 1.6
    drop_image_token: float = 0.05
    drop_reference: float = 0.05
    gradient_checkpointing: bool = False  # recompute the UNet's blocks: slower, far less memory
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

    def build_task(self, seed: int, global_batch: int = 1) -> "AnimateTask":
        if self.animator.codec == "temporal_vae" and not self.start:
            raise ValueError(
                "This model is built on Stable Video Diffusion: give its folder, or that of a "
                "model to train further, with --set task.start=DIR (`animator models pull svd-xt`)."
            )
        return AnimateTask(self, open_clips(self.shards), seed)


def trained_frames(num_frames: int, holdout_tail: float) -> int:
    """How many frames from a clip's start are trained on; the rest are held out."""
    return num_frames - math.floor(num_frames * holdout_tail)


class AnimateTask:
    """Draws clips with a reference frame, and computes eq. 25 on them."""

    name = "animator"

    def __init__(self, config: AnimateConfig, clips: ClipStore, seed: int):
        self.config = config
        self.seed = seed
        self.clips = clips
        self.fingerprint = clips.fingerprint
        self.num_samples = len(clips)
        self.order = ClipOrder(len(clips), seed)
        self.size = (config.animator.height, config.animator.width)
        style = config.animator.pose_style
        self.framed = FramedClips(clips, self.size, config.framing, style=style)
        self.terms = _terms_of_start(config.start)
        self.device = torch.device("cpu")
        self.encoder = ReferenceEncoder(
            config.animator, Path(config.start) if config.start else None
        )

    def build(self) -> nn.Module:
        config = self.config
        if config.start:
            model = starting_animator(Path(config.start), config.animator)
        else:
            model = Animator(config.animator)
        model.enable_gradient_checkpointing(config.gradient_checkpointing)
        return model.train()

    def prepare(self, device: torch.device) -> None:
        self.device = device
        self.encoder.to(device)

    def batch(self, samples: Sequence[int]) -> Batch:
        return stack([self._example(sample) for sample in samples])

    def _example(self, sample: int) -> dict[str, Tensor]:
        config = self.config
        index = self.order.clip(sample)
        generator = sample_generator(self.seed, sample)
        chosen, reference, stride = self._choose(index, generator)
        clip = self.framed.clip(index)
        image = self.framed.frames(index, np.array([reference]))[0]
        cell = config.animator.spatial_factor
        grid = (self.size[0] // cell, self.size[1] // cell)
        shape = (len(chosen), config.animator.latent_channels, *grid)
        draw = torch.rand(2, generator=generator)
        return {
            "frames": torch.from_numpy(self.framed.frames(index, chosen)),
            "poses": torch.from_numpy(self.framed.poses(index, chosen)),
            "reference": torch.from_numpy(image),
            "token_image": self._token_image(index, reference, image),
            "reference_noise": torch.randn(3, *self.size, generator=generator),
            "face_embedding": self._embedding(index, reference, image),
            "face_mask": torch.from_numpy(face_mask(clip.face_boxes[chosen], self.size, cell)),
            "sigma": edm.training_sigma(generator, config.sigma_mean, config.sigma_spread)[0],
            "noise": torch.randn(shape, generator=generator),
            "keep_image_token": (draw[0] >= config.drop_image_token).float(),
            "keep_reference": (draw[1] >= config.drop_reference).float(),
            "fps": torch.tensor(self.clips.fps(index) / stride),
        }

    def _choose(self, index: int, generator: torch.Generator) -> tuple[np.ndarray, int, int]:
        """Frame numbers, a reference frame from outside their span where there is one, stride."""
        usable = trained_frames(self.clips.num_frames(index), self.config.holdout_tail)
        count = self.config.animator.num_frames
        # A clip that is too short for a stride gets the longest that fits, or holds its last frame.
        longest = max(1, (usable - 1) // max(1, count - 1))
        drawn = self.config.frame_strides[_below(len(self.config.frame_strides), generator)]
        stride = min(drawn, longest)
        span = (count - 1) * stride + 1
        start = _below(max(1, usable - span + 1), generator)
        chosen = np.minimum(start + np.arange(count) * stride, usable - 1)
        covered = int(chosen[-1]) - start + 1
        if covered >= usable:
            return chosen, _below(usable, generator), stride
        pick = _below(usable - covered, generator)
        return chosen, pick if pick < start else pick + covered, stride

    def _token_image(self, index: int, frame: int, framed_image: np.ndarray) -> Tensor:
        """The reference as the image encoder takes it, `(3, H, W)` in [-1, 1]."""
        native = self.encoder.token_takes_native
        picture = self.clips.frames(index, [frame])[0] if native else framed_image
        return self.encoder.resize_for_token(to_tensor(picture)[None])[0]

    def _embedding(self, index: int, frame: int, framed_image: np.ndarray) -> Tensor:
        if self.encoder.needs_full_frames:
            faces = self.clips.faces(index)
            boxes, marks, score = faces.boxes[frame], faces.landmarks[frame], faces.score[frame]
            image = self.clips.frames(index, [frame])[0]
        else:
            clip = self.framed.clip(index)
            boxes, marks = clip.face_boxes[frame], clip.landmarks[frame]
            score, image = np.ones(len(boxes), np.float32), framed_image
        areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=-1) if len(boxes) else np.zeros(0)
        if not len(areas) or areas.max() <= 0:
            return self.encoder.face_embedding(image, None)
        largest = int(areas.argmax())
        face = Face(box=boxes[largest], landmarks=marks[largest], score=float(score[largest]))
        return self.encoder.face_embedding(image, face)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        config = self.config
        batch_size, num_frames = batch["frames"].shape[:2]
        sigma, keep_reference = batch["sigma"], batch["keep_reference"]
        with torch.no_grad():
            frames = rearrange(to_unit(batch["frames"]), "b t h w c -> (b t) c h w")
            clean = rearrange(
                self.encoder.codec.encode(frames), "(b t) ... -> b t ...", b=batch_size
            )
            image = rearrange(to_unit(batch["reference"]), "b h w c -> b c h w")
            token = self.encoder.image_token(batch["token_image"])
            noisy_image = image + config.animator.noise_augmentation * batch["reference_noise"]
            reference = self.encoder.reference_latents(noisy_image)
        token = token * batch["keep_image_token"][:, None, None]
        reference = reference * keep_reference[:, None, None, None]
        reference = repeat(reference, "b c h w -> b t c h w", t=num_frames)
        poses = rearrange(to_unit(batch["poses"]), "b t h w c -> (b t) c h w")
        time_ids = self.encoder.time_ids(batch["fps"].cpu(), batch_size).to(sigma)

        def network(scaled: Tensor, timestep: Tensor) -> Tensor:
            sample = torch.cat([scaled, reference.to(scaled)], dim=2)
            return model(sample, timestep, token, batch["face_embedding"], poses, time_ids)

        noisy = clean + batch["noise"] * sigma[:, None, None, None, None]
        parameters = (config.animator.sigma_data, config.animator.prediction)
        denoised = edm.precondition(network, noisy, sigma, *parameters)
        weight = edm.loss_weight(sigma, *parameters)
        return denoising_loss(denoised, clean, batch["face_mask"], weight), {}

    def save_model(self, state: dict[str, Tensor], folder: Path) -> None:
        about: dict[str, Any] = {
            "sampling": to_dict(self.config.sampling),
            "encoders": self.encoder.models,
            "trained_on": {"animator": {"data": self.fingerprint}},
            **self.terms,
        }
        block = None
        if self.config.alignment:
            block = load_alignment(Path(self.config.alignment))
            about["trained_on"] |= _data_of_alignment(Path(self.config.alignment))
        if self.config.animator.codec == "temporal_vae":
            folder.mkdir(parents=True, exist_ok=True)
            add_encoders(folder, Path(self.config.start))
        save_model(
            folder,
            animator=(self.config.animator, state),
            alignment=None if block is None else (block.config, block.state_dict()),
            about=about,
        )


def _data_of_alignment(folder: Path) -> dict[str, Any]:
    """What a model's alignment block was trained on, which stays true wherever the block goes."""
    trained_on = read_config(folder).get("trained_on", {})
    return {"alignment": trained_on["alignment"]} if "alignment" in trained_on else {}


def _terms_of_start(start: str) -> dict[str, str]:
    """The licence of the weights that training started from, which the result is bound by."""
    if not start:
        return {}
    if not (Path(start) / "config.json").is_file():
        return {"licence": licences.STABILITY}
    about = read_config(Path(start))
    return {"licence": about["licence"]} if "licence" in about else {}


def starting_animator(start: Path, sizes: AnimatorConfig) -> Animator:
    """The animator that training starts from, in fp32, with the configured sizes.

    Raises:
        WeightsError: for a folder that holds none, or one of other sizes.
    """
    if not (start / "config.json").is_file():
        return animator_from_svd(start, sizes=sizes, dtype=torch.float32)
    model = Animator.from_pretrained(start, dtype=torch.float32)
    fixed = {name: getattr(model.config, name) for name in vars(sizes) if name not in FREE_SIZES}
    wrong = [name for name, value in fixed.items() if value != getattr(sizes, name)]
    if wrong:
        raise WeightsError(
            f"{start}: {wrong[0]} is {fixed[wrong[0]]}, but task.animator.{wrong[0]} is "
            f"{getattr(sizes, wrong[0])}; what a model starts from decides these: "
            f"{', '.join(wrong)}."
        )
    model.config = sizes
    return model


def _below(limit: int, generator: torch.Generator) -> int:
    return int(torch.randint(limit, (1,), generator=generator))


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 to [-1, 1]."""
    return pixels.float() / 127.5 - 1
