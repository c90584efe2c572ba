"""The animation pipeline: a saved model as one callable, in the manner of a diffusers pipeline.

Shapes: T frames, P people, N = 18 keypoints, H W output size, C latent channels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from animator import edm
from animator.alignment import AlignmentBlock
from animator.keypoints import VISIBLE
from animator.model import Animator
from animator.weights import load_alignment, read_config
from inference.conditioning import (
    ReferenceEncoder,
    added_time_ids,
    pose_images,
    to_frames,
    to_tensor,
)
from inference.retarget import Retargeted, retarget, unaligned
from inference.sampler import SamplerConfig, sample
from inference.windows import blend_windows
from pipelines.faces import Face
from pipelines.framing import Framing, fit
from pipelines.overrides import from_dict

OnStep = Callable[[int, int], None]  # (steps done, steps in all); may raise to stop
NOISE_AUGMENTATION = 0.02  # deviation on the reference's pixels (v1)


@dataclass(frozen=True)
class Pose:
    """Keypoints `(..., N, 2)` in 0..1 of a frame of `size` (height, width), and their score."""

    keypoints: np.ndarray
    score: np.ndarray
    size: tuple[int, int]
    threshold: float = VISIBLE


@dataclass(frozen=True)
class AnimationResult:
    """What the pipeline made."""

    frames: np.ndarray  # (T, H, W, 3) uint8
    pose_frames: np.ndarray  # (T, H, W, 3) uint8, the poses that drove them
    alignment: Retargeted
    framing: Framing
    sampling: SamplerConfig
    guidance: float


class AnimationPipeline:
    """Animator, alignment block and frozen encoders, ready to run.

    Args:
        animator: in evaluation mode.
        encoder: the frozen encoders that its configuration names.
        alignment: the learned block, or None for the closed form.
        sampling: the model's own sampler settings.
    """

    def __init__(
        self,
        animator: Animator,
        encoder: ReferenceEncoder,
        alignment: AlignmentBlock | None,
        sampling: SamplerConfig,
        guidance: float = 1.0,
    ):
        self.animator = animator
        self.encoder = encoder
        self.alignment = alignment
        self.sampling = sampling
        self.guidance = guidance
        self.config = animator.config

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        face: str = "auto",
        alignment: str | Path | None = None,
        device: str | torch.device | None = None,
    ) -> "AnimationPipeline":
        """Load a model folder; `alignment` names another one to take the alignment block from.

        Raises:
            ValueError: for a folder that does not hold what is needed (see `WeightsError`).
        """
        folder = Path(folder)
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        animator = Animator.from_pretrained(folder).to(place)
        encoder = ReferenceEncoder(animator.config, folder, face).to(place)
        block = load_alignment(Path(alignment) if alignment else folder)
        about = read_config(folder)
        sampling = from_dict(SamplerConfig, about.get("sampling", {}))
        return cls(animator, encoder, block, sampling, float(about.get("guidance", 1.0)))

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
        per_frame: bool = False,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        overlap: int | None = None,
        on_step: OnStep | None = None,
    ) -> AnimationResult:
        """Animate the person of a picture.

        Args:
            reference: uint8 RGB `(H0, W0, 3)`.
            reference_pose: keypoints `(N, 2)`.
            driving_pose: keypoints `(T, P, N, 2)`.
            fps: of the driving clip.
            face: the reference's face, or None where it has none.
            framing: how the reference is fitted into the model's size: pad or crop.
            align: False draws the driving poses where they are.
            per_frame: one transform a frame instead of one a clip.
            guidance: classifier-free guidance; 1 is none.
            overlap: frames that neighbouring windows share; a quarter of a window by default.

        Raises:
            ValueError: for options out of range.
        """
        size = (self.config.height, self.config.width)
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
                per_frame=per_frame,
            )
            if align
            else unaligned(driving_pose.keypoints, sizes)
        )
        poses = pose_images(
            frame.points(alignment.keypoints), driving_pose.score, size, driving_pose.threshold
        )
        sampling = replace(self.sampling, steps=steps or self.sampling.steps)
        strength = self.guidance if guidance is None else guidance
        conditions = self._conditions(reference, face, frame, poses, fps)
        frames = self._generate(conditions, sampling, strength, seed, overlap, on_step)
        return AnimationResult(
            _crop(frames, frame), _crop(poses, frame), alignment, frame, sampling, strength
        )

    def _conditions(
        self,
        reference: np.ndarray,
        face: Face | None,
        frame: Framing,
        poses: np.ndarray,
        fps: float,
    ) -> dict[str, Any]:
        """Everything that is computed once a clip."""
        framed = frame.image(reference)
        image = to_tensor(framed)[None].to(self.device)
        if face is not None and not self.encoder.needs_full_frames:
            face = replace(face, box=frame.boxes(face.box))
        embedding = self.encoder.face_embedding(
            reference if self.encoder.needs_full_frames else framed, face
        )
        token = self.encoder.image_token(image)
        context = self.animator.context(token, embedding[None].to(token))
        pose_tensor = to_tensor(poses).split(16)
        return {
            "context": context,
            "no_context": torch.zeros_like(context),
            "features": torch.cat([self.animator.pose_net(p.to(token)) for p in pose_tensor]),
            "reference": self.encoder.reference_latents(image),
            "time_ids": added_time_ids(fps, NOISE_AUGMENTATION, 1).to(token),
        }

    def _generate(
        self,
        conditions: dict[str, Any],
        sampling: SamplerConfig,
        guidance: float,
        seed: int,
        overlap: int | None,
        on_step: OnStep | None,
    ) -> np.ndarray:
        features, reference = conditions["features"], conditions["reference"]
        window = self.config.num_frames
        sigmas = edm.karras_sigmas(
            sampling.steps, sampling.sigma_min, sampling.sigma_max, sampling.rho
        ).to(self.device)
        generator = torch.Generator().manual_seed(seed)
        shape = (1, len(features), *reference.shape[1:])
        noise = torch.randn(shape, generator=generator).to(reference)

        def network(scaled: Tensor, timestep: Tensor, frames: slice, *, given: bool) -> Tensor:
            still = reference[:, None].expand(-1, scaled.shape[1], -1, -1, -1)
            sample_in = torch.cat([scaled, still if given else torch.zeros_like(still)], dim=2)
            context = conditions["context" if given else "no_context"]
            pose = features[frames] if given else None
            return self.animator.denoise(sample_in, timestep, context, pose, conditions["time_ids"])

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            def guided(part: Tensor, frames: slice) -> Tensor:
                def both(scaled: Tensor, timestep: Tensor) -> Tensor:
                    with_all = network(scaled, timestep, frames, given=True)
                    if guidance == 1.0:
                        return with_all
                    without = network(scaled, timestep, frames, given=False)
                    return without + guidance * (with_all - without)

                return edm.precondition(
                    both,
                    part,
                    sigma.reshape(1),
                    self.config.sigma_data,
                    self.config.prediction,
                )

            shared = window // 4 if overlap is None else overlap
            return blend_windows(guided, x, window, shared)

        latents = sample(
            denoise,
            noise * sigmas[0],
            sigmas,
            sampling,
            generator=generator,
            on_step=None if on_step is None else lambda i: on_step(i + 1, sampling.steps),
        )
        return to_frames(self.encoder.codec.decode(latents[0]))


def _crop(frames: np.ndarray, framing: Framing) -> np.ndarray:
    """Cut the padding away, to an even size: the output has the reference's own shape."""
    x0, y0, x1, y1 = framing.inner_box()
    x1, y1 = x1 - (x1 - x0) % 2, y1 - (y1 - y0) % 2
    return np.ascontiguousarray(frames[:, y0:y1, x0:x1])
