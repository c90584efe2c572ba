"""Latent codecs: frames to latents and back, behind one small protocol.

Shapes: T frames, H W pixels, C latent channels, h w latent size.
"""

from pathlib import Path
from typing import Protocol

import torch
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import (
    AutoencoderKLTemporalDecoder,
)
from torch import Tensor, nn

from animator.block_dct import BlockDCT


class LatentCodec(Protocol):
    """What the animator needs of a codec. Frames are in [-1, 1]."""

    latent_channels: int
    spatial_factor: int
    licence: str

    def encode(self, frames: Tensor) -> Tensor:
        """Latents of about unit spread, `(T, C, h, w)`: what is noised and denoised."""
        ...

    def encode_reference(self, frames: Tensor) -> Tensor:
        """Latents of reference images, on the scale the UNet's reference channels expect."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Frames `(T, 3, H, W)` from latents on the scale of `encode`; not clamped."""
        ...


class TemporalVAE(nn.Module):
    """Stable Video Diffusion's VAE, frozen, decoded a chunk of frames at a time.

    The reference is the distribution's mode, not multiplied by the scaling factor (method of
    the paper); targets are multiplied.
    """

    spatial_factor = 8
    licence = "Stability AI Community Licence (the weights of Stable Video Diffusion)"

    def __init__(self, vae: AutoencoderKLTemporalDecoder, chunk_size: int = 8):
        super().__init__()
        self.vae = vae.eval().requires_grad_(False)
        self.latent_channels: int = vae.config["latent_channels"]
        self.scaling_factor: float = vae.config["scaling_factor"]
        self.chunk_size = chunk_size

    @classmethod
    def from_folder(cls, folder: Path) -> "TemporalVAE":
        """A VAE folder in diffusers' layout; safetensors only, nothing is downloaded."""
        vae = AutoencoderKLTemporalDecoder.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True
        )
        return cls(vae)

    def _mode(self, frames: Tensor) -> Tensor:
        modes = []
        for chunk in frames.to(self.vae.dtype).split(self.chunk_size):
            (distribution,) = self.vae.encode(chunk, return_dict=False)
            modes.append(distribution.mode())
        return torch.cat(modes)

    def encode(self, frames: Tensor) -> Tensor:
        return self._mode(frames) * self.scaling_factor

    def encode_reference(self, frames: Tensor) -> Tensor:
        return self._mode(frames)

    def decode(self, latents: Tensor) -> Tensor:
        chunks = (latents.to(self.vae.dtype) / self.scaling_factor).split(self.chunk_size)
        decoded = [self.vae.decode(c, num_frames=len(c), return_dict=False)[0] for c in chunks]
        return torch.cat(decoded)


def open_codec(name: str, folder: Path | None = None) -> LatentCodec:
    """The codec a configuration names.

    Args:
        name: `block_dct`, or `temporal_vae` with the folder that holds its weights.

    Raises:
        ValueError: for another name, or for `temporal_vae` without a folder.
    """
    if name == "block_dct":
        return BlockDCT()
    if name == "temporal_vae":
        if folder is None or not folder.is_dir():
            raise ValueError(
                f"Got codec temporal_vae with the folder {folder}, but expected a folder with a "
                "Stable Video Diffusion VAE (config.json and safetensors)."
            )
        return TemporalVAE.from_folder(folder)
    raise ValueError(f"Got codec {name!r}, but expected block_dct or temporal_vae.")
