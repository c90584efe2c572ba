"""Kill curation at random moments, let it go on, and compare what comes out byte for byte.

Each round starts `animator curate` on a Ray cluster of several nodes on this machine, kills the
driver, a worker, a decoder or a whole node with SIGKILL after a random time, perhaps once more
while it goes on, and repeats the command until it succeeds. A round that ended before anything was
killed shows nothing: it is made again, at another moment, and counted apart. Of every round every
shard must be the very bytes of a run that nobody disturbed, every source have exactly one verdict,
and nothing be left behind.

    python tests/integration/curation_kills.py --runs 100 --report kills.json
"""

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import psutil
from killing import (
    Driver,
    Nodes,
    Result,
    command_line,
    kill_tree,
    repeat,
    run_to_the_end,
    undisturbed,
)
from skimage import data

from pipelines.curation.isolation import NAME
from pipelines.video_encode import encode

SIDE, FPS, FRAMES = 256, 10, 20
HEAD = (0.44, 0.22)  # where the portrait's face is
MOMENTS = (0.05, 0.85)  # of the undisturbed run's length; later ones often come after the end
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


def torture(runs: int, folder: Path, *, seed: int = 0, videos: int = 18) -> Result:
    """`runs` rounds with a kill in `folder`; `failures` of the result is empty if all is well."""
    rng = random.Random(seed)
    sources = make_videos(folder / "videos", videos)
    nodes = Nodes(NAME)

    def wait(moment: float, driver: Driver) -> None:
        with suppress(subprocess.TimeoutExpired):
            driver.wait(moment)

    try:
        whole = folder / "whole"
        length = undisturbed(start(sources, whole, nodes.address), folder / "whole.log")
        expected = contents(whole)

        def one(number: int, out: Path) -> tuple[list[str], Result, Iterator[str]]:
            kinds = [KINDS[number % len(KINDS)]]
            if rng.random() < 0.4:
                kinds.append(rng.choice(KINDS))
            result = run_to_the_end(
                [(kind, rng.uniform(*MOMENTS) * length) for kind in kinds],
                nodes,
                begin=lambda: start(sources, out, nodes.address),
                wait=wait,
                strike=lambda kind, driver: strike(kind, driver, nodes, rng),
            )
            return kinds, result, problems(out, expected, videos)

        found = repeat(runs, folder, nodes, one, until_struck=True)
    finally:
        nodes.close()
    return {"sources": videos, "undisturbed_seconds": round(length, 1), **found}


if __name__ == "__main__":
    raise SystemExit(command_line(__doc__, torture, runs=100, videos=18))
