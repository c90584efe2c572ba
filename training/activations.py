"""What one forward and backward pass of the animator holds in memory, without running it.

The pass runs on fake tensors, which have shapes and types and no numbers, through the very modules
that train, so that recomputation and frozen weights count as they are. Attention is counted as a
fused kernel keeps it, without its scores.

Shapes: B batch, T frames, C latent channels, H W pixels, h w latent size.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from animator.config import AnimatorConfig
from animator.model import Animator
from animator.recompute import recompute_blocks
from animator.trainable import Trainable, choose_trainable


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes beyond weights and their gradients.

    kept: what lives between the forward and the backward pass, inputs included.
    peak: the most that lives at once, in either pass.
    """

    kept: int
    peak: int


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Numbers of weights: of each part, all of them, and those that are trained."""

    parts: dict[str, int]
    all: int
    trainable: int


@cache
def count_parameters(config: AnimatorConfig, trainable: Trainable, rank: int) -> Parameters:
    """Counted on a model without storage."""
    model = _empty_model(config, trainable, rank)
    parts = {name: _size(module.parameters()) for name, module in model.named_children()}
    return Parameters(
        parts=parts,
        all=sum(parts.values()),
        trainable=_size(p for p in model.parameters() if p.requires_grad),
    )


@cache
def activations(
    config: AnimatorConfig,
    *,
    height: int,
    width: int,
    batch: int = 1,
    trainable: Trainable = "all",
    rank: int = 16,
    recompute: float = 0.0,
    weights: torch.dtype = torch.float32,
    autocast: bool = False,
) -> Activations:
    """What one training pass of these sizes holds.

    Args:
        height, width: of the frames, in pixels.
        weights: type of the weights, and without `autocast` of everything.
        autocast: bf16 as on a GPU, where norms are computed, and kept, in fp32.
    """
    model = _empty_model(config, trainable, rank)
    recompute_blocks(model, recompute)
    model.train()
    with FakeTensorMode():
        _take_weights(model, weights, norms=torch.float32 if autocast else weights)
        return measure(model, height, width, batch, autocast=autocast)


def measure(
    model: Animator, height: int, width: int, batch: int, *, autocast: bool = False
) -> Activations:
    """The same of a model whose tensors are there, fake or real; its gradients are let go."""
    config = model.config
    live = _Live(model.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    held = [p.register_post_accumulate_grad_hook(_forget) for p in trained]
    try:
        with live:
            given = _inputs(config, height, width, batch)
            with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
                with _norms_in_fp32(model) if autocast else nullcontext():
                    loss = model(**given).float().square().mean()
                    kept = live.bytes
                    loss.backward()
    finally:
        for hook in held:
            hook.remove()
    return Activations(kept=kept, peak=live.peak)


def _empty_model(config: AnimatorConfig, trainable: Trainable, rank: int) -> Animator:
    with torch.device("meta"):
        model = Animator(config)
        choose_trainable(model, trainable, rank=rank)
    return model


def _size(parameters: Iterator[nn.Parameter] | Any) -> int:
    return sum(p.numel() for p in parameters)


def _take_weights(model: nn.Module, dtype: torch.dtype, norms: torch.dtype) -> None:
    """Fake weights in place of those without storage."""
    for module in model.modules():
        own = norms if isinstance(module, nn.GroupNorm | nn.LayerNorm) else dtype
        for name, value in module._parameters.items():
            if value is not None:
                made = torch.empty(value.shape, dtype=own)
                module._parameters[name] = nn.Parameter(made, requires_grad=value.requires_grad)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = torch.empty(value.shape, dtype=value.dtype)


def _inputs(config: AnimatorConfig, height: int, width: int, batch: int) -> dict[str, Tensor]:
    frames, cell = config.num_frames, config.spatial_factor
    channels = 2 * config.latent_channels
    return {
        "sample": torch.zeros(batch, frames, channels, height // cell, width // cell),
        "timestep": torch.zeros(batch),
        "image_token": torch.ones(batch, 1, config.cross_attention_dim),
        "face_embedding": torch.ones(batch, config.face_embedding_dim),
        "pose_images": torch.zeros(batch * frames, 3, height, width),
        "added_time_ids": torch.zeros(batch, 3),
    }


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


@contextmanager
def _norms_in_fp32(model: nn.Module) -> Iterator[None]:
    """As autocast has it on a GPU; on a CPU it leaves norms as they are."""

    def widen(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(tensor.float() for tensor in given)

    norms = [m for m in model.modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm)]
    hooks = [norm.register_forward_pre_hook(widen) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Live(TorchDispatchMode):
    """Counts the bytes of storages that operations made and that still live.

    Args:
        known: tensors that do not count.
    """

    def __init__(self, known: Iterator[nn.Parameter]) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in _pytree.tree_leaves(made):
            if isinstance(value, Tensor):
                self._see(value)
        return made

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._let_go, key, size)

    def _let_go(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size
