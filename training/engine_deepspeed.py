"""The engine that shares out optimiser state, gradients and weights: DeepSpeed ZeRO, stages 1 to 3.

With `ema.py` the only place that knows DeepSpeed. Of its inside this file relies on where the
reduced gradients of a step lie, on its refusal of gradients that are not finite, and on all files
of a checkpoint going through `checkpoint_engine`. Each is checked where it is used: a release of
DeepSpeed that changes one of them stops training instead of spoiling it.
"""

import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from training.config import TrainConfig
from training.engine import STATE, EngineBase, host_copy, write_state
from training.task import Batch, Task


class DeepSpeedEngine(EngineBase):
    """See `training.engine.Engine`."""

    def __init__(
        self, task: Task, config: TrainConfig, device: torch.device, *, converted: bool = False
    ) -> None:
        deepspeed = import_deepspeed(device)
        super().__init__(task, config, device)
        settings = deepspeed_settings(
            config, self.world, device, sum(p.numel() for p in self._trainable)
        )
        self._engine: Any = deepspeed.initialize(
            model=self._loss,
            model_parameters=self._trainable,
            optimizer=self._adamw(config),
            config=settings | {"checkpoint": {"load_universal": converted}},
            dist_init_required=False,
        )[0]
        self._files = _Files(self._engine.checkpoint_engine)
        self._engine.checkpoint_engine = self._files

    def backward(self, batch: Batch, first_sample: int) -> tuple[Tensor, dict[str, Tensor]]:
        self._seed_layers(first_sample)
        loss = self._engine(batch)
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # counts the micro-batch, no more
        return loss.detach(), self._loss.numbers

    def grad_norm(self) -> float:
        # In fp32 like DeepSpeed's own, so that what it refuses is not finite here.
        gradients = [gradient for part in self._gradients() for gradient in part]
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
        total = torch.stack(norms).square().sum()
        dist.all_reduce(total)
        return float(total.sqrt())

    def step(self, rate: float) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        self._engine.step()
        if not self._engine.was_step_applied():
            raise RuntimeError("DeepSpeed left out a step whose gradients are finite.")

    def skip(self) -> None:
        # DeepSpeed refuses gradients that are not finite, and then clears all that a step leaves
        # behind.
        optimizer = self._engine.optimizer
        if self._keeps_masters:
            for gradient in optimizer.fp32_groups_gradients_flat:
                gradient.fill_(torch.nan)  # in place: it sets them to zero afterwards
        else:
            part = self._gradients()[0]
            part[:] = [torch.full_like(gradient, torch.nan) for gradient in part]
            optimizer.check_grad_overflow = True  # stages 1 and 2 do not look in bf16 otherwise
        self._engine.step()
        optimizer.check_grad_overflow = False
        if self._engine.was_step_applied():
            raise RuntimeError("DeepSpeed took a step that was to be left out.")

    @property
    def _keeps_masters(self) -> bool:
        """Whether this is the optimiser DeepSpeed takes for bf16 in stage 1, which is another."""
        return hasattr(self._engine.optimizer, "fp32_groups_gradients_flat")

    def _gradients(self) -> list[list[Tensor]]:
        """This worker's share of the step's mean gradient: DeepSpeed's list for each group."""
        optimizer = self._engine.optimizer
        if self._keeps_masters:
            return [optimizer.fp32_groups_gradient_flat_partition]
        return list(optimizer.averaged_gradients.values())

    def snapshot(self) -> Callable[[Path], None]:
        with tempfile.TemporaryDirectory() as scratch:  # gets two scripts that are not wanted
            self._engine.save_checkpoint(scratch, tag=STATE, save_latest=False)
            files = self._files.taken(Path(scratch))

        def write(folder: Path) -> None:
            for name, state in files.items():
                write_state(state, folder / name)

        return write

    def load(self, folder: Path) -> None:
        if not (folder / STATE).is_dir():
            raise ValueError(f"{folder} holds no optimiser state: remove this checkpoint.")
        self._engine.load_checkpoint(str(folder), tag=STATE)
        # Counted in micro-batches; another micro-batch size would move the step boundary.
        self._engine.micro_steps = 0


class _Files:
    """DeepSpeed's reader and writer of files, which keeps copies instead of writing."""

    def __init__(self, original: Any) -> None:
        self._original = original
        self._kept: dict[str, Any] = {}

    def save(self, state_dict: Any, path: str) -> None:
        self._kept[path] = host_copy(state_dict)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing: folders are made when the copies are written."""

    def taken(self, root: Path) -> dict[Path, Any]:
        """The copies by their path below `root`, which are let go here.

        Raises:
            RuntimeError: DeepSpeed saved nothing through this.
        """
        kept, self._kept = self._kept, {}
        if not kept:
            raise RuntimeError("DeepSpeed did not hand over the state to save.")
        return {Path(path).relative_to(root): state for path, state in kept.items()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, quiet, and without the operator it would compile on a CPU."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", "0")  # required also where there is one process
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It calls torch.distributed by names that torch is giving up.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
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
