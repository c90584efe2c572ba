"""Exponential moving average of the trainable weights, held by rank 0, a function of samples.

The half-life grows with the run until it reaches its setting (Karras et al., arXiv:2206.00364,
their training loop), so that a short run does not release its initial weights.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def ema_decay(samples_seen: int, samples: int, half_life: float, ramp: float) -> float:
    """Share of the old average that remains after `samples` more samples."""
    half_life = min(half_life, ramp * samples_seen)
    return 0.5 ** (samples / half_life) if half_life > 0 else 0.0


class WeightAverage:
    """The average of a module's trainable weights and the latest value of its buffers, in fp32.

    Where every rank holds all weights in fp32 (ZeRO-1, ZeRO-2, plain PyTorch) one rank's copy is
    enough. Where they are bf16, or shared out (ZeRO-3), the fp32 masters are read, which are spread
    over the ranks: then making an average and `update` are collective and gather the whole model,
    a reason not to do it every step. The average lies on the weights' device.

    Args:
        keep: hold the average here (rank 0); other ranks only take part in reading masters.
    """

    def __init__(self, module: nn.Module, *, keep: bool) -> None:
        self._module = module
        self._keep = keep
        self._average: dict[str, Tensor] = {}
        for name, parameter in self._trainable():
            value = _full_precision(parameter)
            if keep:
                self._average[name] = value.clone()

    def _trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self._module.named_parameters() if p.requires_grad]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """average ← decay · average + (1 - decay) · weights."""
        for name, parameter in self._trainable():
            value = _full_precision(parameter)
            if self._keep:
                self._average[name].lerp_(value, 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """The averaged weights and the buffers, empty on other ranks; not collective.

        A copy on the CPU: a thread may write it while training goes on.
        """
        if not self._keep:
            return {}
        persistent = self._module.state_dict()
        buffers = {n: persistent[n] for n, _ in self._module.named_buffers() if n in persistent}
        return {
            name: value.detach().to("cpu", copy=True).contiguous()
            for name, value in (self._average | buffers).items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over a saved average.

        Raises:
            ValueError: the saved names are not those of this model.
        """
        if not self._keep:
            return
        missing = sorted(self._average.keys() - state.keys())
        if missing:
            raise ValueError(
                f"the saved average lacks {missing[0]} and {len(missing) - 1} more: "
                "it belongs to another model; start in an empty folder."
            )
        for name, value in self._average.items():
            value.copy_(state[name])


def _full_precision(parameter: nn.Parameter) -> Tensor:
    """The whole fp32 value of a parameter: itself, or its master where it is bf16 or shared out."""
    shared_out = hasattr(parameter, "ds_id")  # how DeepSpeed marks parameters of ZeRO-3
    if parameter.dtype == torch.float32 and not shared_out:
        return parameter.detach()
    from deepspeed.utils import safe_get_full_fp32_param

    master = safe_get_full_fp32_param(parameter)
    if master is None:  # bf16 that nobody keeps a master of
        return parameter.detach().float()
    return master.detach()
