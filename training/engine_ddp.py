"""The engine in plain PyTorch: every worker holds everything, gradients are averaged (DDP).

What ZeRO's results are compared with, and enough where model and optimiser fit on one GPU. Weights
are fp32; in bf16 only the computation is (autocast). Rank 0's file holds the whole state.
"""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training.config import TrainConfig
from training.engine import STATE, EngineBase, host_copy, write_state
from training.task import Batch, Task

_FILE = f"{STATE}/ddp.pt"


class DdpEngine(EngineBase):
    """See `training.engine.Engine`. Its state loads on any number of workers as it is."""

    def __init__(self, task: Task, config: TrainConfig, device: torch.device) -> None:
        super().__init__(task, config, device)
        self._loss.to(device)
        self._parallel = DistributedDataParallel(
            self._loss,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            forward_sync_buffers=False,
        )
        self._optimizer = self._adamw(config)
        self._clip = config.optim.clip
        self._done = 0  # micro-batches of this step

    def backward(self, batch: Batch, first_sample: int) -> tuple[Tensor, dict[str, Tensor]]:
        self._seed_layers(first_sample)
        self._done += 1
        last = self._done == self.accumulation
        with nullcontext() if last else self._parallel.no_sync():
            loss = self._parallel(batch)
            (loss / self.accumulation).backward()
        return loss.detach(), self._loss.numbers

    def grad_norm(self) -> float:
        return float(self._norm())

    def _norm(self) -> Tensor:
        return nn.utils.get_total_norm(p.grad for p in self._trainable if p.grad is not None)

    def step(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        if self._clip:
            nn.utils.clip_grads_with_norm_(self._trainable, self._clip, self._norm())
        self._optimizer.step()
        self._clear()

    def skip(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._optimizer.zero_grad()
        self._done = 0

    def snapshot(self) -> Callable[[Path], None]:
        if self.rank:
            return lambda folder: None
        state = host_copy(
            {"model": self.model.state_dict(), "optimizer": self._optimizer.state_dict()}
        )
        return lambda folder: write_state(state, folder / _FILE)

    def load(self, folder: Path) -> None:
        path = folder / _FILE
        if not path.is_file():
            raise ValueError(f"{folder} holds no optimiser state: remove this checkpoint.")
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
