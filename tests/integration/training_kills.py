"""Kill training at random moments, let it go on, and compare what comes out bit for bit.

Each round starts `animator train animator` with two workers on a Ray cluster of several nodes on
this machine, kills the driver, a worker or a whole node with SIGKILL at a random moment between its
start and its last step, or one of the first two while a checkpoint is being written, perhaps once
more while it goes on, and repeats the command until it succeeds. Then the log of every step and the
released weights must be those of a run that nobody disturbed, to the last bit, and nothing be left
behind.

    python tests/integration/training_kills.py --runs 30 --report kills.json
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from killing import Nodes, kill_tree, orphans

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
LIMIT_SECONDS = 300.0
MOST_RESUMES = 10


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


def run_to_the_end(
    kinds: list[str],
    moments: list[float],
    shards: Path,
    out: Path,
    nodes: Nodes,
    rng: random.Random,
) -> dict[str, Any]:
    """One round: start, strike at each moment, start again until it succeeds."""
    struck, starts = [], 0
    driver = None
    began = time.monotonic()
    plan = list(zip(kinds, moments, strict=True))
    while True:
        if driver is None:
            driver, starts = start(shards, out, nodes.address), starts + 1
        if plan:
            kind, moment = plan.pop(0)
            wait_for(moment, driver, out)
            while driver.poll() is None:
                if strike(kind, driver, nodes, out, rng):
                    struck.append(kind)
                    break
                time.sleep(0.002 if kind == "save" else 0.1)  # none of that kind yet
        else:
            try:
                driver.wait(LIMIT_SECONDS)
            except subprocess.TimeoutExpired:
                kill_tree(driver.pid)
                return {"struck": struck, "starts": starts, "hung": True}
        nodes.mend()
        code = driver.poll()
        if code == 0 and not plan:
            seconds = round(time.monotonic() - began, 1)
            return {"struck": struck, "starts": starts, "seconds": seconds}
        if code is not None:
            driver = None
        if starts > MOST_RESUMES:
            return {"struck": struck, "starts": starts, "gave_up": True}


def torture(
    runs: int, folder: Path, *, seed: int = 0, kinds: Sequence[str] = KINDS
) -> dict[str, Any]:
    """`runs` rounds in `folder`; `failures` of the result is empty if all is well.

    Args:
        kinds: what is killed first in each round, in turn.
    """
    rng = random.Random(seed)
    shards = make_shards(folder / "shards")
    nodes = Nodes(WORKER)
    failures, rounds = [], []
    try:
        whole = folder / "whole"
        began = time.monotonic()
        code = start(shards, whole, nodes.address).wait(LIMIT_SECONDS)
        length = time.monotonic() - began
        if code:
            raise RuntimeError((folder / "whole.log").read_text()[-2000:])
        expected = outcome(whole)
        for number in range(runs):
            out = folder / f"run-{number:03d}"
            strikes = [kinds[number % len(kinds)]]
            if rng.random() < 0.4:
                strikes.append(rng.choice(KINDS))
            last = len(expected[0]) - 1
            moments = sorted(rng.uniform(-EARLY_SECONDS, last) for _ in strikes)
            result = run_to_the_end(strikes, moments, shards, out, nodes, rng)
            wrong = list(problems(out, expected))
            wrong += [key for key in ("hung", "gave_up") if result.get(key)]
            if left := orphans(nodes):
                wrong.append(f"{left} workers were left running")
            rounds.append(result)
            if wrong:
                log = (folder / f"{out.name}.log").read_text()[-1500:]
                failures.append({"run": number, "kinds": strikes, "wrong": wrong, "log": log})
            else:
                shutil.rmtree(out)
            print(f"{number + 1}/{runs} {result} {wrong or 'ok'}", file=sys.stderr, flush=True)
    finally:
        nodes.close()
    return {
        "runs": runs,
        "steps": len(expected[0]),
        "undisturbed_seconds": round(length, 1),
        "kills": dict(Counter(kind for result in rounds for kind in result["struck"])),
        "starts": sum(result["starts"] for result in rounds),
        "failures": failures,
    }


def main() -> int:
    """Run from the command line; 1 if any run differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; kept (default: a temporary)")
    parser.add_argument("--report", type=Path, help="also write the result here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        result = torture(options.runs, folder, seed=options.seed)
    text = json.dumps(result, indent=2)
    print(text)
    if options.report:
        options.report.write_text(text + "\n")
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
