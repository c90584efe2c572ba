"""The training loop: the same order every step, all of it a function of `samples_seen`.

A global batch is the positions [s, s + B). Worker r takes the r-th contiguous slice and splits it
into micro-batches. Checkpoint, average and log fall due at multiples of their interval.
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from math import isfinite, isnan
from pathlib import Path
from typing import Self

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from training import checkpoint as ckpt
from training.config import TrainConfig
from training.ema import WeightAverage, ema_decay
from training.engine import Engine
from training.metrics import MetricsLog
from training.reporter import Reporter
from training.task import Batch, Task, TrainingError
from training.tracking import Tracker


def train_loop(
    task: Task,
    config: TrainConfig,
    out: Path,
    *,
    reporter: Reporter,
    tracker: Tracker,
    device: torch.device,
) -> None:
    """Train to the end, from the newest checkpoint in `out/checkpoints` if there is one.

    Every worker runs it; needs an initialised process group.

    Raises:
        TrainingError: the loss or its gradient is no longer a finite number.
        ResumeError: the checkpoint belongs to another run.
    """
    task.prepare(device)
    root, size = out / "checkpoints", config.batch.global_batch
    latest = ckpt.newest_checkpoint(root, thorough=False)
    converted = latest is not None and latest.world != dist.get_world_size()
    engine = Engine(task, config, device, converted=converted)
    average = WeightAverage(engine.model, keep=engine.rank == 0)
    about = ckpt.describe_run(config, task.fingerprint, engine.world)

    samples_seen = 0
    if latest is not None:
        ckpt.check_resume(latest, config, task.fingerprint)
        ckpt.read_checkpoint(latest, engine, average)
        samples_seen = latest.samples_seen
    engine.barrier()

    first = engine.rank == 0
    with (
        MetricsLog(out / "metrics.jsonl", samples_seen) if first else nullcontext() as log,
        BatchLoader(task, config, engine, samples_seen) as loader,
    ):
        while samples_seen < config.optim.samples:
            started = time.perf_counter()
            rate = config.optim.learning_rate(samples_seen)
            engine.set_learning_rate(rate)

            numbers: dict[str, list[Tensor]] = {}
            for first_sample, batch in loader.step():
                loss, extra = engine.backward(batch, first_sample)
                for name, value in {**extra, "loss": loss}.items():
                    numbers.setdefault(name, []).append(value)
            means = engine.average(numbers)
            step = samples_seen // size + 1
            _stop_unless_finite(means["loss"], engine.grad_norm, step, samples_seen, size)

            samples_seen += size
            if step % config.ema.every == 0:
                covered = config.ema.every * size
                ema = config.ema
                average.update(ema_decay(samples_seen, covered, ema.half_life, ema.ramp))

            seconds = time.perf_counter() - started
            record = {
                "samples_seen": samples_seen,
                "step": step,
                **{name: None if isnan(value) else value for name, value in means.items()},
                "lr": rate,
                "grad_norm": engine.grad_norm,
                "dt": seconds,
                "data_wait": loader.waited,
                "samples_per_second": size / seconds,
                "memory_gb": _memory_gb(device),
                "epoch": samples_seen / task.num_samples,
            }
            if log is not None:
                log.write(record)
                if step % config.run.log_every == 0:
                    tracker.log(record)

            if _due(samples_seen, size, config.checkpoint.every_samples, config.optim.samples):
                _save(engine, average, reporter, samples_seen, about)
                if first:
                    ckpt.prune(root, config.checkpoint.keep)


def _save(
    engine: Engine,
    average: WeightAverage,
    reporter: Reporter,
    samples_seen: int,
    about: Mapping[str, object],
) -> None:
    position = {"samples_seen": samples_seen}

    def write(folder: Path) -> None:
        ckpt.write_checkpoint(folder, engine, average, {**about, **position})

    reporter.save(ckpt.checkpoint_name(samples_seen), write, position)
    engine.barrier()  # every worker's files are in place


def _due(samples_seen: int, size: int, every: int, end: int) -> bool:
    """Whether the step that ended here crossed a multiple of `every`, or ended the run."""
    return samples_seen // every > (samples_seen - size) // every or samples_seen >= end


def _stop_unless_finite(
    loss: float, grad_norm: float, step: int, samples_seen: int, size: int
) -> None:
    for name, value in (("loss", loss), ("gradient norm", grad_norm)):
        if not isfinite(value):
            raise TrainingError(
                f"The {name} is {value} at step {step} (samples {samples_seen} to "
                f"{samples_seen + size - 1}): lower optim.lr, or look at these samples."
            )


def _memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9


class BatchLoader:
    """Builds the micro-batches of one worker in threads, `run.prefetch` of them ahead.

    An exception of `task.batch` is raised where the batch is taken.

    Attributes:
        waited: seconds that the last step waited for its batches.
    """

    def __init__(self, task: Task, config: TrainConfig, engine: Engine, start: int) -> None:
        self.waited = 0.0
        self._task, self._device = task, engine.device
        self._micro, self._accumulation = config.batch.micro_batch, engine.accumulation
        self._pool = ThreadPoolExecutor(config.run.loader_threads, thread_name_prefix="batch")
        self._positions = micro_batches(config, engine.rank, engine.world, start)
        self._ahead: deque[tuple[int, Future[Batch]]] = deque()
        for _ in range(config.run.prefetch):
            self._submit()

    def step(self) -> Iterator[tuple[int, Batch]]:
        """The first sample and the tensors, on the device, of each micro-batch of one step."""
        self.waited = 0.0
        for _ in range(self._accumulation):
            self._submit()
            first, future = self._ahead.popleft()
            started = time.perf_counter()
            batch = future.result()
            self.waited += time.perf_counter() - started
            yield first, {k: v.to(self._device, non_blocking=True) for k, v in batch.items()}

    def _submit(self) -> None:
        first = next(self._positions, None)
        if first is not None:
            self._ahead.append((first, self._pool.submit(self._build, first)))

    def _build(self, first: int) -> Batch:
        batch = self._task.batch(range(first, first + self._micro))
        if self._device.type == "cuda":
            return {name: value.pin_memory() for name, value in batch.items()}
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def micro_batches(config: TrainConfig, rank: int, world: int, start: int) -> Iterator[int]:
    """The first sample of each micro-batch of a worker, from position `start` to the run's end."""
    size, micro = config.batch.global_batch, config.batch.micro_batch
    share = size // world
    for position in range(start, config.optim.samples, size):
        first = position + rank * share
        yield from range(first, first + share, micro)
