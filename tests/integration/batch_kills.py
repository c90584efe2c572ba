"""Kill a batch at random moments, let it go on, and compare what comes out byte for byte.

Each round starts `animator batch` with a tiny animator on a Ray cluster of several nodes on this
machine, kills the driver, an engine's process or a whole node with SIGKILL at a random moment
between its start and its last item, or one of the first two while an item is being published,
perhaps once more while it goes on, and repeats the command until it ends. Then every item must be
one video with its record, of the very bytes that the engine makes of it undisturbed and alone;
what was published must never have been made again, what cannot be animated be recorded as failed,
and nothing be left behind.

    python tests/integration/batch_kills.py --runs 50 --report kills.json
"""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
from killing import Driver, Nodes, Result, command_line, kill_tree, repeat, run_to_the_end
from PIL import Image
from skimage import data

from inference import outputs
from pipelines.video_encode import encode

KINDS = ("driver", "engine", "node", "publish")
ENGINE = "ray::MapWorker"
BROKEN = "nobody"  # the item that fails
# Of a run, not of its outcome: locks and the summary.
KEPT = {".batch.lock", ".batch.workers", "batch.json"}
# Of a record; the alignment's measures may differ in the last digits between processes.
COMPARED = ("reference", "driving", "video", "sampling", "models", "face", "warnings")
EARLY_SECONDS = 8.0  # before the first item there is time for kills, too

State = dict[str, tuple[int, ...]]


def make_model(folder: Path) -> Path:
    """An animator with random weights, so small that an item takes about a second."""
    import torch

    from animator import config
    from animator.model import Animator
    from animator.weights import save_model

    torch.manual_seed(0)
    sizes = config.AnimatorConfig(
        height=64,
        width=64,
        num_frames=4,
        block_out_channels=(32, 32),
        num_attention_heads=(1, 1),
        cross_attention_dim=32,
        face_encoder_depth=1,
    )
    about = {"sampling": {"steps": 6, "sigma_min": 0.05, "sigma_max": 20.0}}
    save_model(folder, animator=(sizes, Animator(sizes).state_dict()), about=about)
    return folder


def make_inputs(folder: Path, seeds: int) -> Path:
    """A manifest of two people, two clips and `seeds` seeds, and of a picture without a person."""
    folder.mkdir(parents=True)
    portrait = cv2.resize(data.astronaut(), (96, 96), interpolation=cv2.INTER_AREA)
    rng = np.random.default_rng(0)
    body = rng.uniform(0.3, 0.7, (1, 1, 18, 2)).astype(np.float32)
    for name, picture in {"ann": portrait, "eve": np.ascontiguousarray(portrait[:, ::-1])}.items():
        Image.fromarray(picture).save(folder / f"{name}.png")
        _write_pose(folder / f"{name}.pose.npz", body)
    for name, num_frames in {"short": 5, "long": 9}.items():
        moved = np.stack([body[0] + 0.01 * step for step in range(num_frames)])
        frames = [np.roll(portrait, 4 * step, 1) for step in range(num_frames)]
        encode(folder / f"{name}.mp4", frames, fps=8)
        _write_pose(folder / f"{name}.pose.npz", moved)
    Image.new("RGB", (64, 64), "teal").save(folder / "nobody.png")
    rows: list[dict[str, Any]] = [
        {"reference": f"{who}.png", "driving": f"{clip}.mp4", "seed": seed}
        for seed in range(seeds)
        for who in ("ann", "eve")
        for clip in ("short", "long")
    ]
    rows.append({"reference": "nobody.png", "driving": "short.mp4", "id": BROKEN})
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest


def _write_pose(path: Path, points: np.ndarray) -> None:
    np.savez(path, keypoints=points, score=np.ones(points.shape[:-1], np.float32), fps=8)


def make_expected(manifest: Path, model: Path, out: Path) -> dict[str, dict[str, Any]]:
    """Every item that can be made, by one engine that nobody disturbs; their records, by name."""
    import torch

    from inference.batch.manifest import read_manifest
    from inference.engine import AnimationEngine

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        engine = AnimationEngine(model)
        items = [item for item in read_manifest(manifest) if item.id != BROKEN]
        # Not in the batch's own order, which must not matter.
        return {item.output: engine.run(item.request(out / item.output)) for item in items[::-1]}
    finally:
        torch.set_num_threads(threads)


def start(manifest: Path, model: Path, out: Path, nodes: Nodes, engines: int) -> subprocess.Popen:
    """The driver, in a process group of its own."""
    command = [sys.executable, "-m", "infra", "batch", str(manifest), "--model", str(model)]
    command += ["--out", str(out), "--engines", str(engines)]
    environment = os.environ | {"RAY_ADDRESS": nodes.address}
    with (out.parent / f"{out.name}.log").open("ab") as log:
        return subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )


def strike(
    kind: str, driver: subprocess.Popen, nodes: Nodes, out: Path, rng: random.Random
) -> bool:
    """Kill one of `kind`; False where there was none to kill."""
    if kind == "publish":
        if not any((out / ".batch").glob("*.mp4")):
            return False
        kind = rng.choice(("driver", "engine"))
    if kind == "driver":
        if driver.poll() is not None:
            return False
        kill_tree(driver.pid)
        driver.wait()
        return True
    if kind == "node":
        nodes.kill_one(rng)
        return True
    victims = nodes.below(ENGINE)
    if not victims:
        return False
    with suppress(psutil.NoSuchProcess):
        rng.choice(victims).kill()
    return True


def wait_for(moment: float, driver: subprocess.Popen, out: Path) -> None:
    """Until so many items are published and a fraction of a second more, or the driver has ended.

    Args:
        moment: items; below 0, seconds after the start instead.
    """
    if moment < 0:
        with suppress(subprocess.TimeoutExpired):
            driver.wait(-moment)
        return
    while driver.poll() is None and len(list(out.glob("*.mp4"))) < int(moment):
        time.sleep(0.01)
    time.sleep(moment % 1)


def published(out: Path) -> State:
    """The files of every published pair: another number or time means that it was made again."""
    return {
        path.name: tuple(
            number
            for file in (path, path.with_suffix(".json"))
            for number in (file.stat().st_ino, file.stat().st_mtime_ns)
        )
        for path in sorted(out.glob("*.mp4"))
        if outputs.published(path)
    }


def problems(
    out: Path, whole: Path, expected: dict[str, dict[str, Any]], strikes: int
) -> Iterator[str]:
    """Whatever differs from what the engine makes undisturbed, or was left behind."""
    names = {name for video in expected for name in (video, Path(video).stem + ".json")}
    found = {path.name for path in out.iterdir()} - KEPT
    wanted = names | {f"{BROKEN}.error.json"}
    yield from (f"{name} is missing" for name in sorted(wanted - found))
    yield from (f"{name} was left behind" for name in sorted(found - wanted))
    for name in sorted(expected.keys() & found):
        record = outputs.published(out / name)
        if record is None:
            yield f"{name} and its record do not belong together"
            continue
        if (out / name).read_bytes() != (whole / name).read_bytes():
            yield f"{name} differs"
        for key in COMPARED:
            if record.get(key) != expected[name].get(key):
                yield f"{name}: {key} is {record.get(key)}, not {expected[name].get(key)}"
        if not 1 <= record["batch"]["starts"] <= 1 + strikes:
            yield f"{name} was started {record['batch']['starts']} times in one run"


def torture(
    runs: int,
    folder: Path,
    *,
    seed: int = 0,
    seeds: int = 3,
    kinds: Sequence[str] = KINDS,
    strikes: int | None = None,
    engines: int = 2,
) -> Result:
    """`runs` rounds in `folder`; `failures` of the result is empty if all is well.

    Args:
        seeds: of each picture and clip; there are four items for each.
        kinds: what is killed in each round, in turn.
        strikes: kills in each round; by default one, and sometimes two.
        engines: at work at the same time, each on a node of its own.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # sums in another order are other sums
    rng = random.Random(seed)
    model = make_model(folder / "model")
    manifest = make_inputs(folder / "inputs", seeds)
    whole = folder / "whole"
    began = time.monotonic()
    expected = make_expected(manifest, model, whole)
    length = time.monotonic() - began
    nodes = Nodes(ENGINE, workers=engines)

    def one(number: int, out: Path) -> tuple[list[str], Result, list[str]]:
        count = strikes or (2 if rng.random() < 0.4 else 1)
        order = [kinds[(number + each) % len(kinds)] for each in range(count)]
        moments = sorted(rng.uniform(-EARLY_SECONDS, len(expected) - 1) for _ in order)
        seen: State = {}
        again: set[str] = set()

        def note() -> None:
            now = published(out) if out.exists() else {}
            again.update(name for name in seen if now.get(name) != seen[name])
            seen.clear()
            seen.update(now)

        def ended(driver: Driver) -> bool:
            return (outputs.read_json(out / "batch.json") or {}).get("state") == "ended"

        result = run_to_the_end(
            list(zip(order, moments, strict=True)),
            nodes,
            begin=lambda: start(manifest, model, out, nodes, engines),
            wait=lambda moment, driver: wait_for(moment, driver, out),
            strike=lambda kind, driver: strike(kind, driver, nodes, out, rng),
            whole=ended,
            after=note,
            pause=0.001 if "publish" in order else 0.1,
        )
        wrong = [f"{name} was made again" for name in sorted(again)]
        return order, result, [*problems(out, whole, expected, len(order)), *wrong]

    try:
        found = repeat(runs, folder, nodes, one)
    finally:
        nodes.close()
    return {"items": len(expected) + 1, "undisturbed_seconds": round(length, 1), **found}


if __name__ == "__main__":
    raise SystemExit(command_line(__doc__, torture, runs=50, engines=2))
