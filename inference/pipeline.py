"""The animation pipeline: a saved model as one callable, in the manner of a diffusers pipeline.

Shapes: T frames, P people, N = 18 keypoints, H W output size, C latent channels.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from animator import edm
from animator.alignment import AlignmentBlock
from animator.alignment_weights import AUTO, open_alignment
from animator.model import Animator
from animator.precision import weights_dtype
from animator.weights import read_config
from inference.clip_alignment import AlignmentSettings
from inference.conditioning import ReferenceEncoder, pose_images, to_frames, to_tensor
from inference.guidance import Conditions, GuidanceConfig, GuidedDenoiser
from inference.perception import Pose
from inference.retarget import Retargeted, retarget, unaligned
from inference.sampler import SamplerConfig, sample
from inference.windows import WindowConfig
from pipelines.faces import Face
from pipelines.framing import Framing, fit
from pipelines.overrides import from_dict

POSE_CHUNK = 16  # frames that PoseNet takes at a time
OnStep = Callable[[int, int], None]  # (steps done, steps in all); may raise to stop


@dataclass(frozen=True, kw_only=True)
class AnimationSettings:
    """How a model is sampled and poses are aligned; a model folder brings its own."""

    sampling: SamplerConfig = field(default_factory=SamplerConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    windows: WindowConfig = field(default_factory=WindowConfig)
    alignment: AlignmentSettings = field(default_factory=AlignmentSettings)

    def with_choices(
        self, *, steps: int | None = None, guidance: float | None = None
    ) -> "AnimationSettings":
        """These settings with another number of steps, or guidance of one strength throughout."""
        settings = self
        if steps is not None:
            settings = replace(settings, sampling=replace(settings.sampling, steps=steps))
        if guidance is not None:
            scale = replace(settings.guidance, min=guidance, max=guidance)
            settings = replace(settings, guidance=scale)
        return settings


@dataclass(frozen=True)
class AnimationResult:
    """What the pipeline made."""

    frames: np.ndarray  # (T, H, W, 3) uint8
    pose_frames: np.ndarray  # (T, H, W, 3) uint8, the poses that drove them
    alignment: Retargeted
    framing: Framing
    settings: AnimationSettings


class AnimationPipeline:
    """Animator, alignment block and frozen encoders, ready to run.

    Args:
        animator: in evaluation mode.
        encoder: the frozen encoders that its configuration names.
        alignment: the learned block, or None for the closed form.
        settings: how the model is sampled where a call does not say.
        about: what else the model's folder says of it: licence, source.
        alignment_model: name and licence of the block, for the record.
    """

    def __init__(
        self,
        animator: Animator,
        encoder: ReferenceEncoder,
        alignment: AlignmentBlock | None,
        settings: AnimationSettings,
        about: dict[str, Any] | None = None,
        alignment_model: dict[str, str | None] | None = None,
    ):
        self.animator = animator
        self.encoder = encoder
        self.alignment = alignment
        self.settings = settings
        self.about = about or {}
        self.alignment_model = alignment_model or {}
        self.config = animator.config

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        face: str = "auto",
        alignment: str = AUTO,
        device: str | torch.device | None = None,
        dtype: str = "auto",
    ) -> "AnimationPipeline":
        """Load a model folder.

        Args:
            alignment: which alignment block (see `open_alignment`); the folder's own by default,
                or the shipped one.
            device: the first GPU by default, the CPU where there is none.
            dtype: of the weights; `auto` is bf16 on a GPU that has it, fp16 on others and fp32
                on the CPU.

        Raises:
            ValueError: for a folder that does not hold what is needed (see `WeightsError`).
        """
        folder = Path(folder)
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        precision = weights_dtype(dtype, place)
        block, alignment_model = open_alignment(alignment, folder)  # first, as it is the quickest
        animator = Animator.from_pretrained(folder, dtype=precision, device=place)
        encoder = ReferenceEncoder(animator.config, folder, face, dtype=precision).to(place)
        about = read_config(folder)
        return cls(animator, encoder, block, read_settings(about), about, alignment_model)

    @property
    def device(self) -> torch.device:
        return next(self.animator.parameters()).device

    @torch.no_grad()
    def __call__(
        self,
        reference: np.ndarray,
        reference_pose: Pose,
        driving_pose: Pose,
        *,
        fps: float,
        face: Face | None = None,
        framing: str = "pad",
        align: bool = True,
        size: tuple[int, int] | None = None,
        seed: int = 0,
        settings: AnimationSettings | None = None,
        on_step: OnStep | None = None,
    ) -> AnimationResult:
        """Animate the person of a picture.

        Args:
            reference: uint8 RGB `(H0, W0, 3)`.
            reference_pose: keypoints `(N, 2)`, or `(P, N, 2)` with the main person first.
            driving_pose: keypoints `(T, P, N, 2)`.
            fps: of the driving clip.
            face: the reference's face, or None where it has none.
            framing: how the reference is fitted into the model's size: pad or crop.
            align: False draws the driving poses where they are.
            size: (height, width) of the frames the model works on; its own by default.
            settings: of sampler, guidance and alignment; the model's own by default.

        Raises:
            ValueError: for options out of range.
        """
        size = self.frame_size(size)
        settings = settings or self.settings
        frame = fit(reference.shape[:2], size, framing)
        sizes = (reference_pose.size, driving_pose.size)
        thresholds = (reference_pose.threshold, driving_pose.threshold)
        alignment = (
            retarget(
                self.alignment,
                (reference_pose.keypoints, reference_pose.score),
                (driving_pose.keypoints, driving_pose.score),
                sizes,
                thresholds,
                settings.alignment,
            )
            if align
            else unaligned(driving_pose.keypoints, sizes)
        )
        poses = pose_images(
            frame.points(alignment.keypoints),
            driving_pose.score,
            size,
            driving_pose.threshold,
            self.config.pose_style,
        )
        generator = torch.Generator().manual_seed(seed)
        conditions = self._conditions(reference, face, frame, poses, fps, generator)
        frames = self._generate(conditions, settings, generator, on_step)
        return AnimationResult(
            _crop(frames, frame), _crop(poses, frame), alignment, frame, settings
        )

    def frame_size(self, size: tuple[int, int] | None) -> tuple[int, int]:
        """(height, width) to work at: the one asked for, or the model's own.

        Raises:
            ValueError: for one that the network cannot halve as often as it does.
        """
        if size is None:
            return self.config.height, self.config.width
        multiple = self.config.size_multiple
        if len(size) != 2 or min(size) < multiple or any(side % multiple for side in size):
            raise ValueError(
                f"Got a size of {'x'.join(map(str, size))}, but expected height and width as "
                f"multiples of {multiple} pixels; this model was made for "
                f"{self.config.height}x{self.config.width}."
            )
        return size

    def _conditions(
        self,
        reference: np.ndarray,
        face: Face | None,
        frame: Framing,
        poses: np.ndarray,
        fps: float,
        generator: torch.Generator,
    ) -> Conditions:
        """Everything that is computed once a clip."""
        framed = frame.image(reference)
        image = to_tensor(framed)[None].to(self.device)
        if face is not None and not self.encoder.needs_full_frames:
            face = replace(face, box=frame.boxes(face.box))
        embedding = self.encoder.face_embedding(
            reference if self.encoder.needs_full_frames else framed, face
        )
        native = self.encoder.token_takes_native
        token = self.encoder.image_token(
            to_tensor(reference)[None].to(self.device) if native else image
        )
        context = self.animator.context(token, embedding[None].to(self.device))
        noise = torch.randn(image.shape, generator=generator).to(image)
        noisy = image + self.config.noise_augmentation * noise
        features = [
            self.animator.pose_net(to_tensor(part).to(self.device, context.dtype))
            for part in np.split(poses, range(POSE_CHUNK, len(poses), POSE_CHUNK))
        ]
        return Conditions(
            context,
            torch.cat(features),
            self.encoder.reference_latents(noisy).float(),
            self.encoder.time_ids(fps, 1).to(self.device),
        )

    def _generate(
        self,
        conditions: Conditions,
        settings: AnimationSettings,
        generator: torch.Generator,
        on_step: OnStep | None,
    ) -> np.ndarray:
        sampling, window = settings.sampling, self.config.num_frames
        sigmas = edm.karras_sigmas(
            sampling.steps, sampling.sigma_min, sampling.sigma_max, sampling.rho
        ).to(self.device)
        shape = (1, len(conditions.features), *conditions.reference.shape[1:])
        noise = torch.randn(shape, generator=generator).to(conditions.reference)
        latents = sample(
            GuidedDenoiser(self.animator, conditions, settings.guidance, window, settings.windows),
            noise * sigmas[0],
            sigmas,
            sampling,
            generator=generator,
            on_step=None if on_step is None else lambda i: on_step(i + 1, sampling.steps),
        )
        if not latents.isfinite().all():
            raise ValueError(
                "Sampling ended in numbers that are not finite: try another --dtype (fp32 is the "
                "safest) or the model's own sampler settings."
            )
        return to_frames(self.encoder.codec.decode(latents[0]))


def read_settings(about: dict[str, Any]) -> AnimationSettings:
    """How a model is sampled, from its folder's `config.json`; guidance may be one number."""
    guidance = about.get("guidance", 1.0)
    return AnimationSettings(
        sampling=from_dict(SamplerConfig, about.get("sampling", {})),
        guidance=from_dict(GuidanceConfig, guidance)
        if isinstance(guidance, dict)
        else GuidanceConfig.constant(float(guidance)),
        windows=from_dict(WindowConfig, about.get("windows", {})),
        alignment=from_dict(AlignmentSettings, about.get("alignment_settings", {})),
    )


def _crop(frames: np.ndarray, framing: Framing) -> np.ndarray:
    """Cut the padding away, to an even size: the output has the reference's own shape."""
    x0, y0, x1, y1 = framing.inner_box()
    x1, y1 = x1 - (x1 - x0) % 2, y1 - (y1 - y0) % 2
    return np.ascontiguousarray(frames[:, y0:y1, x0:x1])
