"""The animator: UNet, PoseNet and Face Encoder as one module, and its forward pass.

Shapes: B batch, T frames, C latent channels, H W pixels, h w latent size (H/8, W/8),
D context width, E face embedding, F face tokens, P people.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from animator.config import AnimatorConfig
from animator.face_encoder import FaceEncoder, FaceProjection
from animator.face_gradient import limit_gradient
from animator.pose_net import PoseNet
from animator.tensor_files import MAX_SHARD_SIZE, load_component
from animator.unet import build_unet, face_regions, pose_features
from animator.weights import ANIMATOR_PARTS, animator_sizes, save_model


class Animator(nn.Module):
    """Denoiser conditioned on a reference image, its face and a driving pose (paper III-B).

    Everything that is frozen in training (latent codec, image encoder, face embedder, alignment
    block) stays outside.
    """

    def __init__(self, config: AnimatorConfig):
        super().__init__()
        self.config = config
        # In training: see `animator.face_gradient`; None limits nothing.
        self.face_gradient_limit: float | None = None
        self.unet = build_unet(config)
        self.pose_net, self.face_encoder = conditioning_networks(config)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> "Animator":
        """The animator of a model folder, in evaluation mode.

        Weights are read one tensor at a time into a model without storage, so at no time are
        there two copies in memory.

        Args:
            dtype: type of the weights; None keeps that of the files.

        Raises:
            WeightsError: for a folder without an animator, and for files that do not fit.
        """
        folder = Path(folder)
        sizes = animator_sizes(folder)
        with torch.device("meta"):
            model = cls(sizes)
        for part in ANIMATOR_PARTS:
            component: nn.Module = getattr(model, part)
            load_component(component, folder, part, dtype)
            component.to(device)
        return model.eval()

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        about: Mapping[str, Any] | None = None,
        max_shard_size: int | str = MAX_SHARD_SIZE,
    ) -> None:
        """Write a model folder that `from_pretrained` reads back bit for bit.

        Args:
            about: what else to record in `config.json`: data, licences, how it is sampled.
            max_shard_size: a larger component is split into several files (bytes, or "5GB").
        """
        save_model(
            Path(folder),
            animator=(self.config, self.state_dict()),
            about=about,
            max_shard_size=max_shard_size,
        )

    @property
    def place(self) -> torch.device:
        """Where inputs belong, also while the UNet's weights wait elsewhere."""
        return next(self.pose_net.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights, and of the prediction."""
        return self.unet.conv_in.weight.dtype

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        image_token: Tensor,
        face_embedding: Tensor | None,
        pose_images: Tensor | None,
        added_time_ids: Tensor,
        keep_face: Tensor | None = None,
        keep_pose: Tensor | None = None,
    ) -> Tensor:
        """v-prediction of a clip, with all three conditioning paths.

        Inputs may be of any floating-point type; they are used in that of the weights. The
        unconditional call of classifier-free guidance is the same `sample` with zero reference
        latents, a zero `image_token`, and None for `face_embedding` and `pose_images`.

        Args:
            sample: scaled noisy latents and reference latents on the channels,
                `(B, T, 2C, h, w)`.
            timestep: 0.25 ln sigma, `(B,)`.
            image_token: `(B, 1, D)`; zeros in the unconditional call.
            face_embedding: `(B, E)`, or None for zero face tokens (the unconditional call).
            pose_images: drawn poses in [-1, 1], `(B·T, 3, H, W)`, or None for no pose.
            added_time_ids: frames per second - 1, motion bucket, noise level; `(B, 3)`.
            keep_face, keep_pose: `(B,)` of 0 and 1: a clip with 0 gets zero face tokens, or no
                pose, as if it had been None for this clip alone; None keeps all.

        Returns:
            `(B, T, C, h, w)`.

        Raises:
            ValueError: for inputs whose shapes do not fit the configuration or each other.
        """
        self._check(sample)
        self._check_conditions(
            sample,
            image_token=image_token,
            face_embedding=face_embedding,
            pose_images=pose_images,
            added_time_ids=added_time_ids,
            keep_face=keep_face,
            keep_pose=keep_pose,
        )
        features = None if pose_images is None else self.pose_net(pose_images.to(self.dtype))
        if features is not None and keep_pose is not None:
            features = features * _of_frames(keep_pose, sample.shape[1], features)
        context = self.context(image_token, face_embedding, keep_face)
        output = self.denoise(sample, timestep, context, features, added_time_ids)
        if self.training and self.face_gradient_limit is not None:
            limit_gradient(context, output, self.face_gradient_limit)
        return output

    def context(
        self, image_token: Tensor, face_embedding: Tensor | None, keep_face: Tensor | None = None
    ) -> Tensor:
        """Image token and face tokens, `(B, 1 + F, D)`: what every cross-attention sees.

        Args:
            keep_face: `(B,)` of 0 and 1; the face tokens of a clip with 0 are zeros.
        """
        image_token = image_token.to(self.dtype)
        if face_embedding is None:
            shape = (len(image_token), self.config.num_face_tokens, image_token.shape[-1])
            face_tokens = image_token.new_zeros(shape)
        else:
            face_tokens = self.face_encoder(face_embedding.to(self.dtype), image_token)
            if keep_face is not None:
                face_tokens = face_tokens * keep_face.to(face_tokens).reshape(-1, 1, 1)
        return torch.cat([image_token, face_tokens], dim=1)

    def context_of_people(self, image_token: Tensor, face_embeddings: Tensor) -> Tensor:
        """Image token `(1, 1, D)` and the face tokens of P people, `(1, 1 + P·F, D)`.

        Args:
            face_embeddings: one a person, `(P, E)`.
        """
        tokens = image_token.expand(len(face_embeddings), -1, -1)
        people = self.context(tokens, face_embeddings)
        return torch.cat([people[:1, :1], people[:, 1:].flatten(0, 1)[None]], dim=1)

    def denoise(
        self,
        sample: Tensor,
        timestep: Tensor,
        context: Tensor,
        features: Tensor | None,
        added_time_ids: Tensor,
        regions: Tensor | None = None,
    ) -> Tensor:
        """The UNet alone, on a context and pose features `(B·T, C0, h, w)` computed before.

        A sampler computes both once a clip and calls this once a step.

        Args:
            regions: with a context of several people, whose place each latent cell is, from 0,
                `(B·T, h, w)`.

        Raises:
            ValueError: for shapes that do not fit each other.
        """
        self._check(sample)
        self._check_people(sample, context, regions)
        with pose_features(self.unet, features), face_regions(self.unet, regions):
            output: Any = self.unet(
                sample.to(self.dtype),
                timestep,
                context,
                added_time_ids=added_time_ids,
                return_dict=False,
            )
        return output[0]

    def _check_people(self, sample: Tensor, context: Tensor, regions: Tensor | None) -> None:
        people, rest = divmod(context.shape[1] - 1, self.config.num_face_tokens)
        if rest or people < 1 or (people > 1 and regions is None):
            raise ValueError(
                f"Got a context of {context.shape[1]} tokens"
                f"{'' if regions is None else ' and regions'}, but expected one image token and "
                f"{self.config.num_face_tokens} face tokens a person, with regions for several."
            )
        if regions is None:
            return
        expected = (sample.shape[0] * sample.shape[1], *sample.shape[-2:])
        if tuple(regions.shape) != expected or int(regions.max()) >= people:
            raise ValueError(
                f"Got regions {tuple(regions.shape)} of {int(regions.max()) + 1} people, but "
                f"expected {expected} of at most {people}."
            )

    def _check_conditions(self, sample: Tensor, **given: Tensor | None) -> None:
        config, (batch, frames) = self.config, sample.shape[:2]
        height, width = (side * config.spatial_factor for side in sample.shape[-2:])
        expected = {
            "image_token": (batch, 1, config.cross_attention_dim),
            "face_embedding": (batch, config.face_embedding_dim),
            "pose_images": (batch * frames, config.pose_channels[0], height, width),
            "added_time_ids": (batch, 3),
            "keep_face": (batch,),
            "keep_pose": (batch,),
        }
        for name, value in given.items():
            if value is not None and tuple(value.shape) != expected[name]:
                raise ValueError(
                    f"Got {name} of shape {tuple(value.shape)}, but expected {expected[name]} for "
                    f"a sample of shape {tuple(sample.shape)}."
                )

    def _check(self, sample: Tensor) -> None:
        channels = 2 * self.config.latent_channels
        if sample.ndim != 5 or sample.shape[2] != channels:
            raise ValueError(
                f"Got a sample of shape {tuple(sample.shape)}, but expected "
                f"(B, T, {channels}, h, w): noisy and reference latents on the channels."
            )
        multiple = 2 ** (len(self.config.block_out_channels) - 1)
        height, width = sample.shape[-2:]
        if height % multiple or width % multiple:
            raise ValueError(
                f"Got latents of {height} x {width}, but expected multiples of {multiple}. "
                f"Pad the frames to multiples of {self.config.size_multiple} pixels."
            )


def _of_frames(keep: Tensor, num_frames: int, features: Tensor) -> Tensor:
    """`(B,)` to `(B·T, 1, 1, 1)`."""
    return keep.to(features).repeat_interleave(num_frames).reshape(-1, 1, 1, 1)


def conditioning_networks(config: AnimatorConfig) -> tuple[PoseNet, FaceProjection]:
    """PoseNet and Face Encoder of the configured sizes, as they start from scratch."""
    pose_net = PoseNet(config.block_out_channels[0], config.pose_channels)
    width, embedding = config.cross_attention_dim, config.face_embedding_dim
    if config.face_encoder == "projection":
        return pose_net, FaceProjection(width, embedding, config.num_face_tokens)
    face_encoder = FaceEncoder(
        width,
        embedding,
        config.num_face_tokens,
        config.face_encoder_depth,
        config.face_head_dim,
    )
    return pose_net, face_encoder
