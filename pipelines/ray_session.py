"""A Ray cluster to work on, ours or one that is there, and how many workers fit on it.

Ray only executes: what is to be done and what is done is kept in files by whoever works here.
"""

import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

from pipelines.ray_sizes import Pool, RunError, amounts, fit, places

__all__ = ["PATIENCE_SECONDS", "Pool", "RunError", "cluster", "gpus_there", "run_pool", "session"]

_OBJECT_STORE_BYTES = 256 << 20
_MIN_CPUS = 4
# Ray Data plans every block before it starts: more of them cost the driver memory and minutes.
_MAX_BLOCKS = 4_000
# For as many workers as that leaves short: one that has no more to do is idle till the end.
_BLOCKS_A_THREAD = 4
# A node takes minutes to be bought and booted; another job may end.
PATIENCE_SECONDS = 900.0
_TELL_SECONDS = 30.0
_FIRST_WAIT_SECONDS = 5.0
# Workers may die while they start, with their nodes, and are replaced; one that can never start
# says why instead of dying.
_STARTS_THAT_MAY_DIE = 32


def gpus_there() -> bool:
    """Whether workers will have GPUs: those of the connected cluster, or of this machine."""
    import ray

    if ray.is_initialized():
        return ray.cluster_resources().get("GPU", 0) > 0
    import torch

    return torch.cuda.is_available()


@contextmanager
def cluster() -> Iterator[None]:
    """Connect to the cluster that RAY_ADDRESS names; nothing where there is none or one is ours.

    Raises:
        RunError: none answers there.
    """
    import ray

    address = os.environ.get("RAY_ADDRESS")
    if ray.is_initialized() or not address:
        yield
        return
    _quiet_core()
    try:
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
    except ConnectionError:
        raise RunError(
            f"no Ray cluster answers at RAY_ADDRESS={address}: start one, or unset RAY_ADDRESS to "
            "work on this machine alone."
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def session(
    workers: int | None,
    tasks: int,
    *,
    per_gpu: int | None = 1,
    threads: int | None = 1,
    patience: float = PATIENCE_SECONDS,
) -> Iterator[Pool]:
    """A pool for `tasks` pieces of work, on the cluster that is there or on one of our own.

    Ray waits for ever, without a word, where no machine has what a worker needs, so that is waited
    for here: with words, and with an end.

    Args:
        workers: asked for; None takes what fits, and on a cluster that is there what will fit when
            it grows.
        per_gpu: workers that share a GPU where the number is not asked for; None is no limit.
        threads: pieces of work a worker does at once; None takes as many as a worker's share of
            its GPU has CPUs on its machine, and one where there are no GPUs.
        patience: seconds to wait for machines, or for other work to leave them.

    Raises:
        RunError: the cluster has no room for the workers.
    """
    import ray

    with cluster():
        ours = not ray.is_initialized()
        if ours:
            _quiet_core()
            here = os.cpu_count() or 1
            # Never the cluster that someone else has on this machine.
            ray.init(
                address="local",
                num_cpus=max(_MIN_CPUS, here, (workers or 1) * (threads or 1) + 1),
                object_store_memory=_OBJECT_STORE_BYTES,
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
            if workers is None and not gpus_there():
                # Of more CPUs than there are, for small machines, only those there are.
                workers = max(1, here // (threads or 1))
            workers = None if workers is None else min(workers, tasks)
        try:
            _wait_for_nodes(patience)
            pool = fit(_nodes(), workers, tasks, per_gpu=per_gpu, threads=threads, grows=not ours)
            _wait_for_place(pool, patience)
            yield pool
        finally:
            if ours:
                ray.shutdown()


def run_pool(
    actor: type,
    arguments: tuple[Any, ...],
    items: Sequence[str],
    pool: Pool,
    no_progress: float,
    *,
    patience: float = PATIENCE_SECONDS,
) -> None:
    """Hand every item, by name, to a pool of actors; a dead one is replaced.

    The pool grows with the cluster where it may (`pool.most`), and gives back what it does not
    need.

    Args:
        actor: a class whose `__call__` takes a batch with the column `item` and returns one with
            the column, or with a sentence in the column `refusal` where it cannot work at all. It
            is called from `pool.threads` threads at once.
        arguments: of its constructor.
        no_progress: seconds without one finished item after which the run is given up.
        patience: seconds without a machine that has room for a worker, likewise.

    Raises:
        RunError: items are left undone.
    """
    import ray
    from ray.exceptions import RayError

    finished: set[str] = set()
    blocks = min(len(items), max(_MAX_BLOCKS, _BLOCKS_A_THREAD * pool.workers * pool.threads))
    # Ray sees whole blocks alone.
    no_progress *= math.ceil(len(items) / blocks)
    # Ray prints its remarks about dead workers to standard output, which is for results.
    with _data_settings(pool, no_progress, patience), redirect_stdout(sys.stderr):
        dataset = ray.data.from_items(
            [{"item": item} for item in items],
            override_num_blocks=blocks,
        ).map_batches(
            actor,
            fn_constructor_args=arguments,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                min_size=1,
                initial_size=pool.workers,
                max_size=pool.most or pool.workers,
                max_tasks_in_flight_per_actor=pool.threads,
                max_concurrent_calls_per_actor=pool.threads,
                enable_true_multi_threading=pool.threads > 1,
            ),
            num_cpus=pool.threads,
            num_gpus=pool.gpus,
        )
        try:
            for row in dataset.iter_rows():
                if row.get("refusal"):
                    raise RunError(row["refusal"])
                finished.add(row["item"])
        except RayError as error:
            # Where it was raised among Ray's threads is of no use to anyone.
            if isinstance(error.__cause__, RunError):
                raise error.__cause__ from None
            raise
    left = [item for item in items if item not in finished]
    if left:
        raise RunError(f"{len(left)} of {len(items)} were not finished, the first is {left[0]}.")


def _nodes() -> list[dict[str, float]]:
    """The resources of each machine that is alive and has CPUs."""
    import ray

    return [
        node["Resources"]
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU", 0) >= 1
    ]


def _wait_for_nodes(patience: float) -> None:
    """Wait until there is a machine to work on; asking for one makes an autoscaler start it."""
    if not _nodes():
        _wait(
            {"CPU": 1},
            patience,
            "the Ray cluster has no machine with a CPU yet",
            "start nodes, or look at the autoscaler's messages",
        )


def _wait_for_place(pool: Pool, patience: float) -> None:
    """Wait until a first worker finds a place."""
    need = {"CPU": float(pool.threads)} | ({"GPU": pool.gpus} if pool.gpus else {})
    _wait(
        need,
        patience,
        f"other work holds the Ray cluster: a worker needs {amounts(need)} on one machine",
        "wait for the other work, stop it, or add machines",
    )


def _wait(need: dict[str, float], patience: float, what: str, cure: str) -> None:
    """Wait until a machine has `need` free. Raises RunError after `patience` seconds."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group([need])
    began, told = time.monotonic(), -_TELL_SECONDS
    try:
        while not group.wait(min(_FIRST_WAIT_SECONDS, max(0.1, patience))):
            waited = time.monotonic() - began
            free = ray.available_resources()
            now = amounts({name: free.get(name, 0.0) for name in need})
            if waited >= patience:
                raise RunError(f"{what}, and {now} are free after {waited:.0f} s: {cure}.")
            if waited - told >= _TELL_SECONDS:
                told = waited
                print(f"waiting: {what} ({now} are free)", file=sys.stderr, flush=True)
    finally:
        remove_placement_group(group)


def _quiet_core() -> None:
    # Its core writes remarks about its own actors to our standard error.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")


@contextmanager
def _data_settings(pool: Pool, no_progress: float, patience: float) -> Iterator[None]:
    """Ray Data without its own bars and logs, and with an end to waiting for nothing."""
    import ray

    context = ray.data.DataContext.get_current()
    scaling, logger = context.autoscaling_config, logging.getLogger("ray.data")
    changes = {
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        "execution_no_progress_timeout_s": int(no_progress),
        "max_consecutive_actor_init_deaths": _STARTS_THAT_MAY_DIE,
        "custom_execution_callback_classes": [_watch(pool, patience)],
    }
    before = {name: getattr(context, name) for name in changes if hasattr(context, name)}
    level, threshold = logger.level, scaling.actor_pool_util_upscaling_threshold
    try:
        for name in before:
            setattr(context, name, changes[name])
        # Workers get no work to queue up, so a pool all of whose workers are busy is to grow.
        scaling.actor_pool_util_upscaling_threshold = 1.0
        logger.setLevel(logging.ERROR)
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        scaling.actor_pool_util_upscaling_threshold = threshold
        logger.setLevel(level)


def _watch(pool: Pool, patience: float) -> type:
    """What Ray Data calls at every step: gives the run up when no machine is left for it."""

    class Watch:
        def __init__(self) -> None:
            self.looked = self.seen = time.monotonic()

        def before_execution_starts(self, executor: Any) -> None: ...

        def after_execution_succeeds(self, executor: Any) -> None: ...

        def after_execution_fails(self, executor: Any, error: Exception) -> None: ...

        def on_execution_step(self, executor: Any) -> None:
            now = time.monotonic()
            if now - self.looked < min(_FIRST_WAIT_SECONDS, patience):
                return
            self.looked = now
            if any(places(node, pool.threads, pool.gpus) for node in _nodes()):
                self.seen = now
            elif now - self.seen >= patience:
                raise RunError(
                    f"no machine of the Ray cluster has had room for a worker for {patience:.0f} s:"
                    " add machines and run again; what is committed is not done again."
                )

    return Watch
