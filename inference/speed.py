"""How a model is run faster or in less memory: what is exact, and what is traded for quality.

Exact to rounding: `compile`, `channels_last`. Exact in every bit: `offload`. Trades: `cache_every`
(see `animator.feature_cache`) and `linears`, which `inference.presets` bundles.
"""

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.models.attention import BasicTransformerBlock, TemporalBasicTransformerBlock
from diffusers.models.resnet import SpatioTemporalResBlock
from torch import nn

from animator.feature_cache import FeatureCache
from animator.model import Animator

# What the UNet repeats: compiled one by one, a kind of block is compiled once for each size.
REPEATED = (SpatioTemporalResBlock, BasicTransformerBlock, TemporalBasicTransformerBlock)
LEAST_INT8 = 64  # features of a linear layer below which int8 costs more than it saves


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """Settings of a model that has been loaded; they last until another is loaded.

    `cache_every` n computes the UNet whole in each n-th step and its deep part only then;
    `cache_gib` limits what is kept for that. `linears` int8 keeps the weights of linear layers in 8
    bits, and `offload` keeps the UNet's weights on the host and brings each layer's to the GPU when
    it is due.
    """

    cache_every: int = 1
    cache_gib: float = 4.0
    compile: bool = False
    channels_last: bool = False
    linears: Literal["full", "int8"] = "full"
    offload: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.cache_every <= 10:
            raise ValueError(
                f"Got speed.cache_every {self.cache_every}, but expected 1 (off) to 10 steps."
            )
        if not 0 <= self.cache_gib <= 1024:
            raise ValueError(f"Got speed.cache_gib {self.cache_gib}, but expected 0 to 1024.")
        if self.offload and self.compile:
            raise ValueError(
                "Got speed.offload with speed.compile, but expected one of them: compiled blocks "
                "would be compiled anew wherever their weights are."
            )

    @property
    def prepared(self) -> tuple[object, ...]:
        """What changes a loaded model, for comparison with what it has been given."""
        return self.compile, self.channels_last, self.linears, self.offload

    def cache(self, animator: Animator) -> FeatureCache | None:
        """A cache for one clip, where there is to be one."""
        if self.cache_every == 1:
            return None
        return FeatureCache(animator.unet, max_bytes=int(self.cache_gib * 2**30))


def prepare(animator: Animator, config: SpeedConfig, *, backend: str = "inductor") -> None:
    """Change a loaded model as configured; to be called once, in evaluation mode.

    Args:
        backend: of `torch.compile`.

    Raises:
        ValueError: for int8 without torchao, or offloading without a GPU.
    """
    if config.linears == "int8":
        _quantise(animator)
    if config.channels_last:
        for module in animator.modules():
            if isinstance(module, nn.Conv2d):  # those along time are small, and have no such format
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.offload:
        _offload(animator)
    if config.compile:
        for block in repeated_blocks(animator):
            # Each has its own count of variants: all share code, of which torch keeps eight.
            block.compile(backend=backend, dynamic=False, isolate_recompiles=True)


def repeated_blocks(animator: Animator) -> Iterable[nn.Module]:
    """The blocks that are compiled: of residual and of transformer kind, in space and in time."""
    return (module for module in animator.unet.modules() if isinstance(module, REPEATED))


def _quantise(animator: Animator) -> None:
    try:
        from torchao.quantization import (  # pyright: ignore[reportMissingImports]
            Int8WeightOnlyConfig,
            quantize_,
        )
    except ImportError:
        raise ValueError(
            "Got speed.linears int8, which needs the package torchao: "
            "pip install 'stableanimator-pp[quantised]'."
        ) from None

    def wanted(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and min(module.weight.shape) >= LEAST_INT8

    quantize_(animator.unet, Int8WeightOnlyConfig(), filter_fn=wanted)


def _offload(animator: Animator) -> None:
    place: Any = animator.place
    if place.type != "cuda":
        raise ValueError(
            f"Got speed.offload with the model on {place.type}, but expected a GPU: there is "
            "nowhere to offload to."
        )
    if importlib.util.find_spec("accelerate") is None:
        raise ValueError(
            "Got speed.offload, for which diffusers needs the package accelerate: "
            "pip install accelerate."
        )
    animator.unet.enable_group_offload(
        onload_device=place,
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
        use_stream=True,
    )
