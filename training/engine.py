"""One optimiser step across workers: DeepSpeed ZeRO behind four calls.

With `ema.py` and `checkpoint.py` the only place that knows DeepSpeed. AdamW is torch's own, so
that no C++ is compiled on any machine; ZeRO shares out its state and the gradients.
"""

import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.config import TrainConfig
from training.task import Batch, Task, mix_seed

_TAG = "state"


class Engine:
    """The model, its optimiser and the process group of one worker.

    Needs an initialised process group; every method is collective.

    Args:
        converted: the state to `load` went through `convert_state`.

    Attributes:
        model: the bare module, with its own parameter names.

    Raises:
        ValueError: nothing in the model is trainable, or the batch does not divide.
    """

    def __init__(
        self, task: Task, config: TrainConfig, device: torch.device, *, converted: bool = False
    ) -> None:
        deepspeed = import_deepspeed(device)
        self.device = device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.accumulation = config.accumulation(self.world)
        self._seed = config.run.seed
        torch.manual_seed(config.run.seed)
        self.model = task.build()
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        if not trainable:
            raise ValueError(f"task {task.name}: the model has no trainable parameters.")
        optim, num_trainable = config.optim, sum(p.numel() for p in trainable)
        optimizer = torch.optim.AdamW(
            trainable,
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=device.type == "cuda",
        )
        self._loss = _Loss(task, self.model, bf16=config.run.precision == "bf16")
        self._engine: Any = deepspeed.initialize(
            model=self._loss,
            model_parameters=trainable,
            optimizer=optimizer,
            config=deepspeed_settings(config, self.world, device, num_trainable)
            | {"checkpoint": {"load_universal": converted}},
            dist_init_required=False,
        )[0]

    def backward(self, batch: Batch, first_sample: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward and backward of one micro-batch; gradients add up until `step`.

        Layers with randomness of their own (dropout) draw from a seed of the first sample.
        """
        torch.manual_seed(mix_seed(self._seed, first_sample))
        loss = self._engine(batch)
        self._engine.backward(loss)
        self._engine.step()  # acts on the last micro-batch of a step only
        return loss.detach(), self._loss.numbers

    def set_learning_rate(self, rate: float) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate

    @property
    def grad_norm(self) -> float:
        """Global gradient norm of the last step, before clipping."""
        return float(self._engine.get_global_grad_norm() or 0.0)

    def average(self, numbers: Mapping[str, list[Tensor]]) -> dict[str, float]:
        """The mean of each list over the micro-batches of all workers; NaN entries are left out,
        except from `loss`, where they must show."""
        names = sorted(numbers)
        values = torch.stack([torch.stack(numbers[name]) for name in names]).double()
        counted = ~values.isnan()
        counted[names.index("loss")] = True
        total = torch.stack([torch.where(counted, values, 0).sum(1), counted.sum(1).double()])
        dist.all_reduce(total)
        return dict(zip(names, (total[0] / total[1]).tolist(), strict=True))

    def barrier(self) -> None:
        dist.barrier(device_ids=[self.device.index or 0] if self.device.type == "cuda" else None)

    def save(self, folder: Path) -> None:
        """Write this worker's part of model and optimiser."""
        self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        """Read back what the same number of workers saved, or what was converted."""
        path, _ = self._engine.load_checkpoint(str(folder), tag=_TAG)
        if path is None:
            raise ValueError(f"{folder} holds no optimiser state: remove this checkpoint.")
        # Counted in micro-batches; another micro-batch size would move the step boundary.
        self._engine.micro_steps = 0


class _Loss(nn.Module):
    """A task's loss as a module: DeepSpeed hooks the output of the module it calls."""

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


def convert_state(source: Path, target: Path) -> None:
    """Rewrite a saved state so that any number of workers can load it (ZeRO stages 1 and 2).

    Raises:
        ValueError: DeepSpeed cannot convert it.
    """
    # Its own process: it prints, and uses a pool of processes that torch's threads would upset.
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(source / _TAG), "--output_folder", str(target / _TAG)]
    command += ["--inject_missing_state", "--num_extract_workers", "2", "--num_merge_workers", "2"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"DeepSpeed cannot convert {source}: {reason}")


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, quiet, and without the operator it would compile on a CPU."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", "0")  # required also where there is one process
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        # An all-reduce for inference that DeepSpeed compiles on first use: over a minute, fails
        # without a compiler, and a killed build leaves a lock on which the next run hangs.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def deepspeed_settings(
    config: TrainConfig, world: int, device: torch.device, num_parameters: int
) -> dict[str, Any]:
    """The dictionary that `deepspeed.initialize` takes."""
    bf16 = config.run.precision == "bf16"
    bucket = min(num_parameters + num_parameters % 2, 200_000_000)  # elements, all allocated
    return {
        "train_batch_size": config.batch.global_batch,
        "train_micro_batch_size_per_gpu": config.batch.micro_batch,
        "gradient_accumulation_steps": config.accumulation(world),
        "gradient_clipping": config.optim.clip,
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": config.run.zero_stage,
            "contiguous_gradients": True,
            "overlap_comm": device.type == "cuda",
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
