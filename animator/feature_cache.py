"""Deep features of the UNet, kept from one denoising step for the next ones.

Neighbouring steps differ little below the UNet's highest resolution (DeepCache, Ma et al., 2024,
"DeepCache: Accelerating Diffusion Models for Free"). A shallow call runs the first down block and
the last up block, where faces and hands are drawn, and takes what lies between from the last whole
call. The blocks themselves are diffusers' own.
"""

import contextlib
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from diffusers.models.unets.unet_spatio_temporal_condition import (
    UNetSpatioTemporalConditionModel,
)
from torch import Tensor, nn

Forward = Callable[..., Any]


class FeatureCache:
    """What lies between the first down block and the last up block, by the caller's key.

    Args:
        max_bytes: of all features that are kept; a key that would exceed it is not kept, so its
            calls are whole ones.
    """

    def __init__(self, unet: UNetSpatioTemporalConditionModel, *, max_bytes: int = 4 * 2**30):
        self.unet = unet
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.whole_calls = 0
        self.shallow_calls = 0
        self._kept: dict[Hashable, Tensor] = {}

    @contextlib.contextmanager
    def call(self, key: Hashable, *, refresh: bool) -> Iterator[bool]:
        """For the one UNet call inside: whole where `refresh` or nothing is kept, else shallow.

        Args:
            key: of what the call is on: its window, its conditions. Calls of one key must have
                inputs of the same shape.

        Yields:
            whether the call is shallow.
        """
        shallow = not refresh and key in self._kept
        with contextlib.ExitStack() as stack:
            if shallow:
                self.shallow_calls += 1
                self._skip(stack, self._kept[key])
            else:
                self.whole_calls += 1
                deepest = self.unet.up_blocks[-2]
                stack.enter_context(_replaced(deepest, self._noting(key, deepest.forward)))
            yield shallow

    def clear(self) -> None:
        """Let go of everything that is kept."""
        self._kept.clear()
        self.num_bytes = 0

    def _noting(self, key: Hashable, forward: Forward) -> Forward:
        def noting(*args: Any, **kwargs: Any) -> Tensor:
            output: Tensor = forward(*args, **kwargs)
            self._keep(key, output)
            return output

        return noting

    def _keep(self, key: Hashable, features: Tensor) -> None:
        before = self._kept.pop(key, None)
        if before is not None:
            self.num_bytes -= before.nbytes
        if self.num_bytes + features.nbytes <= self.max_bytes:
            self._kept[key] = features.detach()
            self.num_bytes += features.nbytes

    def _skip(self, stack: contextlib.ExitStack, features: Tensor) -> None:
        for block in list(self.unet.down_blocks)[1:]:
            # The UNet counts residuals as it hands them out; these go to blocks that are skipped.
            count = len(block.resnets) + len(block.downsamplers or ())  # type: ignore[arg-type]
            stack.enter_context(_replaced(block, _down_passing(count)))
        stack.enter_context(_replaced(self.unet.mid_block, _passing))
        *skipped, deepest, _ = self.unet.up_blocks
        for block in skipped:
            stack.enter_context(_replaced(block, _passing))
        stack.enter_context(_replaced(deepest, lambda *args, **kwargs: features))


def _passing(hidden_states: Tensor, **_: Any) -> Tensor:
    return hidden_states


def _down_passing(count: int) -> Forward:
    def passing(hidden_states: Tensor, **_: Any) -> tuple[Tensor, tuple[None, ...]]:
        return hidden_states, (None,) * count

    return passing


@contextlib.contextmanager
def _replaced(module: nn.Module, forward: Forward) -> Iterator[None]:
    """For the calls inside, the module does `forward` instead of its own."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward  # the class's own is found again
