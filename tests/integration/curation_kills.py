"""Kill curation at random moments, let it go on, and compare what comes out byte for byte.

Each round starts `animator curate` on a Ray cluster of several nodes on this machine, kills the
driver, a worker, a decoder or a whole node with SIGKILL after a random time, perhaps once more
while it goes on, and repeats the command until it succeeds. Then every shard must be the very bytes
of a run that nobody disturbed, every source have exactly one verdict, and nothing be left behind.

    python tests/integration/curation_kills.py --runs 100 --report kills.json
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
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
from killing import Nodes, kill_tree, orphans
from skimage import data

from pipelines.curation.isolation import NAME
from pipelines.video_encode import encode

SIDE, FPS, FRAMES = 256, 10, 20
HEAD = (0.44, 0.22)  # where the portrait's face is
KINDS = ("driver", "worker", "decoder", "node")
SETTINGS = (
    "faces.backend=cascade",
    "pose.backend=file",
    "output.sources_per_shard=2",
    "output.preset=ultrafast",
    "samples.fps=4",
    "samples.side=256",
)
# Of a run, not of its outcome: when things happened, and what a next start may read quicker.
UNEQUAL = {".lock", "timings.jsonl", "commits.jsonl", "report.html"}
LIMIT_SECONDS = 300.0
MOST_RESUMES = 10


def make_videos(folder: Path, count: int) -> Path:
    """Sources of every fate: kept, rejected for several reasons, copies, damaged."""
    folder.mkdir(parents=True)
    portrait = cv2.resize(data.astronaut(), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    noise = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    pattern = cv2.resize(noise, (SIDE, SIDE), interpolation=cv2.INTER_NEAREST)
    for number in range(count):
        path = folder / f"{number:03d}.mp4"
        kind = number % 6
        turned = cv2.flip(portrait, 1) if number % 4 == 0 else portrait
        shade = (number * 7) % 60
        if kind == 4 and number > 6:
            shutil.copy(folder / f"{number - 4:03d}.mp4", path)
            continue
        if kind == 5:
            path.write_bytes(b"no video at all" * (number + 1))
            continue
        frames = []
        for step in range(FRAMES):
            moved = np.roll(turned, -6 * step, 1) if kind == 2 else turned
            picture = pattern if kind == 3 else moved
            frames.append(np.clip(picture.astype(int) + shade + step, 0, 255).astype(np.uint8))
        encode(path, frames, fps=FPS)
        score = np.full((FRAMES, 1, 18), 0.9, np.float32)
        points = np.broadcast_to(np.array(HEAD, np.float32), (FRAMES, 1, 18, 2))
        np.savez(path.with_suffix(".pose.npz"), keypoints=points, score=score, fps=FPS)
    return folder


def start(videos: Path, out: Path, address: str) -> subprocess.Popen[bytes]:
    """The driver, in a process group of its own."""
    command = [sys.executable, "-m", "infra", "curate", str(videos), "--out", str(out)]
    command += ["--workers", "2", *(part for text in SETTINGS for part in ("--set", text))]
    environment = os.environ | {"RAY_ADDRESS": address, "OMP_NUM_THREADS": "1"}
    with (out.parent / f"{out.name}.log").open("ab") as log:
        return subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )


def strike(kind: str, driver: subprocess.Popen[bytes], nodes: Nodes, rng: random.Random) -> bool:
    """Kill one of `kind`; False where there was none to kill."""
    if kind == "driver":
        if driver.poll() is not None:
            return False
        kill_tree(driver.pid)
        driver.wait()
        return True
    if kind == "node":
        nodes.kill_one(rng)
        return True
    victims = nodes.below(NAME if kind == "decoder" else "ray::MapWorker")
    if not victims:
        return False
    with suppress(psutil.NoSuchProcess):
        rng.choice(victims).kill()
    return True


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a finished run that its sources and settings alone decide."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in UNEQUAL
    }


def problems(out: Path, expected: dict[str, bytes], num_sources: int) -> Iterator[str]:
    """Whatever differs from the undisturbed run, was judged twice or not, or was left behind."""
    found = contents(out)
    yield from (f"{name} is missing" for name in sorted(expected.keys() - found.keys()))
    yield from (f"{name} was left behind" for name in sorted(found.keys() - expected.keys()))
    for name in sorted(found.keys() & expected.keys()):
        if found[name] != expected[name]:
            yield f"{name} differs"
    verdicts = Counter(
        source["id"]
        for path in out.glob("shard-*.json")
        for source in json.loads(path.read_bytes())["sources"]
    )
    if len(verdicts) != num_sources or set(verdicts.values()) != {1}:
        yield f"{num_sources} sources have {sum(verdicts.values())} verdicts ({len(verdicts)} ids)"


def run_to_the_end(
    kinds: list[str],
    moments: list[float],
    videos: Path,
    out: Path,
    nodes: Nodes,
    rng: random.Random,
) -> dict[str, Any]:
    """One round: start, strike at each moment (seconds), start again until it succeeds."""
    struck, starts = [], 0
    driver = None
    began = time.monotonic()
    plan = list(zip(kinds, moments, strict=True))
    while True:
        if driver is None:
            driver, starts = start(videos, out, nodes.address), starts + 1
        if plan:
            kind, moment = plan.pop(0)
            with suppress(subprocess.TimeoutExpired):
                driver.wait(moment)
            while driver.poll() is None:
                if strike(kind, driver, nodes, rng):
                    struck.append(kind)
                    break
                time.sleep(0.1)  # none of that kind yet
        else:
            try:
                driver.wait(LIMIT_SECONDS)
            except subprocess.TimeoutExpired:
                kill_tree(driver.pid)
                return {"struck": struck, "starts": starts, "hung": True}
        nodes.mend()
        code = driver.poll()
        if code == 0 and not plan:
            return {
                "struck": struck,
                "starts": starts,
                "seconds": round(time.monotonic() - began, 1),
            }
        if code is not None:
            driver = None
        if starts > MOST_RESUMES:
            return {"struck": struck, "starts": starts, "gave_up": True}


def torture(runs: int, folder: Path, *, seed: int = 0, videos: int = 18) -> dict[str, Any]:
    """`runs` rounds in `folder`; `failures` of the result is empty if all is well."""
    rng = random.Random(seed)
    sources = make_videos(folder / "videos", videos)
    nodes = Nodes(NAME)
    failures, rounds = [], []
    try:
        whole = folder / "whole"
        began = time.monotonic()
        code = start(sources, whole, nodes.address).wait(LIMIT_SECONDS)
        length = time.monotonic() - began
        if code:
            raise RuntimeError((folder / "whole.log").read_text()[-2000:])
        expected = contents(whole)
        for number in range(runs):
            out = folder / f"run-{number:03d}"
            kinds = [KINDS[number % len(KINDS)]]
            if rng.random() < 0.4:
                kinds.append(rng.choice(KINDS))
            moments = [rng.uniform(0.05, 1.0) * length for _ in kinds]
            result = run_to_the_end(kinds, moments, sources, out, nodes, rng)
            wrong = list(problems(out, expected, videos))
            wrong += [key for key in ("hung", "gave_up") if result.get(key)]
            if left := orphans(nodes):
                wrong.append(f"{left} decoders were left running")
            rounds.append(result)
            if wrong:
                log = (folder / f"{out.name}.log").read_text()[-1500:]
                failures.append({"run": number, "kinds": kinds, "wrong": wrong, "log": log})
            else:
                shutil.rmtree(out)
            print(f"{number + 1}/{runs} {result} {wrong or 'ok'}", file=sys.stderr, flush=True)
    finally:
        nodes.close()
    return {
        "runs": runs,
        "sources": videos,
        "undisturbed_seconds": round(length, 1),
        "kills": dict(Counter(kind for result in rounds for kind in result["struck"])),
        "starts": sum(result["starts"] for result in rounds),
        "failures": failures,
    }


def main() -> int:
    """Run from the command line; 1 if any run differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--videos", type=int, default=18)
    parser.add_argument("--folder", type=Path, help="where to work; kept (default: a temporary)")
    parser.add_argument("--report", type=Path, help="also write the result here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        result = torture(options.runs, folder, seed=options.seed, videos=options.videos)
    text = json.dumps(result, indent=2)
    print(text)
    if options.report:
        options.report.write_text(text + "\n")
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
