"""What a cluster would need: a curation run played through with measured stage times.

A discrete-event simulation, small enough to trust: workers take shards from one list, work through
a shard's sources one after the other, and wait in line for their node's GPUs where a stage needs
one. Nodes may be lost at random; the shards they were at are done again from the start. Every
source's times are drawn from the measured ones, so long videos come as often as they did.
"""

import heapq
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

# Stages that run on a GPU where there is one; the others need a CPU core.
MODEL_STAGES = ("models", "annotate")


@dataclass(frozen=True, kw_only=True)
class SimulatedCluster:
    """A cluster of like nodes.

    cores: of a node, each with one worker.
    gpus: of a node; 0 leaves the models to the cores.
    gpu_speed: how many times faster a GPU runs the models than one core does.
    core_speed: of one core here, in those that the stage times were measured on.
    losses_per_node_hour: how often a node vanishes (spot); a new one comes after `return_seconds`.
    commit_seconds: of a shard, to the shared storage.
    """

    nodes: int = 100
    cores: int = 16
    gpus: int = 0
    gpu_speed: float = 20.0
    core_speed: float = 1.0
    losses_per_node_hour: float = 0.0
    return_seconds: float = 180.0
    commit_seconds: float = 0.5

    def __post_init__(self) -> None:
        for name in ("nodes", "cores", "gpu_speed", "core_speed", "return_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number above 0.")
        if self.gpus < 0 or self.losses_per_node_hour < 0 or self.commit_seconds < 0:
            raise ValueError("gpus, losses and commit_seconds are expected to be 0 or more.")


class _Node:
    """A node: when each GPU is free, and when the node is lost and back."""

    def __init__(self, gpus: int):
        self.free = [0.0] * gpus
        self.busy = 0.0
        self.losses = 0
        self.lost_at = math.inf
        self.back_at = 0.0

    def run(self, start: float, seconds: float) -> float:
        """When a GPU begins with work that comes at `start`, first come first served."""
        begin = max(start, heapq.heappop(self.free))
        heapq.heappush(self.free, begin + seconds)
        self.busy += self.before_loss(begin, seconds)
        return begin

    def before_loss(self, begin: float, seconds: float) -> float:
        """How much of work that begins at `begin` is done when the node is lost."""
        return max(0.0, min(seconds, self.lost_at - begin))

    def lose(self, cluster: SimulatedCluster, rng: random.Random) -> None:
        """Vanish, with all that waits for the GPUs, and come back as a new node."""
        self.losses, self.back_at = self.losses + 1, self.lost_at + cluster.return_seconds
        self.free = [self.back_at] * len(self.free)
        self.lost_at = _next_loss(self.back_at, cluster, rng)


@dataclass
class _Worker:
    """A worker of a node: what is left of its shard, last step first, and the time spent on it.

    core: seconds of its core; worked: seconds of whatever was at work, core, GPU or storage.
    losses: how often its node had been lost when the shard was begun.
    """

    node: int
    steps: list[tuple[str, float]] = field(default_factory=list)
    core: float = 0.0
    worked: float = 0.0
    at_work: bool = False
    losses: int = 0


def simulate(
    stage_seconds: Sequence[Mapping[str, float]],
    sources: int,
    cluster: SimulatedCluster | None = None,
    *,
    sources_per_shard: int = 8,
    seed: int = 0,
) -> dict[str, Any]:
    """How long a run of `sources` takes, and what its parts do meanwhile.

    Args:
        stage_seconds: of each measured source, seconds of one core by stage.

    Returns:
        hours, sources_per_hour, core_hours, utilisation of cores and GPUs, the share of the
        seconds at work (of cores, GPUs and commits) that was lost with nodes, the tail (hours in
        which a part of the cluster had nothing to do), and the cores that one GPU keeps busy.

    Raises:
        ValueError: nothing was measured, or nothing is to be done.
    """
    cluster = cluster or SimulatedCluster()
    measured = [dict(times) for times in stage_seconds if sum(times.values()) > 0]
    if not measured or sources < 1:
        raise ValueError("expected stage times of at least one source, and at least one source.")
    rng = random.Random(seed)
    nodes = [_Node(cluster.gpus) for _ in range(cluster.nodes)]
    for node in nodes:
        node.lost_at = _next_loss(0.0, cluster, rng)
    workers = [_Worker(number % cluster.nodes) for number in range(cluster.nodes * cluster.cores)]
    steps = [_steps(times, cluster) for times in measured]
    left = math.ceil(sources / sources_per_shard)
    done = useful = kept = lost = 0.0
    first_idle = math.inf
    # (time, number): when each worker has something to do next.
    events = [(0.0, number) for number in range(len(workers))]
    while events:
        now, number = heapq.heappop(events)
        worker = workers[number]
        node = nodes[worker.node]
        while now >= node.lost_at:
            node.lose(cluster, rng)
        if worker.at_work and worker.losses != node.losses:
            # The shard died with its node and goes back to the list.
            lost, left = lost + worker.worked, left + 1
            worker.steps, worker.core, worker.worked, worker.at_work = [], 0.0, 0.0, False
        if now < node.back_at:
            heapq.heappush(events, (node.back_at, number))
            continue
        if worker.steps:
            kind, seconds = worker.steps.pop()
            begin = node.run(now, seconds) if kind == "gpu" else now
            worked = node.before_loss(begin, seconds)
            worker.worked += worked
            worker.core += worked if kind == "core" else 0.0
            # Who dies with the node is not at it until the end that was planned.
            heapq.heappush(events, (min(begin + seconds, node.lost_at), number))
            continue
        if worker.at_work:
            useful, kept = useful + worker.core, kept + worker.worked
            done = max(done, now)
            worker.core, worker.worked, worker.at_work = 0.0, 0.0, False
        if not left:
            first_idle = min(first_idle, now)
            continue
        left -= 1
        worker.at_work, worker.losses = True, node.losses
        # Taken from the end: the commit comes last.
        worker.steps = [("commit", cluster.commit_seconds)]
        for _ in range(sources_per_shard):
            worker.steps += reversed(rng.choice(steps))
        heapq.heappush(events, (now, number))
    core_seconds = done * cluster.nodes * cluster.cores
    gpu_seconds = done * cluster.nodes * cluster.gpus
    busy = sum(node.busy for node in nodes)
    return {
        "cluster": asdict(cluster),
        "sources": sources,
        "hours": round(done / 3600, 3),
        "sources_per_hour": round(sources / done * 3600, 1),
        "core_hours": round(core_seconds / 3600, 1),
        "core_utilisation": round(useful / core_seconds, 4),
        "gpu_utilisation": round(busy / gpu_seconds, 4) if gpu_seconds else None,
        "lost_share": round(lost / max(kept + lost, 1e-9), 5),
        "tail_hours": round(max(0.0, done - first_idle) / 3600, 3),
        "cores_per_gpu": _cores_per_gpu(measured, cluster),
    }


def _steps(times: Mapping[str, float], cluster: SimulatedCluster) -> list[tuple[str, float]]:
    """A source's stages on this cluster, neighbours of one kind joined."""
    found: list[tuple[str, float]] = []
    for stage, seconds in times.items():
        on_gpu = stage in MODEL_STAGES and cluster.gpus > 0
        kind, speed = ("gpu", cluster.gpu_speed) if on_gpu else ("core", cluster.core_speed)
        before = found.pop()[1] if found and found[-1][0] == kind else 0.0
        found.append((kind, before + seconds / speed))
    return found


def _next_loss(now: float, cluster: SimulatedCluster, rng: random.Random) -> float:
    if not cluster.losses_per_node_hour:
        return math.inf
    return now + rng.expovariate(cluster.losses_per_node_hour / 3600)


def _cores_per_gpu(
    measured: Sequence[Mapping[str, float]], cluster: SimulatedCluster
) -> float | None:
    """How many cores feed one GPU so that neither waits for the other, on average."""
    models = sum(times.get(stage, 0.0) for times in measured for stage in MODEL_STAGES)
    rest = sum(sum(times.values()) for times in measured) - models
    if not cluster.gpus or not models:
        return None
    return round(rest / cluster.core_speed / (models / cluster.gpu_speed), 1)
