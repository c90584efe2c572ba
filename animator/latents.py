"""Latent codecs: frames to latents and back, behind one small protocol.

Shapes: T frames, H W pixels, C latent channels, h w latent size.
"""

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import (
    AutoencoderKLTemporalDecoder,
)
from torch import Tensor, nn

from animator.block_dct import BlockDCT
from animator.decoder_windows import Latents, stream_windows, window_spans
from animator.temporal_decoder import decode_clip, frame_bytes

# diffusers' name of a model's weights, without its endings.
WEIGHTS = "diffusion_pytorch_model"


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

    def decode_stream(self, latents: Latents) -> Iterator[Tensor]:
        """What `decode` gives, in order, in parts `(t, 3, H, W)` of a bounded number of frames."""
        ...

    def decode_spans(self, latents: Latents) -> list[tuple[int, int]]:
        """First and last + 1 frame of what is decoded together; neighbours may overlap."""
        ...


class TemporalVAE(nn.Module):
    """Stable Video Diffusion's VAE, frozen.

    The reference is the distribution's mode, not multiplied by the scaling factor (method of
    the paper); targets are multiplied. Latents and frames come out in the decoder's data type.

    Args:
        vae: its encoder is kept in float32 where the decoder is float16 and the configuration
            says `force_upcast`: the published encoder overflows in half precision.
        chunk_size: frames computed at a time; changes memory and time alone.
        max_buffer_bytes: decides how long a clip is decoded as one pass, see
            `animator.decoder_windows.decode_windows`. 16 GiB are 113 frames of 576x1024 pixels
            in half precision, and half as many in float32.
        overlap: frames that the windows of a longer clip share.
        max_frames: of one pass, so that memory does not grow with the length of a clip.
        gradient_frames: frames of one pass where the latents ask for a gradient.
    """

    spatial_factor = 8
    licence = "Stability AI Community Licence (the weights of Stable Video Diffusion)"

    def __init__(
        self,
        vae: AutoencoderKLTemporalDecoder,
        chunk_size: int = 2,
        *,
        max_buffer_bytes: int = 16 * 2**30,
        overlap: int = 16,
        max_frames: int = 64,
        gradient_frames: int = 8,
    ):
        super().__init__()
        self.vae = vae.eval().requires_grad_(False)
        self.latent_channels: int = vae.config["latent_channels"]
        self.scaling_factor: float = vae.config["scaling_factor"]
        self.chunk_size = chunk_size
        self.max_buffer_bytes = max_buffer_bytes
        self.overlap = overlap
        self.max_frames = max_frames
        self.gradient_frames = gradient_frames

    @classmethod
    def from_folder(cls, folder: Path, dtype: torch.dtype | None = None) -> "TemporalVAE":
        """A VAE folder in diffusers' layout; safetensors only, nothing is downloaded.

        Args:
            folder: with `config.json` and the weights, as `diffusion_pytorch_model.safetensors`
                or as its `fp16` variant; the former is taken where both are there.
            dtype: of the decoder, and of the encoder unless it is kept in float32; float32
                where None, whichever file was read.

        Raises:
            ValueError: for a folder without either file.
        """
        names = {None: f"{WEIGHTS}.safetensors", "fp16": f"{WEIGHTS}.fp16.safetensors"}
        present = [variant for variant, name in names.items() if (folder / name).is_file()]
        if not present or not (folder / "config.json").is_file():
            raise ValueError(
                f"Got the VAE folder {folder}, but expected it to hold config.json and one of "
                f"{' and '.join(names.values())}: copy the published model's vae folder there."
            )
        vae = AutoencoderKLTemporalDecoder.from_pretrained(
            str(folder),
            local_files_only=True,
            use_safetensors=True,
            variant=present[0],
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,  # the default wants `accelerate`, and says so every time
        )
        if dtype is not None:
            vae.decoder.to(dtype)
            if not (dtype == torch.float16 and vae.config["force_upcast"]):
                vae.encoder.to(dtype)
                vae.quant_conv.to(dtype)
        return cls(vae)

    @property
    def dtype(self) -> torch.dtype:
        """Of the decoder, of latents and of frames; the encoder's may be wider."""
        return next(self.vae.decoder.parameters()).dtype

    def _mode(self, frames: Tensor) -> Tensor:
        if self.dtype == torch.float16 and self.vae.config["force_upcast"]:
            self.vae.encoder.float()
            self.vae.quant_conv.float()
        dtype = next(self.vae.encoder.parameters()).dtype
        modes = []
        for chunk in frames.split(self.chunk_size):
            (distribution,) = self.vae.encode(chunk.to(dtype), return_dict=False)
            modes.append(distribution.mode())
        return torch.cat(modes)

    def encode(self, frames: Tensor) -> Tensor:
        return (self._mode(frames) * self.scaling_factor).to(self.dtype)

    def encode_reference(self, frames: Tensor) -> Tensor:
        return self._mode(frames).to(self.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Frames `(T, 3, H, W)` from `(T, C, h, w)`, all of one clip.

        The same as one pass over the clip, in cross-faded windows where it is longer than
        `max_frames` or its buffers exceed `max_buffer_bytes` (`animator.temporal_decoder`). Where
        gradients are on and the latents ask for one, passes of `gradient_frames` are made instead,
        each a clip of its own to the decoder.
        """
        if torch.is_grad_enabled() and latents.requires_grad:
            scaled = latents.float() / self.scaling_factor
            chunks = scaled.to(self.dtype).split(self.gradient_frames)
            decoded = [self.vae.decode(c, num_frames=len(c), return_dict=False)[0] for c in chunks]
            return torch.cat(decoded)
        return torch.cat(list(self.decode_stream(latents)))

    def decode_stream(self, latents: Latents) -> Iterator[Tensor]:
        """Frames `(t, 3, H, W)` of a clip, a window at a time."""
        return stream_windows(
            self.vae.decoder,
            latents,
            max_buffer_bytes=self.max_buffer_bytes,
            overlap=self.overlap,
            max_frames=self.max_frames,
            decode=self._decode_window,
        )

    def decode_spans(self, latents: Latents) -> list[tuple[int, int]]:
        """The windows that `decode_stream` fades into each other."""
        one = frame_bytes(self.vae.decoder, latents[0:1].to(self.dtype))
        fit = min(self.max_buffer_bytes // one, self.max_frames)
        return window_spans(len(latents), fit, self.overlap)

    def _decode_window(self, latents: Tensor) -> Tensor:
        decode = partial(decode_clip, chunk_size=self.chunk_size)
        scaled = latents.float() / self.scaling_factor
        frames = decode(self.vae.decoder, scaled.to(self.dtype))
        if self.dtype == torch.float16 and not frames.isfinite().all():
            # Latents far from those of pictures leave float16's range within the decoder.
            frames = decode(copy.deepcopy(self.vae.decoder).float(), scaled)
            limits = torch.finfo(torch.float16)
            frames = frames.clamp(limits.min, limits.max).to(torch.float16)
        return frames


def open_codec(
    name: str, folder: Path | None = None, dtype: torch.dtype | None = None
) -> LatentCodec:
    """The codec a configuration names.

    Args:
        name: `block_dct`, or `temporal_vae` with the folder that holds its weights.
        dtype: of weights; None is float32.

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
        return TemporalVAE.from_folder(folder, dtype)
    raise ValueError(f"Got codec {name!r}, but expected block_dct or temporal_vae.")
