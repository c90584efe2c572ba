"""One pass of Stable Video Diffusion's decoder over a whole clip, a few frames in memory at a time.

The decoder couples the frames of a pass in two ways. Its temporal convolutions reach
`temporal_reach` frames to each side (29 at the published size). And its temporal residual blocks
normalise by the mean and spread over all frames of the pass, so every frame depends on every
other and no overlap makes separate chunks equal to one pass. So here the decoder runs layer by
layer: a layer sees all frames before the next one starts, a chunk at a time, with the statistics
of the whole clip. The modules and weights are diffusers' own.

Between two layers the frames wait on the compute device or on the host. Of a temporal block only
its input is kept: its first convolution is computed twice, once for the statistics and once for
the result, which adds a twelfth to the arithmetic and saves half of the memory.

Shapes: T frames, t frames of a chunk, C channels, G groups, h w latent size, H W = 8h 8w pixels.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import TemporalDecoder
from diffusers.models.resnet import SpatioTemporalResBlock, TemporalResnetBlock
from diffusers.models.upsampling import Upsample2D
from einops import rearrange
from torch import Tensor, nn

from animator.host_memory import Sweeper

PerFrame = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Layers that treat each frame alone, then the temporal half of one residual block."""

    per_frame: tuple[PerFrame, ...]
    block: SpatioTemporalResBlock
    channels: int
    scale: int  # how many times larger than the latents its frames are, on each side


class Watcher:
    """What sees the inside of a pass over the clip; this one looks at nothing."""

    def layer(self, layer: PerFrame) -> PerFrame:
        """The layer to run in place of one that treats each frame `(t, C, H, W)` alone."""
        return layer

    def clip_norm(self, norm: nn.GroupNorm, factors: tuple[Tensor, Tensor]) -> None:
        """What a temporal norm multiplies by and adds, float32 `(1, C, 1, 1, 1)` each."""

    def entering(self, conv: nn.Conv3d, chunks: Iterator[Tensor]) -> Iterator[Tensor]:
        """The chunks `(1, C, t, H, W)` that a temporal convolution is given, in order."""
        return chunks


def stages_of(decoder: TemporalDecoder) -> tuple[list[Stage], list[PerFrame]]:
    """The decoder's layers in the order of its `forward`, and what follows the last block."""
    middle: Any = decoder.mid_block
    layers: list[Any] = [decoder.conv_in, middle.resnets[0]]
    # diffusers pairs them so: blocks without an attention layer before them are never run.
    for attention, block in zip(middle.attentions, middle.resnets[1:], strict=False):
        layers += [attention, block]
    for up_block in decoder.up_blocks:
        up: Any = up_block
        layers += [*up.resnets, *(up.upsamplers or ())]
    stages: list[Stage] = []
    pending: list[PerFrame] = []
    scale = 1
    for layer in layers:
        if isinstance(layer, SpatioTemporalResBlock):
            spatial = layer.spatial_res_block
            pending.append(partial(spatial, temb=None))
            stages.append(
                Stage(
                    per_frame=tuple(pending),
                    block=layer,
                    channels=spatial.out_channels,
                    scale=scale,
                )
            )
            pending = []
        else:
            pending.append(layer)
            scale *= 2 if isinstance(layer, Upsample2D) else 1
    return stages, [*pending, decoder.conv_norm_out, decoder.conv_act, decoder.conv_out]


def temporal_reach(decoder: TemporalDecoder) -> int:
    """How many frames to each side the convolutions of one pass reach: 29 for the published size.

    The normalisation reaches further still, over all frames of the pass, as a factor and an
    offset of each group of channels.
    """
    temporal = [stage.block.temporal_res_block for stage in stages_of(decoder)[0]]
    convolutions = [conv for block in temporal for conv in (block.conv1, block.conv2)]
    return sum(conv.kernel_size[0] // 2 for conv in [*convolutions, decoder.time_conv_out])


def frame_bytes(decoder: TemporalDecoder, latents: Tensor) -> int:
    """Bytes that one frame takes between two layers, where it takes most.

    151 MB for 576x1024 pixels in half precision at the published size. The buffers of a pass are
    that times T; the chunk being computed comes on top.
    """
    elements = max(stage.channels * stage.scale**2 for stage in stages_of(decoder)[0])
    return elements * latents.shape[-2] * latents.shape[-1] * latents.element_size()


class _WholeClipNorm:
    """A group norm over all frames, from statistics that are gathered a chunk at a time."""

    def __init__(self, norm: nn.GroupNorm):
        self.norm = norm
        self.variances: list[Tensor] = []
        self.means: list[Tensor] = []

    def gather(self, chunk: Tensor) -> None:
        """Note the float32 statistics of each frame of `(1, C, t, H, W)`."""
        groups = chunk.float().unflatten(1, (self.norm.num_groups, -1))
        variance, mean = torch.var_mean(groups, dim=(0, 2, 4, 5), correction=0)  # (G, t)
        self.variances.append(variance)
        self.means.append(mean)

    def factors(self) -> tuple[Tensor, Tensor]:
        """What to multiply and what to add: float32, `(1, C, 1, 1, 1)` each.

        All frames have as many elements, so the clip's variance is the mean of the frames'
        variances and the variance of their means.
        """
        means = torch.cat(self.means, dim=1)
        variance = torch.cat(self.variances, dim=1).mean(1)
        variance = variance + means.var(dim=1, correction=0)
        repeats = self.norm.num_channels // self.norm.num_groups
        inverse = (variance + self.norm.eps).rsqrt().repeat_interleave(repeats)
        scale = inverse * self.norm.weight.float()
        shift = self.norm.bias.float() - means.mean(1).repeat_interleave(repeats) * scale
        return scale.reshape(1, -1, 1, 1, 1), shift.reshape(1, -1, 1, 1, 1)


# While these streams wait for their reader they keep hold of what they need again and no more: a
# name bound over a `yield` would be a chunk of frames held for nothing, and `map` binds none.


def _activated(
    norm: _WholeClipNorm, temporal: TemporalResnetBlock, chunks: Iterator[Tensor]
) -> Iterator[Tensor]:
    scale, shift = norm.factors()

    def activated(chunk: Tensor) -> Tensor:
        return activate(temporal.nonlinearity, torch.addcmul(shift, chunk, scale).to(chunk.dtype))

    return map(activated, chunks)


def activate(function: nn.Module, x: Tensor) -> Tensor:
    """A nonlinearity of a tensor that nobody else needs: in its place where no gradient does."""
    if isinstance(function, nn.SiLU) and not torch.is_grad_enabled():
        return F.silu(x, inplace=True)
    return function(x)


def convolve_frames(conv: nn.Conv3d, frames: Sequence[Tensor]) -> Tensor:
    """A convolution of kernel (k, 1, 1) without padding: t + k - 1 frames `(1, C, H, W)` to
    `(1, C, t, H, W)`.

    On a CPU as one product of matrices a tap: torch has no fast 3D convolution there, and the one
    it has copies its input k times.
    """
    if frames[0].device.type != "cpu":
        return F.conv3d(torch.stack(list(frames), dim=2), conv.weight, conv.bias)
    taps = conv.weight[..., 0, 0].unbind(dim=2)
    flat = [frame[0].flatten(1) for frame in frames]  # (C, H W)
    found = [
        _weighted(conv, taps, flat[k : k + len(taps)]) for k in range(len(flat) - len(taps) + 1)
    ]
    joined = torch.stack(found, dim=1) if found[1:] else found[0][:, None]
    return joined.reshape(1, -1, len(found), *frames[0].shape[2:])


def _weighted(conv: nn.Conv3d, taps: Sequence[Tensor], frames: Sequence[Tensor]) -> Tensor:
    """One frame `(C', H W)` of a convolution along time; its taps see frames `(C, H W)`."""
    if conv.bias is None:
        found = torch.mm(taps[0], frames[0])
    else:
        found = torch.addmm(conv.bias[:, None], taps[0], frames[0])
    for tap, frame in zip(taps[1:], frames[1:], strict=True):
        found.addmm_(tap, frame)
    return found


def _along_time(conv: nn.Conv3d, chunks: Iterator[Tensor]) -> Iterator[Tensor]:
    """A convolution of kernel (k, 1, 1) over the whole clip, from chunks `(1, C, t, H, W)`.

    Zeros stand before the first and after the last frame, as in the convolution's own padding.
    What comes out lags behind by half a kernel, so the chunks are cut elsewhere.
    """
    reach = conv.kernel_size[0] // 2
    tail: list[Tensor] = []  # the last frames, which the next ones see too
    whole: list[list[Tensor]] = []
    for chunk in chunks:
        if not tail:
            tail = [torch.zeros_like(chunk[:, :, 0])] * reach
        whole.append([*tail, *chunk.unbind(dim=2)])
        # A view would hold on to all of a large chunk.
        small = chunk.shape[2] <= 2 * reach
        tail = [frame if small else frame.clone() for frame in whole[0][-2 * reach :]]
        del chunk
        if len(whole[0]) > 2 * reach:
            yield convolve_frames(conv, whole.pop())
        whole.clear()
    if tail:
        yield convolve_frames(conv, [*tail, *[torch.zeros_like(tail[0])] * reach])


def _read(frames: list[Tensor], chunk_size: int, device: torch.device) -> Iterator[Tensor]:
    """Chunks `(1, C, t, H, W)` on the device of frames `(C, H, W)`, which the list forgets."""

    def first() -> Tensor:
        chunk = torch.stack(frames[:chunk_size], dim=1)[None]
        del frames[:chunk_size]
        return chunk.to(device)

    while frames:
        yield first()


def _blended(
    block: SpatioTemporalResBlock,
    spatial: Iterator[Tensor],
    norms: Sequence[_WholeClipNorm],
    watcher: Watcher,
) -> Iterator[Tensor]:
    """The block's result in chunks `(t, C, H, W)` from what its spatial half gave."""
    for norm in norms:
        watcher.clip_norm(norm.norm, norm.factors())
    temporal = block.temporal_res_block
    waiting: deque[Tensor] = deque()  # frames whose temporal part is not there yet

    def noted(chunk: Tensor) -> Tensor:
        waiting.extend(chunk.unbind(dim=2))
        return chunk

    def mixed(residual: Tensor) -> Tensor:
        count = residual.shape[2]
        before = torch.stack([waiting.popleft() for _ in range(count)], dim=2)
        after = block.time_mixer(
            x_spatial=before,
            x_temporal=before + residual,
            image_only_indicator=before.new_zeros(1, count),
        )
        return rearrange(after, "1 c t h w -> t c h w")

    entering = watcher.entering(temporal.conv1, _activated(norms[0], temporal, map(noted, spatial)))
    hidden = _activated(norms[1], temporal, _along_time(temporal.conv1, entering))
    return map(mixed, _along_time(temporal.conv2, watcher.entering(temporal.conv2, hidden)))


def _through(
    stage: Stage,
    chunks: Iterator[Tensor],
    chunk_size: int,
    buffer_device: torch.device,
    watcher: Watcher,
) -> Iterator[Tensor]:
    """Run a stage over all frames: chunks `(t, C, H, W)` in, chunks of its result out.

    When this returns, the spatial half is done and its result waits in the buffer; taking the
    chunks that come out empties the buffer, while the next stage fills its own.
    """
    temporal = stage.block.temporal_res_block
    first, second = _WholeClipNorm(temporal.norm1), _WholeClipNorm(temporal.norm2)
    frames: list[Tensor] = []
    sweeper = Sweeper()
    device = buffer_device
    layers = [watcher.layer(layer) for layer in stage.per_frame]
    for chunk in chunks:
        device = chunk.device
        for layer in layers:
            chunk = layer(chunk)
        first.gather(rearrange(chunk, "t c h w -> 1 c t h w"))
        chunk = chunk.to(buffer_device)
        sweeper.kept(chunk)
        frames.extend(chunk.unbind())
        del chunk
    kept = _read(frames.copy(), chunk_size, device)
    for hidden in _along_time(temporal.conv1, _activated(first, temporal, kept)):
        second.gather(hidden)
        del hidden
    return _blended(stage.block, _read(frames, chunk_size, device), (first, second), watcher)


def _roomiest_device(device: torch.device, num_bytes: int) -> torch.device:
    """The compute device while its free memory holds the buffers twice over, else the host."""
    if device.type != "cuda":
        return device
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return device if 2 * num_bytes <= free + unused else torch.device("cpu")


@torch.no_grad()
def decode_clip(
    decoder: TemporalDecoder,
    latents: Tensor,
    *,
    chunk_size: int = 2,
    buffer_device: torch.device | None = None,
    watcher: Watcher | None = None,
) -> Tensor:
    """What `decoder(latents, num_frames=T)` gives in one pass, to rounding.

    Args:
        decoder: of diffusers' `AutoencoderKLTemporalDecoder`, in evaluation mode.
        latents: `(T, C, h, w)` of one clip in the decoder's data type, divided by the scaling
            factor; T >= 1.
        chunk_size: frames computed at a time. It changes memory and time, not the frames.
        buffer_device: where frames wait between two layers: T times `frame_bytes`. By default
            the compute device if they take at most half of its free memory, else the host.
        watcher: sees the inside of the pass.

    Returns:
        Frames `(T, 3, H, W)` on the latents' device, not clamped.

    Raises:
        ValueError: for a clip without frames or a chunk of none.
    """
    if chunk_size < 1 or len(latents) < 1:
        raise ValueError(
            f"Got {len(latents)} frames to decode {chunk_size} at a time, but expected at least "
            "1 of each."
        )
    watcher = watcher or Watcher()
    if buffer_device is None:
        needed = len(latents) * frame_bytes(decoder, latents)
        buffer_device = _roomiest_device(latents.device, needed)
    stages, closing = stages_of(decoder)
    last = [watcher.layer(layer) for layer in closing]
    chunks: Iterator[Tensor] = iter(latents.split(chunk_size))
    for stage in stages:
        chunks = _through(stage, chunks, chunk_size, buffer_device, watcher)

    def pictures() -> Iterator[Tensor]:
        for chunk in chunks:
            for layer in last:
                chunk = layer(chunk)
            yield rearrange(chunk, "t c h w -> 1 c t h w")

    entering = watcher.entering(decoder.time_conv_out, pictures())
    frames = torch.cat(list(_along_time(decoder.time_conv_out, entering)), dim=2)
    return rearrange(frames, "1 c t h w -> t c h w").contiguous()
