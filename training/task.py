"""What a task gives to the training loop: a model, batches, a loss, and how to save the result."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]


class TrainingError(RuntimeError):
    """Training cannot go on, and trying again would end the same way."""


class Stopped(RuntimeError):  # noqa: N818 - nothing went wrong
    """A run ended early because it was asked to; the same command continues it."""


class Task(Protocol):
    """One thing to train. Subclass it; the loop knows nothing else of a task.

    `batch` and `loss` get their randomness from `sample_generator(seed, sample)`, so that the
    same samples give the same numbers whatever the number of workers and after any restart.
    """

    name: str
    fingerprint: str  # of the data (sha256); a run does not continue on other data
    num_samples: int  # samples of one epoch, for the log line
    flops: float = 0.0  # of one sample, forward and backward without recomputation; 0 = unknown

    def build(self) -> nn.Module:
        """The module to train, in training mode, on the CPU. Called with torch's seed set.

        Frozen helpers (codec, face network) stay outside it, in the task; frozen parameters
        inside it are not given to the optimiser.
        """
        ...

    def prepare(self, device: torch.device) -> None:
        """Open what only workers need, such as frozen helpers, on the device."""

    def batch(self, samples: Sequence[int]) -> Batch:
        """CPU tensors for these sample numbers: a pure function of them, run in a thread."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """The mean loss over the batch (a scalar) and numbers to log, already on the device.

        The names of the numbers are the same every time; NaN means "none in this batch".
        """
        ...

    def problems(self) -> list[tuple[str, str]]:
        """Key and reason of what could not be read since the last call and was replaced."""
        return []

    def start_digest(self) -> str:
        """Of the weights that training starts from and never changes (sha256); "" for none.

        Checkpoints do not hold them: a run does not continue, and is not exported, on others.
        """
        return ""

    def save_model(self, state: dict[str, Tensor], folder: Path) -> None:
        """Write the released model (averaged weights, fp32, the module's own names) to `folder`."""
        ...

    def validate(
        self, model: nn.Module, folder: Path, device: torch.device, clips: int
    ) -> Mapping[str, float]:
        """Metrics of a model with averaged weights on held-out data; pictures go into `folder`.

        Called in a process of its own, after `prepare`. The names of the metrics are the same
        every time; no metrics where the task holds nothing out.
        """
        return {}


class TaskConfig(Protocol):
    """The frozen dataclass that describes a task; it lives in `TrainConfig.task`."""

    name: ClassVar[str]
    may_change: ClassVar[tuple[str, ...]]  # settings free to differ when a run continues

    def build_task(self, seed: int, global_batch: int = 1) -> Task:
        """Open the data and check the settings; light, since the driver calls it too.

        Args:
            global_batch: samples of a step; those of one step have one shape.

        Raises:
            ValueError: what the user gave cannot be trained on.
        """
        ...


def mix_seed(*numbers: int) -> int:
    """One 63-bit seed from several non-negative integers; near inputs give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def sample_generator(seed: int, sample: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random numbers that belong to one sample of a run."""
    return torch.Generator(device).manual_seed(mix_seed(seed, sample))


def stack(examples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One batch of examples that have the same names and shapes."""
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
