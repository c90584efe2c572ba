"""A Ray cluster on this machine whose nodes and processes are there to be killed."""

import random
import time
from contextlib import suppress
from typing import Any

import psutil

# A node that is only slow, on a busy machine, is not to be taken for a dead one.
UNHURRIED = {"health_check_timeout_ms": 60_000, "health_check_period_ms": 1000}


class Nodes:
    """A Ray cluster of a head, on which nothing is done, and worker nodes that may be killed.

    Args:
        watched: a word in the command line of processes that must not outlive their node.
    """

    def __init__(self, watched: str, workers: int = 2):
        from ray.cluster_utils import Cluster

        self._watched, self._count = watched, workers
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "object_store_memory": 100 << 20,
                "include_dashboard": False,
                "_system_config": UNHURRIED,
            },
        )
        self._workers = [self._add() for _ in range(workers)]
        self._lost: list[psutil.Process] = []
        self.address = str(self._cluster.address)

    def _add(self) -> Any:
        return self._cluster.add_node(num_cpus=2, object_store_memory=100 << 20)

    def kill_one(self, rng: random.Random) -> None:
        """SIGKILL a node's raylet and all its workers at once, as a vanished machine would."""
        node = self._workers.pop(rng.randrange(len(self._workers)))
        self._lost += below(node, self._watched)
        kill_tree(raylet(node))
        with suppress(Exception):
            self._cluster.remove_node(node, allow_graceful=False)

    def below(self, word: str) -> list[psutil.Process]:
        """Processes of all nodes whose command line has a word."""
        return [process for node in self._workers for process in below(node, word)]

    def watched(self) -> list[psutil.Process]:
        """The processes that are watched, those of vanished nodes included."""
        self._lost = [process for process in self._lost if process.is_running()]
        return self.below(self._watched) + self._lost

    def mend(self) -> None:
        """As many nodes as at first."""
        while len(self._workers) < self._count:
            self._workers.append(self._add())

    def close(self) -> None:
        self._cluster.shutdown()


def kill_tree(pid: int) -> None:
    """SIGKILL a process and all below it."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for victim in [*process.children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                victim.kill()


def raylet(node: Any) -> int:
    """The process that all of a node's workers are below."""
    return node.all_processes["raylet"][0].process.pid


def below(node: Any, word: str) -> list[psutil.Process]:
    """A node's processes whose command line has a word; other clusters are none of ours."""
    found = []
    with suppress(psutil.Error):
        for process in psutil.Process(raylet(node)).children(recursive=True):
            with suppress(psutil.Error):
                if word in " ".join(process.cmdline()):
                    found.append(process)
    return found


def orphans(nodes: Nodes, seconds: float = 20.0) -> int:
    """Watched processes that are still there after `seconds`, when no run is."""
    deadline = time.monotonic() + seconds
    while (left := nodes.watched()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return len(left)
