"""How many workers fit on the machines of a cluster, and what each of them gets."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# A Python process runs one thread at a time between the calls that do the work.
_MOST_THREADS = 16


class RunError(RuntimeError):
    """A run that could not finish; the same command goes on with what is left."""


@dataclass(frozen=True)
class Pool:
    """Workers that fit on the cluster at once, and what each of them gets.

    gpus: share of a GPU.
    threads: pieces of work that a worker does at the same time, with a CPU for each.
    most: workers there may be when nodes come; None for no more than now.
    """

    workers: int
    gpus: float
    threads: int = 1
    most: int | None = None


def fit(
    nodes: Sequence[Mapping[str, float]],
    workers: int | None,
    tasks: int,
    *,
    per_gpu: int | None = 1,
    threads: int | None = 1,
    grows: bool = False,
    options: str = "--workers or --decoders",
) -> Pool:
    """The pool that fits on nodes with these resources (`CPU`, `GPU`).

    Where there are GPUs every worker gets a share of one, so that all work is done by the same kind
    of machine; the shares are equal parts, rounded down.

    Raises:
        RunError: no room for so many workers, or for a single one.
    """
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    share = 0.0
    if gpus:
        nodes = [node for node in nodes if node.get("GPU", 0) >= 1]
        cpus = sum(int(node.get("CPU", 0)) for node in nodes)
        wanted = min(workers, tasks) if workers else min(gpus * (per_gpu or cpus), tasks)
        share = math.floor(100 / math.ceil(max(1, wanted) / gpus)) / 100
    if threads is None:
        parts = [node.get("CPU", 0) / node["GPU"] * share for node in nodes] if gpus else [1.0]
        threads = max(1, min(_MOST_THREADS, int(min(parts) + 1e-6)))
    threads = min(threads, tasks)
    room = sum(places(node, threads, share) for node in nodes)
    if room < (workers or 1):
        need = amounts({"CPU": threads} | ({"GPU": share} if share else {}))
        have = "; ".join(amounts(node) for node in nodes[:4]) or "none"
        raise RunError(
            f"{workers or 1} workers need {need} each, the Ray cluster has room for {room} of them "
            f"(its machines: {have}{', …' if len(nodes) > 4 else ''}): give fewer {options}, "
            "leave them out to take what is there, or enlarge the cluster."
        )
    most = math.ceil(tasks / threads)
    size = min(workers or room, room, most)
    return Pool(size, share, threads, most if grows and workers is None else None)


def places(node: Mapping[str, float], threads: int, share: float) -> int:
    """How many workers of `threads` CPUs and a share of a GPU find a place on a node."""
    found = int(node.get("CPU", 0)) // threads
    # A worker's share is of one GPU, never of two.
    return min(found, int(node.get("GPU", 0)) * int(1 / share + 1e-6)) if share else found


def amounts(resources: Mapping[str, float]) -> str:
    """CPUs and GPUs in words."""
    return " and ".join(
        f"{resources[name]:g} {name}{'s' * (resources[name] != 1)}"
        for name in ("CPU", "GPU")
        if name in resources
    )
