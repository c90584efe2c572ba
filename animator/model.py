"""The animator: UNet, PoseNet and Face Encoder as one module, and its forward pass.

Shapes: B batch, T frames, C latent channels, H W pixels, h w latent size (H/8, W/8),
D context width, E face embedding.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from animator.config import AnimatorConfig
from animator.face_encoder import FaceEncoder
from animator.pose_net import PoseNet
from animator.unet import build_unet, pose_features


class Animator(nn.Module):
    """Denoiser conditioned on a reference image, its face and a driving pose (paper III-B).

    Everything that is frozen in training (latent codec, image encoder, face embedder, alignment
    block) stays outside.
    """

    def __init__(self, config: AnimatorConfig):
        super().__init__()
        self.config = config
        self.unet = build_unet(config)
        self.pose_net = PoseNet(config.block_out_channels[0], config.pose_channels)
        self.face_encoder = FaceEncoder(
            config.cross_attention_dim,
            config.face_embedding_dim,
            config.num_face_tokens,
            config.face_encoder_depth,
            config.face_head_dim,
        )

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        image_token: Tensor,
        face_embedding: Tensor | None,
        pose_images: Tensor | None,
        added_time_ids: Tensor,
    ) -> Tensor:
        """v-prediction of a clip.

        Args:
            sample: scaled noisy latents and reference latents on the channels,
                `(B, T, 2C, h, w)`.
            timestep: 0.25 ln sigma, `(B,)`.
            image_token: `(B, 1, D)`; zeros in the unconditional call.
            face_embedding: `(B, E)`, or None for zero face tokens (the unconditional call).
            pose_images: drawn poses in [-1, 1], `(B·T, 3, H, W)`, or None for no pose.
            added_time_ids: frames per second - 1, motion bucket, noise level; `(B, 3)`.

        Returns:
            `(B, T, C, h, w)`.

        Raises:
            ValueError: for a sample whose channels or size do not fit the configuration.
        """
        features = None if pose_images is None else self.pose_net(pose_images)
        return self.denoise(
            sample,
            timestep,
            self.context(image_token, face_embedding),
            features,
            added_time_ids,
        )

    def context(self, image_token: Tensor, face_embedding: Tensor | None) -> Tensor:
        """Image token and face tokens, `(B, 1 + F, D)`: what every cross-attention sees."""
        if face_embedding is None:
            shape = (len(image_token), self.config.num_face_tokens, image_token.shape[-1])
            face_tokens = image_token.new_zeros(shape)
        else:
            face_tokens = self.face_encoder(face_embedding, image_token)
        return torch.cat([image_token, face_tokens], dim=1)

    def denoise(
        self,
        sample: Tensor,
        timestep: Tensor,
        context: Tensor,
        features: Tensor | None,
        added_time_ids: Tensor,
    ) -> Tensor:
        """The UNet alone, on a context and pose features `(B·T, C0, h, w)` computed before.

        A sampler computes both once a clip and calls this once a step.
        """
        self._check(sample)
        with pose_features(self.unet, features):
            output: Any = self.unet(
                sample, timestep, context, added_time_ids=added_time_ids, return_dict=False
            )
        return output[0]

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


def flatten_frames(frames: Tensor) -> Tensor:
    """`(B, T, C, H, W)` to `(B·T, C, H, W)`, as PoseNet takes them."""
    return rearrange(frames, "b t c h w -> (b t) c h w")
