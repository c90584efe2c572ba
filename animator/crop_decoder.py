"""Decoding a part of the picture with gradient, as the decode of the whole frame would show it.

A crop of the latents, decoded alone, is not the crop of the picture: group norms take their mean
and spread from the whole frame (the temporal ones from the whole clip), the middle block's
attention reads the whole frame, and temporal convolutions read the frames before and after. So one
pass over whole frames, without gradient, notes all of that, and crops are then decoded by what was
noted: with its norms held fixed, their queries on the whole frame's keys and values (their own
tokens' are live), and beside the noted neighbours in time. What is left of the difference is that
convolutions see zeros beyond the crop's edge: a halo keeps them away from what matters.

Shapes: T frames of the clip, t frames of a piece, C channels, G groups, h w latent size,
H W = 8h 8w pixels, N = h w tokens.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D, SpatioTemporalResBlock
from einops import rearrange
from torch import Tensor, nn

from animator.latents import LatentCodec, TemporalVAE
from animator.temporal_decoder import (
    PerFrame,
    Watcher,
    activate,
    convolve_frames,
    decode_clip,
    stages_of,
)

Statistics = Literal["frame", "crop"]
Factors = tuple[Tensor, Tensor]  # what a norm multiplies by and adds, float32
Normalise = Callable[[nn.GroupNorm, Tensor], Tensor]
# Keys and values of all tokens that an attention layer's queries see, from those of its input.
Seen = Callable[[Attention, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive frames of a clip and a box of their latents, in cells."""

    start: int
    stop: int
    top: int
    left: int
    height: int
    width: int

    def of(self, latents: Tensor, scale: int = 1) -> Tensor:
        """The box's part `(..., height, width)` of all frames; `scale` cells a latent cell."""
        rows = slice(self.top * scale, (self.top + self.height) * scale)
        columns = slice(self.left * scale, (self.left + self.width) * scale)
        return latents[..., rows, columns]

    def tokens(self, size: tuple[int, int], device: torch.device) -> Tensor:
        """Which tokens of a frame of (h, w) cells lie in the box: bool `(N,)`."""
        inside = torch.zeros(size, dtype=torch.bool, device=device)
        self.of(inside)[...] = True
        return inside.flatten()


class CropDecoder(Protocol):
    """Pictures of pieces of a clip's latents, on the scale of the codec."""

    def look(self, latents: Tensor, pieces: Sequence[Piece]) -> Tensor | None:
        """Prepare to decode these pieces of a clip `(T, C, h, w)`.

        Returns:
            frames `(T, 3, H, W)` of the clip where it had to be decoded for that, else None.
        """
        ...

    def decode(self, latents: Tensor, number: int) -> Tensor:
        """Picture `(t, 3, 8 height, 8 width)` of a piece's latents `(t, C, height, width)`.

        Differentiable in the latents; `number` counts the pieces that `look` was given.
        """
        ...

    def forget(self) -> None:
        """Let go of what `look` noted."""
        ...


def open_crop_decoder(codec: LatentCodec, statistics: Statistics = "frame") -> CropDecoder:
    """What decodes pieces by a codec.

    Args:
        statistics: `frame` borrows from a pass over whole frames what a crop lacks; `crop` decodes
            each piece as if it were the whole clip, which is cheaper and less true. A codec whose
            cells are independent needs neither.
    """
    if statistics == "frame" and isinstance(codec, TemporalVAE):
        return BorrowingDecoder(codec)
    return PlainDecoder(codec)


class PlainDecoder:
    """Pieces decoded as clips of their own."""

    def __init__(self, codec: LatentCodec):
        self.codec = codec

    def look(self, latents: Tensor, pieces: Sequence[Piece]) -> Tensor | None:
        return None

    def decode(self, latents: Tensor, number: int) -> Tensor:
        return self.codec.decode(latents)

    def forget(self) -> None:
        pass


class BorrowingDecoder:
    """Pieces decoded by what a pass over the whole clip noted."""

    def __init__(self, codec: TemporalVAE):
        self.codec = codec
        self.decoder = codec.vae.decoder
        self.stages, self.last = stages_of(self.decoder)
        self.notes: _Notes | None = None

    @torch.no_grad()
    def look(self, latents: Tensor, pieces: Sequence[Piece]) -> Tensor:
        """Note what the pieces need; what was noted before is forgotten."""
        self.notes = None  # before the memory for new ones is needed
        scaled = (latents.float() / self.codec.scaling_factor).to(self.codec.dtype)
        noting = _Noting(pieces, (latents.shape[-2], latents.shape[-1]))
        frames = decode_clip(self.decoder, scaled, chunk_size=self.codec.chunk_size, watcher=noting)
        self.notes = noting.done()
        return frames

    def forget(self) -> None:
        self.notes = None

    def decode(self, latents: Tensor, number: int) -> Tensor:
        if self.notes is None:
            raise RuntimeError("Pieces are decoded by what `look` noted: call it first.")
        replay = _Replay(self.notes, number)
        x = (latents.float() / self.codec.scaling_factor).to(self.codec.dtype)
        for stage in self.stages:
            for layer in stage.per_frame:
                x = replay.layer(layer)(x)
            x = replay.temporal(stage.block, x)
        for layer in self.last:
            x = replay.layer(layer)(x)
        return _by_frame(replay.along_time(self.decoder.time_conv_out, _by_clip(x)))


def _by_clip(x: Tensor) -> Tensor:
    return rearrange(x, "t c h w -> 1 c t h w")


def _by_frame(x: Tensor) -> Tensor:
    return rearrange(x, "1 c t h w -> t c h w")


def _module_of(layer: PerFrame) -> Any:
    """The module that a stage's layer calls."""
    return layer.func if isinstance(layer, partial) else layer


def _with(layer: PerFrame, normalise: Normalise, seen: Seen) -> PerFrame:
    """A layer whose norms and whose view of the frame are given from outside."""
    module = _module_of(layer)
    if isinstance(module, ResnetBlock2D):
        return partial(_residual, module, normalise)
    if isinstance(module, Attention):
        return partial(_attention, module, normalise, seen)
    if isinstance(module, nn.GroupNorm):
        return partial(normalise, module)
    return layer


def _residual(block: ResnetBlock2D, normalise: Normalise, x: Tensor) -> Tensor:
    """Diffusers' residual block as the decoder has it: no time, no resampling."""
    norm1: Any = block.norm1
    norm2: Any = block.norm2
    hidden = block.conv1(activate(block.nonlinearity, normalise(norm1, x)))
    hidden = block.conv2(activate(block.nonlinearity, normalise(norm2, hidden)))
    shortcut = x if block.conv_shortcut is None else block.conv_shortcut(x)
    return (shortcut + hidden) / block.output_scale_factor


def _attention(layer: Attention, normalise: Normalise, seen: Seen, x: Tensor) -> Tensor:
    """Diffusers' self-attention over the tokens of each frame."""
    group_norm: Any = layer.group_norm
    to_key: Any = layer.to_k
    to_value: Any = layer.to_v
    tokens = rearrange(normalise(group_norm, x), "t c h w -> t (h w) c")
    key, value = seen(layer, to_key(tokens), to_value(tokens))
    query, key, value = (
        rearrange(part, "t n (a c) -> t a n c", a=layer.heads)
        for part in (layer.to_q(tokens), key, value)
    )
    found = F.scaled_dot_product_attention(query, key, value)
    to_out: Any = layer.to_out
    hidden = to_out[0](rearrange(found, "t a n c -> t n (a c)"))
    hidden = rearrange(hidden, "t (h w) c -> t c h w", h=x.shape[-2])
    residual = x if layer.residual_connection else torch.zeros_like(x)
    return (hidden + residual) / layer.rescale_output_factor


def _apply(factors: Factors, x: Tensor) -> Tensor:
    scale, shift = factors
    return torch.addcmul(shift, x, scale).to(x.dtype)


def _frame_factors(norm: nn.GroupNorm, x: Tensor) -> Factors:
    """Factors `(t, C, 1, 1)` of a group norm for each of the frames `(t, C, H, W)`."""
    groups = x.float().unflatten(1, (norm.num_groups, -1))
    variance, mean = torch.var_mean(groups, dim=(2, 3, 4), correction=0)
    repeats = norm.num_channels // norm.num_groups
    inverse = (variance + norm.eps).rsqrt().repeat_interleave(repeats, dim=1)
    scale = inverse * norm.weight.float()
    shift = norm.bias.float() - mean.repeat_interleave(repeats, dim=1) * scale
    return scale[..., None, None], shift[..., None, None]


@dataclass(frozen=True)
class _Notes:
    """What a pass over whole frames left for pieces."""

    pieces: Sequence[Piece]
    size: tuple[int, int]
    norms: dict[nn.GroupNorm, Factors]  # (T, C, 1, 1) of spatial norms, (1, C, 1, 1, 1) of others
    tokens: dict[Attention, tuple[Tensor, Tensor]]  # keys and values (T, N, C)
    edges: dict[tuple[nn.Conv3d, int, int], Tensor]  # (1, C, 1, H, W) by layer, piece and frame


class _Noting(Watcher):
    """Notes a pass over whole frames while it runs."""

    def __init__(self, pieces: Sequence[Piece], size: tuple[int, int]):
        self.pieces = pieces
        self.size = size
        self.frame_norms: dict[nn.GroupNorm, list[Factors]] = defaultdict(list)
        self.clip_norms: dict[nn.GroupNorm, Factors] = {}
        self.tokens: dict[Attention, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self.edges: dict[tuple[nn.Conv3d, int, int], Tensor] = {}

    def layer(self, layer: PerFrame) -> PerFrame:
        return _with(layer, self._normalise, self._seen)

    def clip_norm(self, norm: nn.GroupNorm, factors: Factors) -> None:
        self.clip_norms[norm] = factors

    def entering(self, conv: nn.Conv3d, chunks: Iterator[Tensor]) -> Iterator[Tensor]:
        begun = 0

        def noted(chunk: Tensor) -> Tensor:
            nonlocal begun
            for number, piece in enumerate(self.pieces):
                for frame in (piece.start - 1, piece.stop):
                    if begun <= frame < begun + chunk.shape[2]:
                        beside = chunk[:, :, frame - begun : frame - begun + 1]
                        part = piece.of(beside, chunk.shape[-2] // self.size[0])
                        self.edges[conv, number, frame] = part.clone()
            begun += chunk.shape[2]
            return chunk

        return map(noted, chunks)

    def done(self) -> _Notes:
        norms = {
            norm: (torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found]))
            for norm, found in self.frame_norms.items()
        }
        tokens = {
            layer: (torch.cat([kv[0] for kv in found]), torch.cat([kv[1] for kv in found]))
            for layer, found in self.tokens.items()
        }
        return _Notes(self.pieces, self.size, {**norms, **self.clip_norms}, tokens, self.edges)

    def _normalise(self, norm: nn.GroupNorm, x: Tensor) -> Tensor:
        factors = _frame_factors(norm, x)
        self.frame_norms[norm].append(factors)
        return _apply(factors, x)

    def _seen(self, layer: Attention, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.tokens[layer].append((key, value))
        return key, value


class _Replay:
    """The decoder's layers for one piece, by what was noted."""

    def __init__(self, notes: _Notes, number: int):
        self.notes = notes
        self.number = number
        self.piece = notes.pieces[number]
        self.frames = slice(self.piece.start, self.piece.stop)

    def layer(self, layer: PerFrame) -> PerFrame:
        return _with(layer, self._normalise, self._seen)

    def temporal(self, block: SpatioTemporalResBlock, x: Tensor) -> Tensor:
        """The temporal half of a residual block; `(t, C, H, W)` in and out."""
        temporal = block.temporal_res_block
        before = hidden = _by_clip(x)
        for norm, conv in ((temporal.norm1, temporal.conv1), (temporal.norm2, temporal.conv2)):
            hidden = temporal.nonlinearity(_apply(self.notes.norms[norm], hidden))
            hidden = self.along_time(conv, hidden)
        mixed = block.time_mixer(
            x_spatial=before,
            x_temporal=before + hidden,
            image_only_indicator=before.new_zeros(1, before.shape[2]),
        )
        return _by_frame(mixed)

    def along_time(self, conv: nn.Conv3d, x: Tensor) -> Tensor:
        """A convolution of kernel (3, 1, 1) on `(1, C, t, H, W)` between the piece's neighbours.

        Beyond the clip's ends are zeros, as in the convolution's own padding.
        """
        zeros = torch.zeros_like(x[:, :, :1])
        before, after = (
            self.notes.edges.get((conv, self.number, frame), zeros)[:, :, 0]
            for frame in (self.piece.start - 1, self.piece.stop)
        )
        return convolve_frames(conv, [before, *x.unbind(dim=2), after])

    def _normalise(self, norm: nn.GroupNorm, x: Tensor) -> Tensor:
        scale, shift = self.notes.norms[norm]
        return _apply((scale[self.frames], shift[self.frames]), x)

    def _seen(self, layer: Attention, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        outside = ~self.piece.tokens(self.notes.size, key.device)
        # In which order tokens are seen makes no difference to what is seen.
        keys, values = (noted[self.frames][:, outside] for noted in self.notes.tokens[layer])
        return torch.cat([keys, key], dim=1), torch.cat([values, value], dim=1)
