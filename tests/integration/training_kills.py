"""Kill training at random moments, let it go on, and compare what comes out bit for bit.

Each round starts `animator train animator` with two workers on a Ray cluster of several nodes on
this machine, kills the driver, a worker or a whole node with SIGKILL at a random moment between its
start and its last step, or one of the first two while a checkpoint is being written, perhaps once
more while it goes on, and repeats the command until it succeeds. Then the log of every step and the
released weights must be those of a run that nobody disturbed, to the last bit, and nothing be left
behind.

    python tests/integration/training_kills.py --runs 30 --report kills.json
"""

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from killing import (
    Nodes,
    Result,
    command_line,
    kill_tree,
    repeat,
    run_to_the_end,
    undisturbed,
)

from training.metrics import TIMINGS, read_metrics

KINDS = ("driver", "worker", "node", "save")
WORKER = "RayTrainWorker"
# The whole animator, so small that starting takes longer than a step.
SETTINGS = (
    "task.animator.height=64",
    "task.animator.width=64",
    "task.animator.num_frames=2",
    "task.animator.block_out_channels=32,32",
    "task.animator.num_attention_heads=1,1",
    "task.animator.cross_attention_dim=32",
    "task.animator.face_encoder_depth=1",
    "optim.samples=96",
    "optim.warmup_samples=8",
    "batch.global_batch=4",
    "batch.micro_batch=1",
    "checkpoint.every_samples=16",
    "run.num_workers=2",
    "run.threads_per_worker=1",
    "run.max_failures=20",
    "run.track=false",
)
EARLY_SECONDS = 10.0  # before the first step there is time for kills, too


def make_shards(folder: Path) -> Path:
    """Two small clips."""
    sys.path.append(str(Path(__file__).parents[2]))
    from tests.unit.test_clips import write_shard

    work = folder.with_name("work")
    work.mkdir(parents=True)
    folder.mkdir()
    write_shard(folder, work, 0, {"one_000": 30, "two_000": 24})
    return folder


def start(shards: Path, out: Path, address: str) -> subprocess.Popen[bytes]:
    """The driver, in a process group of its own."""
    command = [sys.executable, "-m", "infra", "train", "animator", "--recipe", "animator_tiny"]
    command += ["--shards", str(shards), "--out", str(out)]
    command += [part for text in SETTINGS for part in ("--set", text)]
    environment = os.environ | {"RAY_ADDRESS": address, "OMP_NUM_THREADS": "1"}
    with (out.parent / f"{out.name}.log").open("ab") as log:
        return subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )


def strike(
    kind: str, driver: subprocess.Popen[bytes], nodes: Nodes, out: Path, rng: random.Random
) -> bool:
    """Kill one of `kind`; False where there was none to kill."""
    if kind == "save":
        if not any((out / "checkpoints").glob(".writing-*")):
            return False
        kind = rng.choice(("driver", "worker"))
    if kind == "driver":
        if driver.poll() is not None:
            return False
        kill_tree(driver.pid)
        driver.wait()
        return True
    victims = nodes.below(WORKER)
    if kind == "node":
        nodes.kill_one(rng)
        return True
    if not victims:
        return False
    with suppress(psutil.NoSuchProcess):
        rng.choice(victims).kill()
    return True


def wait_for(moment: float, driver: subprocess.Popen[bytes], out: Path) -> None:
    """Until so many steps are logged and a fraction of a second more, or the driver has ended.

    Args:
        moment: steps; below 0, seconds after the start instead.
    """
    if moment < 0:
        with suppress(subprocess.TimeoutExpired):
            driver.wait(-moment)
        return
    while driver.poll() is None and len(read_metrics(out / "metrics.jsonl")) < int(moment):
        time.sleep(0.02)
    time.sleep(moment % 1)


def outcome(out: Path) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """What every step computed, and the bytes of the released weights."""
    records = [
        {name: value for name, value in record.items() if name not in TIMINGS}
        for record in read_metrics(out / "metrics.jsonl")
    ]
    weights = {path.name: path.read_bytes() for path in (out / "model").rglob("*.safetensors")}
    return records, weights


def problems(out: Path, expected: tuple[list[dict[str, Any]], dict[str, bytes]]) -> Iterator[str]:
    """Whatever differs from the undisturbed run, or was left behind."""
    records, weights = outcome(out)
    if len(records) != len(expected[0]):
        yield f"{len(records)} steps are logged, not {len(expected[0])}"
    for found, wanted in zip(records, expected[0], strict=False):
        if found != wanted:
            yield f"step {wanted['step']} gave {found}, not {wanted}"
            break
    if weights.keys() != expected[1].keys():
        yield f"released are {sorted(weights)}, not {sorted(expected[1])}"
    for name in weights.keys() & expected[1].keys():
        if weights[name] != expected[1][name]:
            yield f"{name} differs"
    for left in (out / "checkpoints").glob(".*"):
        yield f"{left.name} was left behind"


def torture(runs: int, folder: Path, *, seed: int = 0, kinds: Sequence[str] = KINDS) -> Result:
    """`runs` rounds in `folder`; `failures` of the result is empty if all is well.

    Args:
        kinds: what is killed first in each round, in turn.
    """
    rng = random.Random(seed)
    shards = make_shards(folder / "shards")
    nodes = Nodes(WORKER)
    try:
        whole = folder / "whole"
        length = undisturbed(start(shards, whole, nodes.address), folder / "whole.log")
        expected = outcome(whole)
        if not expected[1]:
            raise RuntimeError("the undisturbed run released no weights to compare")
        last = len(expected[0]) - 1

        def one(number: int, out: Path) -> tuple[list[str], Result, Iterator[str]]:
            strikes = [kinds[number % len(kinds)]]
            if rng.random() < 0.4:
                strikes.append(rng.choice(KINDS))
            moments = sorted(rng.uniform(-EARLY_SECONDS, last) for _ in strikes)
            result = run_to_the_end(
                list(zip(strikes, moments, strict=True)),
                nodes,
                begin=lambda: start(shards, out, nodes.address),
                wait=lambda moment, driver: wait_for(moment, driver, out),
                strike=lambda kind, driver: strike(kind, driver, nodes, out, rng),
                pause=0.002 if "save" in strikes else 0.1,
            )
            return strikes, result, problems(out, expected)

        found = repeat(runs, folder, nodes, one)
    finally:
        nodes.close()
    return {"steps": len(expected[0]), "undisturbed_seconds": round(length, 1), **found}


if __name__ == "__main__":
    raise SystemExit(command_line(__doc__, torture, runs=30))
