"""A Ray cluster to work on, ours or one that is there, and how many workers fit on it.

Ray only executes: what is to be done and what is done is kept in files by whoever works here.
"""

import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

_OBJECT_STORE_BYTES = 256 << 20
_MIN_CPUS = 4
# Ray Data plans every block before it starts: more of them cost the driver memory and minutes.
_MAX_BLOCKS = 10_000


class RunError(RuntimeError):
    """A run that could not finish; the same command goes on with what is left."""


@dataclass(frozen=True)
class Pool:
    """Workers that fit on the cluster at once, and the share of a GPU that each gets."""

    workers: int
    gpus: float


def gpus_there() -> bool:
    """Whether workers will have GPUs: those of the connected cluster, or of this machine."""
    import ray

    if ray.is_initialized():
        return ray.cluster_resources().get("GPU", 0) > 0
    import torch

    return torch.cuda.is_available()


@contextmanager
def cluster() -> Iterator[None]:
    """Connect to the cluster that RAY_ADDRESS names; nothing where there is none or one is ours."""
    import ray

    if ray.is_initialized() or not os.environ.get("RAY_ADDRESS"):
        yield
        return
    _quiet_core()
    ray.init(logging_level=logging.ERROR, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def session(workers: int | None, tasks: int, *, per_gpu: int | None = None) -> Iterator[Pool]:
    """A pool for `tasks` pieces of work, on the cluster that is there or on one of our own.

    Ray Data waits for ever, without a word, when the actors' CPUs and one more do not fit, so
    this is checked before.

    Args:
        workers: asked for; None takes what fits.
        per_gpu: workers that share a GPU where the number is not asked for; None is no limit.

    Raises:
        RunError: more workers than the cluster has CPUs for.
    """
    import ray

    with cluster():
        ours, share_gpus = not ray.is_initialized(), None if workers else per_gpu
        if ours:
            _quiet_core()
            workers = min(workers or os.cpu_count() or 1, tasks)
            ray.init(
                num_cpus=max(_MIN_CPUS, os.cpu_count() or 1, workers + 1),
                object_store_memory=_OBJECT_STORE_BYTES,
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
        try:
            yield _pool(workers, tasks, share_gpus)
        finally:
            if ours:
                ray.shutdown()


def run_pool(
    actor: type, arguments: tuple[Any, ...], items: Sequence[str], pool: Pool, no_progress: float
) -> None:
    """Hand every item, by name, to a fixed pool of actors; a dead one is replaced.

    Args:
        actor: a class whose `__call__` takes and returns a batch with the column `item`.
        arguments: of its constructor.
        no_progress: seconds without one finished item after which the run is given up.

    Raises:
        RunError: items are left undone.
    """
    import ray

    # Ray prints its remarks about dead workers to standard output, which is for results.
    with _quiet_data(no_progress), redirect_stdout(sys.stderr):
        dataset = ray.data.from_items(
            [{"item": item} for item in items],
            override_num_blocks=min(len(items), _MAX_BLOCKS),
        ).map_batches(
            actor,
            fn_constructor_args=arguments,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=pool.workers, max_tasks_in_flight_per_actor=1),
            num_cpus=1,
            num_gpus=pool.gpus,
        )
        finished = {row["item"] for row in dataset.iter_rows()}
    left = [item for item in items if item not in finished]
    if left:
        raise RunError(f"{len(left)} of {len(items)} were not finished, the first is {left[0]}.")


def _pool(workers: int | None, tasks: int, per_gpu: int | None) -> Pool:
    import ray

    resources = ray.cluster_resources()
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    room = int(cpus) - 1
    if room < 1 or (workers or 1) > room:
        raise RunError(
            f"{workers or 1} workers need {(workers or 1) + 1} CPUs, the Ray cluster has {cpus:g}: "
            "give fewer --workers or a larger cluster."
        )
    size = min(workers or room, room, tasks)
    if gpus and per_gpu:
        size = min(size, max(1, int(gpus * per_gpu)))
    # Equal parts of one GPU each, rounded down, so that all workers find a place.
    share = math.floor(100 / math.ceil(size / gpus)) / 100 if gpus else 0.0
    return Pool(size, share)


def _quiet_core() -> None:
    # Its core writes remarks about its own actors to our standard error.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")


@contextmanager
def _quiet_data(no_progress: float) -> Iterator[None]:
    """Ray Data without its own bars and logs, and with an end to waiting for nothing."""
    import ray

    context = ray.data.DataContext.get_current()
    logger = logging.getLogger("ray.data")
    changes = {
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        "execution_no_progress_timeout_s": int(no_progress),
    }
    before = {name: getattr(context, name) for name in changes if hasattr(context, name)}
    level = logger.level
    try:
        for name in before:
            setattr(context, name, changes[name])
        logger.setLevel(logging.ERROR)
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        logger.setLevel(level)
