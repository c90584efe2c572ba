"""The batches of one worker, built ahead of the steps that take them."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from training.config import TrainConfig
from training.engine import Engine
from training.task import Batch, Task


class BatchLoader:
    """Builds the micro-batches of one worker in threads, `run.prefetch` of them ahead.

    An exception of `task.batch` is raised where the batch is taken.

    Args:
        start: samples seen where the run continues.

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
        self._taken: list[int] = []
        for _ in range(config.run.prefetch):
            self._submit()

    def step(self) -> Iterator[tuple[int, Batch]]:
        """The first sample and the tensors, on the device, of each micro-batch of one step."""
        self.waited = 0.0
        self._taken = []
        for _ in range(self._accumulation):
            self._submit()
            first, future = self._ahead.popleft()
            started = time.perf_counter()
            batch = future.result()
            self.waited += time.perf_counter() - started
            self._taken.append(first)
            yield first, {k: v.to(self._device, non_blocking=True) for k, v in batch.items()}

    def again(self) -> list[Batch]:
        """The micro-batches of the last step once more, on the CPU.

        Built anew, since they are functions of their samples: holding every step's batches for
        the rare one that is looked at would cost memory all the time.
        """
        return [self._pool.submit(self._task.batch, self._samples(f)).result() for f in self._taken]

    def _submit(self) -> None:
        first = next(self._positions, None)
        if first is not None:
            self._ahead.append((first, self._pool.submit(self._build, first)))

    def _build(self, first: int) -> Batch:
        batch = self._task.batch(self._samples(first))
        if self._device.type == "cuda":
            return {name: value.pin_memory() for name, value in batch.items()}
        return batch

    def _samples(self, first: int) -> range:
        return range(first, first + self._micro)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def micro_batches(config: TrainConfig, rank: int, world: int, start: int) -> Iterator[int]:
    """The first sample of each micro-batch of a worker, from position `start` to the run's end.

    A global batch is the positions [s, s + B). Worker r takes the r-th contiguous slice and
    splits it into micro-batches.
    """
    size, micro = config.batch.global_batch, config.batch.micro_batch
    share = size // world
    for position in range(start, config.optim.samples, size):
        first = position + rank * share
        yield from range(first, first + share, micro)


def spans(firsts: Sequence[int], length: int) -> list[list[int]]:
    """First and last sample of each unbroken run of micro-batches, in the order given.

    A step that went well is one span, whatever the number of workers.

    Args:
        firsts: the first sample of each micro-batch.
        length: samples of a micro-batch.
    """
    found: list[list[int]] = []
    for first in firsts:
        if found and found[-1][1] + 1 == first:
            found[-1][1] += length
        else:
            found.append([first, first + length - 1])
    return found
