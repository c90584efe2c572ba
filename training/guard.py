"""Which steps are left out because they would harm the weights, and what is kept of them.

A step is left out where its loss or gradient norm is no finite number, or where the norm is many
times the running mean of those before. Every worker decides from the same numbers, so all decide
the same. What the guard remembers is part of a checkpoint: a run that continues decides as one
that was never interrupted.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from training.config import GuardConfig
from training.task import Batch, TrainingError

FOLDER = "left-out"


class Guard:
    """Decides step by step.

    Attributes:
        mean: of the gradient norms of good steps, over about `settle_steps` of them.
        good: steps that entered the mean.
        left_out: steps left out, from the run's beginning.
        in_a_row: steps left out since the last good one.
    """

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self.mean = 0.0
        self.good = self.left_out = self.in_a_row = 0

    def fault(self, loss: float, grad_norm: float) -> str | None:
        """Why the step with this loss and norm is left out; None where it is to be taken.

        Called once a step: it counts.
        """
        reason = self._reason(loss, grad_norm)
        if reason is None:
            self.good += 1
            self.in_a_row = 0
            self.mean += (grad_norm - self.mean) / min(self.good, self._config.settle_steps)
        else:
            self.left_out += 1
            self.in_a_row += 1
        return reason

    def _reason(self, loss: float, grad_norm: float) -> str | None:
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not isfinite(value):
                return f"the {name} is {value}"
        settled = self._config.spike > 0 and self.good >= self._config.settle_steps
        if settled and 0 < self.mean * self._config.spike < grad_norm:
            return f"the gradient norm is {grad_norm:.3g}, the mean before it {self.mean:.3g}"
        return None

    @property
    def exhausted(self) -> bool:
        """Whether so many steps in a row were left out that the run is to stop."""
        return self.in_a_row >= self._config.max_in_a_row

    def exhaustion(self, where: str, reason: str, kept: Path) -> TrainingError:
        """What to raise once it is exhausted."""
        before = self.in_a_row - 1
        row = f", and {before} step{'s' * (before > 1)} before it were left out too"
        batches = f" The batches are in {kept}." if self._config.keep_batches else ""
        return TrainingError(
            f"At {where} {reason}{row * (before > 0)}: lower optim.lr, or look at these "
            f"samples.{batches}"
        )

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps of it, JSON-ready and exact."""
        names = ("mean", "good", "left_out", "in_a_row")
        return {name: getattr(self, name) for name in names}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what a checkpoint kept."""
        self.mean = float(state["mean"])
        self.good, self.left_out = int(state["good"]), int(state["left_out"])
        self.in_a_row = int(state["in_a_row"])


def keep_batch(
    folder: Path,
    position: int,
    rank: int,
    batches: Callable[[], Sequence[Batch]],
    facts: Mapping[str, Any],
    keep: int,
) -> str | None:
    """Keep one worker's batch of a left-out step, and of its earlier ones the newest only.

    Writes `samples-POSITION-rank-R.safetensors`, every tensor with all samples of this worker
    along its first axis, and the facts beside it as JSON.

    Args:
        position: samples seen before the step.
        batches: gives the worker's micro-batches in order, on the CPU.
        keep: steps to keep, this one included.

    Returns:
        Why it could not be kept, which is no reason to stop; None where it was.
    """
    if not keep:
        return None
    path = folder / f"samples-{position:012d}-rank-{rank}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".json").write_text(json.dumps(_plain(facts), indent=1) + "\n")
        micro = batches()
        tensors = {name: torch.cat([batch[name] for batch in micro]) for name in micro[0]}
        save_file(tensors, path)
        of_rank = sorted(folder.glob(f"samples-*-rank-{rank}.json"))
        for old in of_rank[: max(0, len(of_rank) - keep)]:
            old.unlink(missing_ok=True)
            old.with_suffix(".safetensors").unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        return str(error)
    return None


def _plain(value: Any) -> Any:
    """JSON-ready: tensors as numbers, and what is no finite number as its name."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    if isinstance(value, Tensor):
        value = value.item()
    return str(value) if isinstance(value, float) and not isfinite(value) else value
