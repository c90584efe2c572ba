"""A Ray cluster to work on, ours or one that is there, and how many workers fit on it.

Ray only executes: what is to be done and what is done is kept in files by whoever works here.
"""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pipelines.ray_sizes import Pool, RunError, amounts, fit

__all__ = ["PATIENCE_SECONDS", "Pool", "RunError", "cluster", "gpus_there", "nodes", "session"]

_OBJECT_STORE_BYTES = 256 << 20
_MIN_CPUS = 4
# A node takes minutes to be bought and booted; another job may end.
PATIENCE_SECONDS = 900.0
_TELL_SECONDS = 30.0
FIRST_WAIT_SECONDS = 5.0


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
    options: str = "--workers or --decoders",
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
        options: of the command line that say how many workers there are to be.

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
            pool = fit(
                nodes(),
                workers,
                tasks,
                per_gpu=per_gpu,
                threads=threads,
                grows=not ours,
                options=options,
            )
            _wait_for_place(pool, patience)
            yield pool
        finally:
            if ours:
                ray.shutdown()


def nodes() -> list[dict[str, float]]:
    """The resources of each machine that is alive and has CPUs."""
    import ray

    return [
        node["Resources"]
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU", 0) >= 1
    ]


def _wait_for_nodes(patience: float) -> None:
    """Wait until there is a machine to work on; asking for one makes an autoscaler start it."""
    if not nodes():
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
        while not group.wait(min(FIRST_WAIT_SECONDS, max(0.1, patience))):
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
