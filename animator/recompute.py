"""Activation checkpointing of the animator's blocks: recomputed on the way back, not kept.

In training, a block's inner activations are most of the memory. A recomputed block keeps its
inputs alone and runs once more in the backward pass, which gives the same numbers bit for bit.
"""

import functools
import re
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock, TemporalBasicTransformerBlock
from diffusers.models.resnet import SpatioTemporalResBlock
from torch import nn
from torch.utils.checkpoint import checkpoint

from animator.face_encoder import FaceProjection
from animator.model import Animator
from animator.pose_net import PoseNet

BLOCKS = (
    SpatioTemporalResBlock,
    BasicTransformerBlock,
    TemporalBasicTransformerBlock,
    PoseNet,
    FaceProjection,
)


class _Recomputed(nn.Module):
    """Mixed into a block's own class, so that names in a state dict stay as they are."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        # No block draws random numbers, so their state need not be kept.
        return checkpoint(
            super().forward,  # type: ignore[misc]
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            **kwargs,
        )


def recompute_blocks(model: Animator, share: float) -> list[str]:
    """Let a share of the blocks recompute their activations in training.

    Blocks are every spatio-temporal residual block and every spatial and temporal transformer
    block of the UNet, PoseNet and Face Encoder. With a share below 1 those that take the least
    memory (deep in the UNet, at low resolution) keep their activations, which saves about as
    large a share of the extra time. Outside training nothing changes; called again, it replaces
    the choice made before.

    Args:
        share: of the blocks, from 0 (none) to 1 (all).

    Returns:
        The names of the blocks that are recomputed.

    Raises:
        ValueError: for a share outside 0 to 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"Got recompute {share}, but expected a share from 0 (none) to 1 (all).")
    blocks: dict[str, nn.Module] = {
        name: module for name, module in model.named_modules() if isinstance(module, BLOCKS)
    }
    depth = len(model.config.block_out_channels)
    costs = {name: _kept(name, module, depth) for name, module in blocks.items()}
    by_cost = sorted(blocks, key=lambda name: (costs[name], name))
    chosen = set(by_cost[len(blocks) - round(share * len(blocks)) :])
    for name, module in blocks.items():
        own = type(module)
        if issubclass(own, _Recomputed):
            own = own.__mro__[2]
        module.__class__ = _recomputed_class(own) if name in chosen else own
    return [name for name in blocks if name in chosen]


@functools.cache
def _recomputed_class(own: type[nn.Module]) -> type[nn.Module]:
    return type(f"Recomputed{own.__name__}", (_Recomputed, own), {"__module__": __name__})


def _kept(name: str, module: nn.Module, depth: int) -> float:
    """Numbers that a block keeps for the way back, for each position of the UNet's input.

    Every layer keeps its input, so the widths of the inputs add up.
    """
    if isinstance(module, FaceProjection):
        return 0.0  # a few tokens
    cells = 1.0
    if isinstance(module, PoseNet):
        strides = [layer.stride[0] for layer in module.modules() if isinstance(layer, nn.Conv2d)]
        cells = float(torch.tensor(strides).prod()) ** 2
    elif match := re.search(r"(down|up)_blocks\.(\d+)\.", name):
        level = int(match[2]) if match[1] == "down" else depth - 1 - int(match[2])
        cells = 0.25**level
    else:
        cells = 0.25 ** (depth - 1)
    total = 0.0
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            total += cells * layer.in_features
        elif isinstance(layer, nn.Conv2d | nn.Conv3d):
            total += cells * layer.in_channels
            cells /= layer.stride[0] ** 2
        elif isinstance(layer, nn.GroupNorm):
            total += cells * layer.num_channels
        elif isinstance(layer, nn.LayerNorm):
            total += cells * layer.normalized_shape[0]
    return total
