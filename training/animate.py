"""The animator's training task: clips to the face-weighted denoising loss (eq. 25).

Shapes: B batch, T frames, H W pixels, C latent channels, h w latent size, D context width.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange, repeat
from safetensors.torch import save_file
from torch import Tensor, nn

from animator import edm, licences
from animator.config import AnimatorConfig
from animator.flops import training_flops
from animator.losses import denoising_loss_of_clips, face_loss_of_clips, means_by_quartile
from animator.model import Animator
from animator.recompute import recompute_blocks
from animator.stable_video import animator_from_svd, diffusers_files
from animator.tensor_files import WeightsError, component_files
from animator.trainable import choose_trainable, lora_state, merged_state
from animator.weights import add_encoders, encoder_files, load_alignment, read_config, save_model
from inference.conditioning import ReferenceEncoder, time_ids
from pipelines.overrides import to_dict
from training.animate_config import AnimateConfig
from training.animate_examples import AnimateExamples, trained_frames
from training.checkpoint import measure
from training.task import Batch, Task, stack

__all__ = ["AnimateConfig", "AnimateTask", "starting_animator", "trained_frames"]

LORA = "lora.safetensors"

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


class AnimateTask(Task):
    """Draws clips with a reference frame, and computes eq. 25 on them."""

    name = "animator"

    def __init__(self, config: AnimateConfig, examples: AnimateExamples):
        self.config = config
        self.examples = examples
        self.fingerprint = _fingerprint(examples)
        self.num_samples = len(examples.clips)
        self.flops = _flops_of_a_sample(config, examples)
        self.terms = _terms_of_start(config.start)
        self.quartiles = config.sigma_quartiles()
        self.device = torch.device("cpu")

    @property
    def encoder(self) -> ReferenceEncoder:
        """The frozen encoders; without them where latents and tokens come from the store."""
        return self.examples.encoder

    def build(self) -> nn.Module:
        config = self.config
        if config.start:
            model = starting_animator(Path(config.start), config.animator)
        else:
            model = Animator(config.animator)
        choose_trainable(model, config.trainable, rank=config.lora_rank, alpha=config.lora_alpha)
        recompute_blocks(model, config.recompute)
        model.face_gradient_limit = config.face_gradient_limit or None
        return model.train()

    def prepare(self, device: torch.device) -> None:
        self.device = device
        self.quartiles = self.quartiles.to(device)
        cached = self.examples.cached
        if cached is None or not cached.has_tokens:
            self.encoder.to(device)

    def batch(self, samples: Sequence[int]) -> Batch:
        return stack([self.examples.example(sample) for sample in samples])

    def problems(self) -> list[tuple[str, str]]:
        return self.examples.problems()

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        config = self.config
        sigma, mask = batch["sigma"], batch["face_mask"]
        with torch.no_grad():
            clean, reference, token = self._encoded(batch)
        num_frames = clean.shape[1]
        token = token * batch["keep_image_token"][:, None, None]
        reference = reference * batch["keep_reference"][:, None, None, None]
        reference = repeat(reference, "b c h w -> b t c h w", t=num_frames)
        poses = rearrange(to_unit(batch["poses"]), "b t h w c -> (b t) c h w")
        ids = time_ids(config.animator, batch["fps"], len(clean)).to(sigma)

        def network(scaled: Tensor, timestep: Tensor) -> Tensor:
            sample = torch.cat([scaled, reference.to(scaled)], dim=2)
            face, keep = batch["face_embedding"], (batch["keep_face"], batch["keep_pose"])
            return model(sample, timestep, token, face, poses, ids, *keep)

        noisy = clean + batch["noise"] * sigma[:, None, None, None, None]
        parameters = (config.animator.sigma_data, config.animator.prediction)
        denoised = edm.precondition(network, noisy, sigma, *parameters)
        weight = edm.loss_weight(sigma, *parameters)
        weighed = mask if config.face_mask else torch.zeros_like(mask)
        losses = denoising_loss_of_clips(denoised, clean, weighed, weight)
        with torch.no_grad():
            faces = face_loss_of_clips(denoised, clean, mask, weight)
            numbers: dict[str, Tensor | float] = {"loss_face": faces.nanmean()}
            for quartile, mean in enumerate(means_by_quartile(losses, sigma, self.quartiles)):
                numbers[f"loss_sigma_q{quartile}"] = mean
            numbers["replaced"] = batch["replaced"].mean()
        return losses.mean(), numbers

    def _encoded(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Clean latents `(B, T, C, h, w)`, reference latents `(B, C, h, w)`, token `(B, 1, D)`."""
        if "image_token" in batch:
            token = batch["image_token"]
        else:
            token = self.encoder.image_token(batch["token_image"])
        if "latents" in batch:
            return batch["latents"].float(), batch["reference_latents"], token
        frames = rearrange(to_unit(batch["frames"]), "b t h w c -> (b t) c h w")
        clean = self.encoder.codec.encode(frames)
        clean = rearrange(clean, "(b t) ... -> b t ...", b=len(batch["frames"]))
        image = rearrange(to_unit(batch["reference"]), "b h w c -> b c h w")
        noisy_image = image + self.config.animator.noise_augmentation * batch["reference_noise"]
        return clean, self.encoder.reference_latents(noisy_image), token

    def validate(
        self, model: nn.Module, folder: Path, device: torch.device, clips: int
    ) -> Mapping[str, float]:
        from training.animate_validation import validate

        return validate(self, model, folder, device, clips)

    def start_digest(self) -> str:
        files = _lasting_files(self.config)
        lines = sorted(f"{part} {path.name} {measure(path)[1]}" for part, path in files)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest() if lines else ""

    def save_model(self, state: dict[str, Tensor], folder: Path) -> None:
        about: dict[str, Any] = {
            "sampling": to_dict(self.config.sampling),
            "encoders": self.examples.encoder_models(),
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
            animator=(self.config.animator, merged_state(state, self.config.lora_alpha)),
            alignment=None if block is None else (block.config, block.state_dict()),
            about=about,
        )
        if low_rank := lora_state(state):
            settings = {"rank": self.config.lora_rank, "alpha": self.config.lora_alpha}
            metadata = {name: str(value) for name, value in settings.items()}
            save_file(low_rank, folder / LORA, metadata)


def _fingerprint(examples: AnimateExamples) -> str:
    """Of the data; latents are data of their own, as they are rounded."""
    if examples.cached is None:
        return examples.clips.fingerprint
    both = f"{examples.clips.fingerprint} {examples.cached.fingerprint}"
    return hashlib.sha256(both.encode()).hexdigest()


def _lasting_files(config: AnimateConfig) -> Iterator[tuple[str, Path]]:
    """Part and file of the start's weights that stay in the result: frozen ones and encoders."""
    if not config.start:
        return
    start = Path(config.start)
    if config.trainable != "all":
        yield from (("unet", path) for path in _unet_files(start))
    if config.animator.codec == "temporal_vae":
        for part, files in encoder_files(start).items():
            yield from ((part, path) for path in files if path.suffix == ".safetensors")


def _unet_files(start: Path) -> list[Path]:
    """The UNet's weights; PoseNet and Face Encoder are always trained."""
    if (start / "config.json").is_file():
        return component_files(start, "unet")
    return diffusers_files(start / "unet" if (start / "unet").is_dir() else start)


def _flops_of_a_sample(config: AnimateConfig, examples: AnimateExamples) -> float:
    """Mean over the clips, since those of another size cost something else."""
    frames, what = config.animator.num_frames, config.trainable
    total = sum(
        len(clips) * training_flops(config.animator, *size, frames, trainable=what)
        for size, clips in examples.buckets.items()
    )
    return total / len(examples.clips)


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


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 to [-1, 1]."""
    return pixels.float() / 127.5 - 1
