"""One optimiser step across workers: what the loop asks of an engine, and what engines share.

An engine holds the model, its optimiser and its place in the process group. `engine_deepspeed.py`
shares out optimiser state, gradients and weights (ZeRO stages 1 to 3); `engine_ddp.py` is plain
PyTorch. The loop decides whether a step is taken: gradients add up in `backward`, their norm is
looked at, then comes `step` or `skip`.
"""

import copy
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from training.config import TrainConfig
from training.task import Batch, Task, mix_seed

STATE = "state"  # the folder of an engine's files in a checkpoint


class Engine(Protocol):
    """The model, its optimiser and the process group of one worker; every method is collective.

    A step is: `backward` for each micro-batch, `grad_norm`, then `step` or `skip`.

    Attributes:
        model: the bare module, with its own parameter names.
        accumulation: micro-batches of one step.
    """

    model: nn.Module
    device: torch.device
    rank: int
    world: int
    accumulation: int

    def backward(self, batch: Batch, first_sample: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward and backward of one micro-batch; the mean gradient of the step adds up.

        Layers with randomness of their own (dropout) draw from a seed of the first sample.
        """
        ...

    def grad_norm(self) -> float:
        """The L2 norm of the step's whole gradient, before clipping; inf and NaN stay so.

        After the last micro-batch of a step.
        """
        ...

    def step(self, rate: float) -> None:
        """Clip the gradients to `optim.clip`, update the weights at this rate, clear gradients."""
        ...

    def skip(self) -> None:
        """Clear the gradients; weights, moments and their step count stay as they are."""
        ...

    def average(
        self,
        numbers: Mapping[str, list[Tensor]],
        firsts: Sequence[int] = (),
        *,
        done: bool = False,
        stop: bool = False,
    ) -> tuple[dict[str, float], list[int], bool, bool]:
        """The mean of each list over the micro-batches of all workers; the `firsts` of all workers,
        one after the other; `done` on all of them; `stop` on any. One exchange for all four.

        NaN entries are left out, except from `loss`, which has to be there and where they show.

        Args:
            firsts: the first sample of each of this worker's micro-batches.
        """
        ...

    def snapshot(self) -> Callable[[Path], None]:
        """Copy this worker's share of model and optimiser to host memory.

        The function returned writes it into a checkpoint's folder, which may be shared: no two
        workers write one name. It may run in any thread, at any later time, and waits for nobody.
        """
        ...

    def load(self, folder: Path) -> None:
        """Read back what the same number of workers wrote, or what was converted.

        Raises:
            ValueError: the folder holds no state.
        """
        ...

    def barrier(self) -> None: ...


def open_engine(
    task: Task, config: TrainConfig, device: torch.device, *, converted: bool = False
) -> Engine:
    """Build the model on this worker with the engine of `config.run`.

    Needs an initialised process group.

    Args:
        converted: the state to `load` went through `convert_state`.

    Raises:
        ValueError: nothing in the model is trainable, or the batch does not divide.
    """
    if config.run.engine == "ddp":
        from training.engine_ddp import DdpEngine

        return DdpEngine(task, config, device)
    from training.engine_deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(task, config, device, converted=converted)


class EngineBase:
    """What all engines do alike: build the model, seed, average numbers, wait for each other."""

    def __init__(self, task: Task, config: TrainConfig, device: torch.device) -> None:
        self.device = device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.accumulation = config.accumulation(self.world)
        self._seed = config.run.seed
        torch.manual_seed(config.run.seed)
        self.model = task.build()
        self._trainable = [p for p in self.model.parameters() if p.requires_grad]
        if not self._trainable:
            raise ValueError(f"task {task.name}: the model has no trainable parameters.")
        self._loss = TaskLoss(task, self.model, bf16=config.run.precision == "bf16")

    def _adamw(self, config: TrainConfig) -> torch.optim.AdamW:
        """torch's own AdamW, so that no C++ is compiled on any machine."""
        optim = config.optim
        return torch.optim.AdamW(
            self._trainable,
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=self.device.type == "cuda",
        )

    def _seed_layers(self, first_sample: int) -> None:
        torch.manual_seed(mix_seed(self._seed, first_sample))

    def average(
        self,
        numbers: Mapping[str, list[Tensor]],
        firsts: Sequence[int] = (),
        *,
        done: bool = False,
        stop: bool = False,
    ) -> tuple[dict[str, float], list[int], bool, bool]:
        names = sorted(numbers)
        values = torch.stack([torch.stack(numbers[name]) for name in names]).double()
        counted = ~values.isnan()
        counted[names.index("loss")] = True
        sums = torch.where(counted, values, 0).sum(1)
        places = [0] * (len(firsts) * self.world)  # a sum with zeros gathers: one place each
        places[len(firsts) * self.rank : len(firsts) * (self.rank + 1)] = firsts
        told = torch.tensor([done, stop, *places], dtype=torch.double, device=values.device)
        total = torch.cat([sums, counted.sum(1).double(), told])
        dist.all_reduce(total)
        sums, counts, told = total.split([len(names), len(names), len(told)])
        num_done, num_stop, *all_firsts = map(int, told.tolist())
        means = dict(zip(names, (sums / counts).tolist(), strict=True))
        return means, all_firsts, num_done >= self.world, num_stop >= 1

    def barrier(self) -> None:
        dist.barrier(device_ids=[self.device.index or 0] if self.device.type == "cuda" else None)


class TaskLoss(nn.Module):
    """A task's loss as a module: engines hook the module they call.

    Attributes:
        numbers: what the task gave to log with the last loss, fp32 scalars.
    """

    def __init__(self, task: Task, model: nn.Module, *, bf16: bool) -> None:
        super().__init__()
        self.model = model
        self.numbers: dict[str, Tensor] = {}
        self._task = task
        self._bf16 = bf16

    def forward(self, batch: Batch) -> Tensor:
        device = next(self.model.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=self._bf16):
            loss, numbers = self._task.loss(self.model, batch)
        self.numbers = {
            name: torch.as_tensor(value, dtype=torch.float32, device=loss.device).detach()
            for name, value in numbers.items()
        }
        return loss.float()


def host_copy(state: Any) -> Any:
    """A copy of nested containers that shares nothing with them; tensors lie on the CPU."""

    def copied(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.detach().to("cpu", copy=True)
        return copy.deepcopy(leaf)

    return pytree.tree_map(copied, state)


def write_state(state: Any, path: Path) -> None:
    """Write a copied state so that it is on the disk, not only on its way there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def convert_state(source: Path, target: Path, *, limit: float = 3600.0) -> None:
    """Rewrite a state saved by DeepSpeed so that any number of workers can load it.

    Plain PyTorch's state needs no conversion.

    Args:
        limit: seconds after which it is given up.

    Raises:
        ValueError: DeepSpeed cannot convert it, or not in time.
    """
    # Its own process: it prints, and uses a pool of processes that torch's threads would upset.
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(source / STATE), "--output_folder", str(target / STATE)]
    command += ["--inject_missing_state", "--num_extract_workers", "2", "--num_merge_workers", "2"]
    process = subprocess.Popen(
        command,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"DeepSpeed did not convert {source} within {limit:.0f} s: continue with as many "
            "workers as saved it."
        ) from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its pool too
            process.wait()
    if process.returncode:
        reason = (errors.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"DeepSpeed cannot convert {source}: {reason}")
