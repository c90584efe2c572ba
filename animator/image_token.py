"""Image tokens: what the reference picture shows, as one vector for every cross-attention.

`ClipImageToken` is the encoder of Stable Video Diffusion; `ThumbnailToken` needs no weights and
stands in for it on a bare machine.

Shapes: B batch, H W pixels, D context width.
"""

from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from animator import licences
from animator.spectrum import ThumbnailSpectrum

SIDE = 16
NAMES = ("thumbnail", "clip_vision")
# Of the pictures that CLIP was trained on, in 0..1 (OpenAI).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
WHOLE, HALF = "model.safetensors", "model.fp16.safetensors"
PROJECTION = "visual_projection.weight"


class ImageTokenError(ValueError):
    """An image encoder that cannot be opened or does not fit; the message says how to mend it."""


class ThumbnailToken(nn.Module):
    """Colours and layout of a 16x16 thumbnail as one token; no semantics."""

    name = "thumbnail"
    licence = "none needed (no weights)"
    takes_native = False

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim
        self.spectrum = ThumbnailSpectrum(dim, SIDE)

    def resize(self, images: Tensor) -> Tensor:
        """Images of any size as they are taken, so that they can be stacked; twice is as once."""
        return F.interpolate(images.float(), (SIDE, SIDE), mode="area")

    def forward(self, images: Tensor) -> Tensor:
        """`(B, 3, H, W)` in [-1, 1] to `(B, 1, D)`."""
        return rearrange(self.spectrum(images), "b d -> b 1 d")


class ClipImageToken(nn.Module):
    """A CLIP vision tower with its projection, frozen, fed as Stable Video Diffusion feeds it.

    Args:
        encoder: a `transformers.CLIPVisionModelWithProjection`.
    """

    name = "clip_vision"
    takes_native = True  # the picture at its own size: it is shrunk once, here

    def __init__(self, encoder: nn.Module, licence: str = licences.CLIP):
        super().__init__()
        self.encoder: Any = encoder.requires_grad_(False)
        self.licence = licence
        self.dim = int(self.encoder.config.projection_dim)
        self.side = int(self.encoder.config.image_size)
        self.eval()

    @classmethod
    def from_folder(cls, folder: str | Path, dtype: torch.dtype | None = None) -> Self:
        """The encoder of an `image_encoder` folder: `config.json` and one safetensors file.

        Args:
            dtype: to compute in; None is the file's own.

        Raises:
            ImageTokenError: for a folder without these files, or whose files do not fit.
        """
        folder = Path(folder)
        weights = _weights(folder, dtype)
        stored = _stored_type(weights)
        from transformers import CLIPVisionModelWithProjection
        from transformers.utils import logging

        tower: Any = CLIPVisionModelWithProjection
        progress_bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            encoder, report = tower.from_pretrained(
                folder,
                dtype=dtype or stored,
                variant="fp16" if weights.name == HALF else None,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
        except Exception as error:  # whatever transformers and its libraries raise for two files
            raise ImageTokenError(
                f"{folder}: config.json and {weights.name} do not fit ({_first_line(error)}); "
                "copy the whole folder again"
            ) from error
        finally:
            if progress_bars:
                logging.enable_progress_bar()
        if missing := sorted(report["missing_keys"]):
            raise ImageTokenError(
                f"{weights}: lacks {len(missing)} tensors ({missing[0]}, ...); "
                "copy the whole folder again"
            )
        return cls(encoder)

    def train(self, mode: bool = True) -> Self:
        """Frozen: it stays as at inference, whatever it is part of."""
        return super().train(False)

    def resize(self, images: Tensor) -> Tensor:
        """Images of any size as they are taken, so that they can be stacked; twice is as once.

        Raises:
            ValueError: for images with a side below two pixels.
        """
        return resize_antialiased(images.float(), (self.side, self.side))

    def forward(self, images: Tensor) -> Tensor:
        """`(B, 3, H, W)` in [-1, 1] at their own size to `(B, 1, D)`, in the encoder's type.

        Raises:
            ValueError: for images with a side below two pixels.
        """
        small = self.resize(images)
        mean, std = (small.new_tensor(c)[:, None, None] for c in (CLIP_MEAN, CLIP_STD))
        pixels = ((small + 1) / 2 - mean) / std
        embeds = self.encoder(pixel_values=pixels.to(self.encoder.dtype)).image_embeds
        return rearrange(embeds, "b d -> b 1 d")


def _weights(folder: Path, dtype: torch.dtype | None) -> Path:
    """The safetensors file to read; the smaller one where half precision is asked for."""
    if not (folder / "config.json").is_file():
        raise ImageTokenError(
            f"{folder}: no image encoder; expected a folder with config.json and {WHOLE}"
        )
    order = (HALF, WHOLE) if dtype in (torch.float16, torch.bfloat16) else (WHOLE, HALF)
    for name in order:
        if (folder / name).is_file():
            return folder / name
    given = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_file()))
    raise ImageTokenError(
        f"{folder}: holds {given}, but expected {WHOLE} or {HALF}; pickled weights (.bin, .pth) "
        "are not read, since they can run code"
    )


def _stored_type(weights: Path) -> torch.dtype:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, framework="pt") as file:
            return file.get_tensor(PROJECTION).dtype
    except (SafetensorError, OSError) as error:
        raise ImageTokenError(
            f"{weights}: is no CLIP vision tower with a projection ({error}); copy it again"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def resize_antialiased(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images stretched to (height, width): blurred where they shrink, then bicubic.

    The blur is a Gaussian of two standard deviations to each side, (factor - 1) / 2 pixels a
    deviation, as diffusers prepares pictures for Stable Video Diffusion's encoder.

    Args:
        images: `(B, C, H, W)`, floating-point, at least two pixels a side.
    """
    height, width = images.shape[-2:]
    if min(height, width) < 2:
        raise ValueError(f"Got images of {height}x{width} pixels, but expected 2x2 or more.")
    planes = rearrange(images, "b c h w -> (b c) 1 h w")
    across = _gaussian(width / size[1], images)
    planes = F.pad(planes, (len(across) // 2, len(across) // 2, 0, 0), mode="reflect")
    planes = F.conv2d(planes, across[None, None, None, :])
    down = _gaussian(height / size[0], images)
    planes = F.pad(planes, (0, 0, len(down) // 2, len(down) // 2), mode="reflect")
    planes = F.conv2d(planes, down[None, None, :, None])
    blurred = rearrange(planes, "(b c) 1 h w -> b c h w", c=images.shape[1])
    return F.interpolate(blurred, size, mode="bicubic", align_corners=True)


def _gaussian(factor: float, like: Tensor) -> Tensor:
    """Weights of the blur before shrinking by a factor; one weight of 1 where it grows."""
    sigma = max((factor - 1) / 2, 0.001)
    length = int(max(4 * sigma, 3)) // 2 * 2 + 1
    offset = torch.arange(length, device=like.device, dtype=like.dtype) - length // 2
    weights = torch.exp(-offset.square() / (2 * sigma**2))
    return weights / weights.sum()


def open_image_token(
    name: str, dim: int, folder: Path | None, dtype: torch.dtype | None = None
) -> ThumbnailToken | ClipImageToken:
    """The image encoder that a model's configuration names.

    Args:
        dim: the width of the token that the model takes.
        folder: of an encoder with weights.
        dtype: for its weights; None is the file's own.

    Raises:
        ImageTokenError: a ValueError, for an unknown name, files that are missing, or another dim.
    """
    if name == "thumbnail":
        return ThumbnailToken(dim)
    if name != "clip_vision":
        raise ImageTokenError(f"Got image token {name!r}, but expected one of {', '.join(NAMES)}.")
    if folder is None:
        raise ImageTokenError(
            "The image token clip_vision has weights of its own: expected an image_encoder folder "
            f"with config.json and {WHOLE} beside the model's."
        )
    encoder = ClipImageToken.from_folder(folder, dtype)
    if encoder.dim != dim:
        raise ImageTokenError(
            f"{folder}: gives tokens of {encoder.dim} numbers, but the model takes {dim}; use the "
            "encoder that the model was trained with"
        )
    return encoder
