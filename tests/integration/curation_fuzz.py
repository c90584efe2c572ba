"""Curate thousands of damaged files: each must end in a verdict, in bounded time and memory.

Files are made from small seeds in every container by flipping bytes, cutting, doubling, joining
and writing over parts; the seeds themselves are tried as they are, too. The run is watched from
outside: time, memory of all its processes, and every file that appears around its folder, among
them those that it writes into its working folder and its home.

    python tests/integration/curation_fuzz.py --inputs 2000 --seeds videos/ --report fuzz.json
"""

import argparse
import json
import os
import random
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
from killing import kill_tree
from skimage import data

from pipelines.curation.sources import VIDEO_SUFFIXES
from pipelines.curation.timings import iter_timings
from pipelines.video_encode import encode

ROOT = Path(__file__).resolve().parents[2]
MAX_DAMAGED_BYTES = 3 << 20  # of a seed; larger ones are only tried whole
MAX_MEMORY_BYTES = 6e9  # over all processes; what they share counts for each
TIMEOUT_SECONDS = 30.0
GRACE_SECONDS = 10.0  # to stop a decoder and begin another
SOURCES_PER_SHARD = 8
# The longest that no shard may be committed for: the start, then one of nothing but the slowest.
STALLED_SECONDS = 120.0 + SOURCES_PER_SHARD * (TIMEOUT_SECONDS + GRACE_SECONDS)
SETTINGS = (
    "faces.backend=cascade",
    "pose.backend=auto",
    "output.preset=ultrafast",
    f"output.sources_per_shard={SOURCES_PER_SHARD}",
    "samples.fps=2",
    "samples.side=192",
    f"video.timeout_seconds={TIMEOUT_SECONDS}",
    "video.seconds_per_video_second=0",
    "video.max_pixels=10000000",
    "video.max_seconds=120",
    "video.max_memory=3000000000",
)


def own_seed(path: Path) -> Path:
    """A short clip of a public-domain portrait that moves a little."""
    portrait = cv2.resize(data.astronaut(), (240, 240), interpolation=cv2.INTER_AREA)
    frames = [np.ascontiguousarray(np.roll(portrait, step, 1)) for step in range(12)]
    encode(path, frames, fps=8)
    return path


def damage(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """`content` with one to three kinds of damage, most often such that it still opens."""
    found = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not found:
            break
        size = len(found)
        place, length = rng.randrange(size), rng.randint(1, max(1, min(4096, size // 8)))
        kind = rng.choice((0, 0, 0, 1, 2, 3, 4, 4, 5, 5, 6, 7))
        if kind == 0:
            for _ in range(rng.randint(1, 64)):
                found[rng.randrange(size)] ^= 1 << rng.randrange(8)
        elif kind == 1:  # where containers keep their sizes and tables
            for _ in range(rng.randint(1, 16)):
                found[rng.randrange(min(size, 4096))] = rng.randrange(256)
        elif kind == 2:
            del found[place:]
        elif kind == 3:
            del found[:place]
        elif kind == 4:
            found[place : place + length] = rng.randbytes(length)
        elif kind == 5:
            found[place : place + length] = bytes(length)
        elif kind == 6:
            found[place:place] = found[max(0, place - length) : place]
        else:
            found[place:] = other[rng.randrange(max(1, len(other))) :]
    return bytes(found)


def make_inputs(folder: Path, seeds: list[Path], count: int, rng: random.Random) -> int:
    """`count` damaged files of the smaller seeds beside all seeds whole; names are hostile too.

    Returns how many in all.
    """
    folder.mkdir(parents=True)
    # By other names a folder's listing would pass them over.
    whole = [
        (path.suffix if path.suffix in VIDEO_SUFFIXES else ".mp4", path.read_bytes())
        for path in seeds
    ]
    small = [one for one in whole if 0 < len(one[1]) <= MAX_DAMAGED_BYTES]
    names = ["a..b", "a b", "ü", "'; rm -rf x", "%s%n", "-rf", "$(id)", "x" * 120]
    for number in range(count):
        suffix, content = rng.choice(small)
        _, other = rng.choice(small)
        name = f"{rng.choice(names)}{number:05d}{suffix}"
        if rng.random() < 0.1:  # one kind of file under the name of another
            name = f"{number:05d}.{rng.choice(['avi', 'webm', 'gif', 'ts', 'mp4'])}"
        (folder / name).write_bytes(damage(content, other, rng))
    for number, (suffix, content) in enumerate(whole):
        (folder / f"whole-{number:03d}{suffix}").write_bytes(content)
    return count + len(whole)


def _memory(pid: int) -> int:
    total = 0
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                total += one.memory_info().rss
    return total


def _outside(folder: Path, out: Path, inputs: Path) -> set[str]:
    """Files around the output that are neither the inputs nor in it."""
    found = set()
    for root, _, files in os.walk(folder):
        path = Path(root)
        if not path.is_relative_to(out) and not path.is_relative_to(inputs):
            found |= {str(path / name) for name in files}
    return found


def _slowest(out: Path) -> float:
    """Seconds of the source that took longest, of those that were read to their end."""
    return max((sum(seconds.values()) for _, seconds in iter_timings(out)), default=0.0)


def _stalled(out: Path, began: float) -> bool:
    """Whether no shard was committed for too long; `began` is of the clock that files have."""
    newest = max((path.stat().st_mtime for path in out.glob("shard-*.json")), default=began)
    return time.time() - max(newest, began) > STALLED_SECONDS


def excesses(slowest: float, peak: float, *, stalled: bool = False) -> Iterator[str]:
    """What went over a bound: seconds of one source, bytes of all processes, or a run at rest."""
    if slowest > TIMEOUT_SECONDS + GRACE_SECONDS:
        yield f"a file took {slowest:.1f} s, and may take {TIMEOUT_SECONDS:g} s"
    if peak > MAX_MEMORY_BYTES:
        yield f"{peak / 1e9:.2f} GB were used, {MAX_MEMORY_BYTES / 1e9:g} GB are the bound"
    if stalled:
        yield f"no shard was committed for {STALLED_SECONDS:g} s"


def fuzz(
    count: int, folder: Path, seeds: list[Path], *, seed: int = 0, workers: int = 2
) -> dict[str, Any]:
    """Curate `count` damaged files in `folder`; all is well where `failures` is empty."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    home, work = folder / "home", folder / "cwd"
    for each in (home, work):
        each.mkdir()
    inputs, out = folder / "inputs", folder / "out"
    total = make_inputs(inputs, [*seeds, own_seed(folder / "seed.mp4")], count, rng)
    # The token of a cluster is Ray's own, made where the home has none.
    known = {str(folder / "log.txt"), str(home / ".ray" / "auth_token")}
    before = _outside(folder, out, inputs) | known
    command = [sys.executable, "-m", "infra", "curate", str(inputs), "--out", str(out)]
    command += ["--workers", str(workers)]
    command += [part for text in SETTINGS for part in ("--set", text)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HOME": str(home)}
    began, started, peak, curve = time.monotonic(), time.time(), 0, []
    stalled = False
    with (folder / "log.txt").open("wb") as log:
        run = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            # Without models: what is tried is what reads the files.
            env=environment | {"ANIMATOR_MODELS": ""},
            cwd=work,
        )
        while run.poll() is None:
            used = _memory(run.pid)
            peak = max(peak, used)
            curve.append(used)
            if not stalled and _stalled(out, started):
                stalled = True
                kill_tree(run.pid)
            time.sleep(0.5)
    seconds = time.monotonic() - began
    slowest = _slowest(out)
    failures = [*excesses(slowest, peak, stalled=stalled)]
    if run.returncode:
        failures.append(f"exit code {run.returncode}: {(folder / 'log.txt').read_text()[-1500:]}")
    sources = [
        source
        for path in sorted(out.glob("shard-*.json"))
        for source in json.loads(path.read_bytes())["sources"]
    ]
    ids = Counter(source["id"] for source in sources)
    if len(ids) != total or set(ids.values()) != {1}:
        failures.append(f"{total} inputs have {sum(ids.values())} verdicts of {len(ids)} ids")
    silent = [s["id"] for s in sources if s["verdict"] == "failed" and not s["error"]]
    if silent:
        failures.append(f"{len(silent)} failures say nothing, the first is {silent[0]}")
    escaped = _outside(folder, out, inputs) - before
    if escaped:
        failures.append(f"files outside the output folder: {sorted(escaped)[:5]}")
    left = [str(p) for p in (out / ".work", out / ".downloads") if p.exists() and any(p.rglob("*"))]
    failures += [f"{path} was left behind" for path in left]
    half = len(curve) // 2
    return {
        "inputs": total,
        "seconds": round(seconds, 1),
        "inputs_per_second": round(total / seconds, 2),
        "slowest_seconds": round(slowest, 1),
        "peak_gb": round(peak / 1e9, 2),
        "peak_gb_first_half": round(max(curve[:half], default=0) / 1e9, 2),
        "peak_gb_second_half": round(max(curve[half:], default=0) / 1e9, 2),
        "verdicts": dict(Counter(source["verdict"] for source in sources)),
        "reasons": dict(Counter(r for source in sources for r in source["reasons"])),
        "errors": dict(Counter(_kind(source["error"]) for source in sources).most_common(12)),
        "failures": failures,
    }


def _kind(error: str | None) -> str:
    """An error without the numbers that are of one file only."""
    text = "".join("#" if letter.isdigit() else letter for letter in error or "none")
    return text[:80]


def main() -> int:
    """Run from the command line; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seeds", type=Path, action="append", default=[], help="folder of seeds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; kept (default: a temporary)")
    parser.add_argument("--report", type=Path, help="also write the result here")
    options = parser.parse_args()
    seeds = [path for folder in options.seeds for path in sorted(folder.iterdir())]
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary) / "fuzz").absolute()
        result = fuzz(
            options.inputs, folder, [p.resolve() for p in seeds if p.is_file()], seed=options.seed
        )
    text = json.dumps(result, indent=2)
    print(text)
    if options.report:
        options.report.write_text(text + "\n")
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
