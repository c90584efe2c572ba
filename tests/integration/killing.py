"""Killing runs on a Ray cluster of this machine at random moments until they end all the same."""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

# A node that is only slow, on a busy machine, is not to be taken for a dead one.
UNHURRIED = {"health_check_timeout_ms": 60_000, "health_check_period_ms": 1000}
LIMIT_SECONDS = 300.0
MOST_RESUMES = 10
MOST_MISSES = 10

Driver = subprocess.Popen[bytes]
Result = dict[str, Any]


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


def run_to_the_end(
    plan: Sequence[tuple[str, float]],
    nodes: Nodes,
    *,
    begin: Callable[[], Driver],
    wait: Callable[[float, Driver], None],
    strike: Callable[[str, Driver], bool],
    whole: Callable[[Driver], bool] = lambda driver: driver.returncode == 0,
    after: Callable[[], None] = lambda: None,
    pause: float = 0.1,
) -> Result:
    """One round: start, strike at each moment, start again until it succeeds.

    Args:
        plan: what is killed, and when.
        wait: until a moment of the plan, or until the driver has ended.
        strike: kills one of a kind; False while there is none.
        whole: whether a driver that has ended did all there was to do.
        after: called after each kill and each end.
        pause: seconds from one look for something to kill to the next.
    """
    struck: list[str] = []
    left, starts, began = list(plan), 0, time.monotonic()
    driver: Driver | None = None
    while True:
        if driver is None:
            driver, starts = begin(), starts + 1
        if left:
            kind, moment = left.pop(0)
            wait(moment, driver)
            deadline = time.monotonic() + LIMIT_SECONDS
            while driver.poll() is None and time.monotonic() < deadline:
                if strike(kind, driver):
                    struck.append(kind)
                    break
                time.sleep(pause)
        else:
            try:
                driver.wait(LIMIT_SECONDS)
            except subprocess.TimeoutExpired:
                kill_tree(driver.pid)
                return {"struck": struck, "starts": starts, "hung": True}
        nodes.mend()
        after()
        if driver.poll() is not None:
            if not left and whole(driver):
                seconds = round(time.monotonic() - began, 1)
                return {"struck": struck, "starts": starts, "seconds": seconds}
            driver = None
        if starts > MOST_RESUMES:
            return {"struck": struck, "starts": starts, "gave_up": True}


def repeat(
    runs: int,
    folder: Path,
    nodes: Nodes,
    one: Callable[[int, Path], tuple[Sequence[str], Result, Iterable[str]]],
    *,
    until_struck: bool = False,
) -> Result:
    """Rounds, each in a folder of its own that is kept where something was wrong.

    Args:
        one: from a round's number and folder to what was to be killed, the round's result, and
            whatever was wrong with it.
        until_struck: whether a round in which nothing was killed, as its driver ended before, is
            no run: `one` is called again with its number, and has failed after `MOST_MISSES`.

    Returns:
        `runs`, `kills` by kind, `runs_without_a_kill`, `starts`, and `failures`, empty if all is
        well. With `until_struck`, `runs` are those with a kill, and the others come on top.
    """
    failures, rounds, plans = [], [], []
    number, misses = 0, 0
    while number < runs:
        out = folder / (f"run-{number:03d}" + (f"-{misses}" if misses else ""))
        kinds, result, found = one(number, out)
        wrong = [*found, *(key for key in ("hung", "gave_up") if result.get(key))]
        if left := orphans(nodes):
            wrong.append(f"{left} processes were left running")
        rounds.append(result)
        plans.append(kinds)
        missed = until_struck and not result["struck"]
        misses = misses + 1 if missed else 0
        if misses == MOST_MISSES:
            wrong.append(f"nothing was killed in {misses} rounds")
        if wrong:
            log = (folder / f"{out.name}.log").read_text()[-1500:]
            failures.append({"run": number, "kinds": [*kinds], "wrong": wrong, "log": log})
        else:
            shutil.rmtree(out)
        verdict = wrong or ("nothing was killed: once more" if missed else "ok")
        print(f"{number + 1}/{runs} {result} {verdict}", file=sys.stderr, flush=True)
        if not missed or misses == MOST_MISSES:
            number, misses = number + 1, 0
    planned = Counter(kind for kinds in plans for kind in kinds)
    struck = Counter(kind for result in rounds for kind in result["struck"])
    # A driver may end before its moment, but not each time.
    never = [kind for kind, count in planned.items() if count > 3 and not struck[kind]]
    if never:
        failures.append({"wrong": [f"no {kind} was ever killed" for kind in never]})
    without = sum(not result["struck"] for result in rounds)
    return {
        "runs": len(rounds) - without if until_struck else runs,
        "kills": dict(struck),
        "runs_without_a_kill": without,
        "starts": sum(result["starts"] for result in rounds),
        "failures": failures,
    }


def summary(result: Result) -> str:
    """A result in one line.

    >>> summary({"runs": 3, "kills": {"node": 4}, "runs_without_a_kill": 1, "failures": []})
    '3 runs: 4 kills (4 node), 1 run without a kill, 0 failures'
    """
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(result["kills"].items()))
    without = result["runs_without_a_kill"]
    return (
        f"{result['runs']} runs: {sum(result['kills'].values())} kills ({kinds or 'none'}), "
        f"{without} run{'' if without == 1 else 's'} without a kill, "
        f"{len(result['failures'])} failures"
    )


def undisturbed(driver: Driver, log: Path) -> float:
    """Seconds of a run that nobody disturbs; RuntimeError with its last words where it fails."""
    began = time.monotonic()
    if driver.wait(LIMIT_SECONDS):
        raise RuntimeError(log.read_text()[-2000:])
    return time.monotonic() - began


def command_line(about: str, torture: Callable[..., Result], *, runs: int, **numbers: int) -> int:
    """Torture as told by the command line; 1 if any round differs.

    Args:
        runs: rounds, where it does not say.
        numbers: other options of `torture`, with their defaults.
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    for name, value in {"runs": runs, "seed": 0, **numbers}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--folder", type=Path, help="where to work; kept (default: a temporary)")
    parser.add_argument("--report", type=Path, help="also write the result here")
    options = vars(parser.parse_args())
    kept, report, rounds = (options.pop(name) for name in ("folder", "report", "runs"))
    with tempfile.TemporaryDirectory() as temporary:
        result = torture(rounds, kept or Path(temporary), **options)
    text = json.dumps(result, indent=2)
    print(text)
    print(summary(result), file=sys.stderr)
    if report:
        report.write_text(text + "\n")
    return 1 if result["failures"] else 0
