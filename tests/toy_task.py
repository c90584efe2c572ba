"""A task small enough to train in a second: a regression whose data is a function of sample ids.

Run as a program it is the driver of the integration tests, which kill it.
"""

import argparse
import os
import resource
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from training.config import (
    BatchConfig,
    CheckpointConfig,
    EmaConfig,
    GuardConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from training.task import Batch, Task, sample_generator


class ToyTask(Task):
    name = "toy"
    num_samples = 64

    def __init__(self, config: "ToyConfig", seed: int) -> None:
        self.config, self.seed = config, seed
        self.fingerprint = f"toy-data-{config.data}"
        self.flops = float(6 * 5 * config.width)
        self._problems: list[tuple[str, str]] = []

    def build(self) -> nn.Module:
        width = self.config.width
        model = nn.Sequential(
            nn.Linear(4, width),
            nn.GELU(),
            nn.Dropout(self.config.dropout),
            nn.Linear(width, 1),
            nn.Linear(1, 1),
        )
        model[-1].requires_grad_(False)  # a frozen part inside the model
        return model.train()

    def batch(self, samples: Sequence[int]) -> Batch:
        time.sleep(self.config.delay)
        if self.config.bad_sample in samples:
            raise ValueError(f"sample {self.config.bad_sample} is not readable: remove it.")
        rows = [torch.randn(5, generator=sample_generator(self.seed, s)) for s in samples]
        noise = torch.stack(rows)
        x = noise[:, :4]
        y = torch.tanh(x.sum(1, keepdim=True)) + 0.1 * noise[:, 4:]
        if any(s == self.config.nan_sample or 0 <= self.config.nan_from <= s for s in samples):
            y = y * float("nan")
        if self.config.spike_sample in samples:
            y = y * 1e6
        if self.config.replaced_sample in samples:
            self._problems.append((f"clip-{self.config.replaced_sample}", "it is torn"))
        self._accident(samples)
        return {"x": x, "y": y}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        error = (model(batch["x"]) - batch["y"]).square().mean()
        return error, {"rmse": error.sqrt(), "never": float("nan")}

    def problems(self) -> list[tuple[str, str]]:
        found, self._problems = self._problems, []
        return found

    def save_model(self, state: dict[str, Tensor], folder: Path) -> None:
        save_file(state, folder / "model.safetensors")

    def _accident(self, samples: Sequence[int]) -> None:
        """Die or stop in the middle of the work, the first time this sample is reached."""
        marker = Path(self.config.accident_marker)
        if self.config.accident_at in samples and not marker.exists():
            marker.touch()
            if self.config.accident == "stop":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    name: ClassVar[str] = "toy"
    may_change: ClassVar[tuple[str, ...]] = ("delay", "accident", "accident_at", "accident_marker")

    width: int = 16
    dropout: float = 0.0
    data: int = 0
    delay: float = 0.0
    bad_sample: int = -1
    nan_sample: int = -1
    nan_from: int = -1
    spike_sample: int = -1
    replaced_sample: int = -1
    accident: Literal["kill", "stop"] = "kill"
    accident_at: int = -1
    accident_marker: str = ""

    def build_task(self, seed: int, global_batch: int = 1) -> ToyTask:
        return ToyTask(self, seed)


def toy_config(
    *,
    samples: int = 96,
    workers: int = 1,
    every: int = 32,
    micro: int = 2,
    max_failures: int = 0,
    track: bool = False,
    lr: float = 1e-2,
    background: bool = True,
    guard: GuardConfig | None = None,
    **task: object,
) -> TrainConfig:
    return TrainConfig(
        task=ToyConfig(**task),  # type: ignore[arg-type]
        optim=OptimConfig(samples=samples, lr=lr, warmup_samples=16, schedule="cosine"),
        batch=BatchConfig(global_batch=8, micro_batch=micro),
        ema=EmaConfig(half_life=64),
        checkpoint=CheckpointConfig(every_samples=every, keep=2, background=background),
        guard=guard or GuardConfig(),
        run=RunConfig(
            num_workers=workers,
            threads_per_worker=1,
            max_failures=max_failures,
            log_every=2,
            track=track,
            use_gpu=False,
        ),
    )


def reference_losses(config: TrainConfig) -> list[float]:
    """What plain PyTorch gets from the same task: one process, no ZeRO, no micro-batches."""
    task = config.task.build_task(config.run.seed)
    torch.manual_seed(config.run.seed)
    model, optim = task.build(), config.optim
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
    )
    losses, size = [], config.batch.global_batch
    for start in range(0, optim.samples, size):
        optimizer.param_groups[0]["lr"] = optim.learning_rate(start)
        loss, _ = task.loss(model, task.batch(range(start, start + size)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, optim.clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    from toy_task import toy_config as make_config  # the importable name, for Ray's workers

    from training.launch import train
    from training.metrics import Quiet
    from training.task import Stopped, TrainingError

    class Printed(Quiet):
        def note(self, text: str) -> None:
            print(text, flush=True)

    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--local", action="store_true")
    parser.add_argument("--file-limit", type=int, help="bytes that no file may exceed")
    parser.add_argument("--track", action="store_true")
    parser.add_argument("--accident-at", type=int, default=-1)
    given = parser.parse_args()
    config = make_config(
        samples=given.samples,
        width=given.width,
        workers=given.workers,
        max_failures=1,
        track=given.track,
        delay=given.delay,
        accident_at=given.accident_at,
        accident_marker=str(given.out / "accident"),
    )
    if given.file_limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (given.file_limit, given.file_limit))
    try:
        train(config, given.out, progress=Printed(), local=given.local)
    except (Stopped, TrainingError) as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
