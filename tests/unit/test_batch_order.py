"""Batches: the order of work, what is shared, and how much time is left."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from inference.batch.config import BatchConfig, BatchError, read_settings
from inference.batch.manifest import read_manifest
from inference.batch.plan import chunks, make_tasks, measure
from inference.batch.progress import Meter
from inference.batch.task import Task
from pipelines.video import encode

PEOPLE, CLIPS = ("ann", "eve", "zoe"), {"long": 9, "other": 9, "short": 4}


@pytest.fixture
def folder(tmp_path: Path, no_models: Path) -> Path:
    (tmp_path / "model").mkdir()
    about = {"animator": {"height": 64, "width": 64}, "sampling": {"steps": 10}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(about))
    for name in PEOPLE:
        (tmp_path / f"{name}.png").write_bytes(name.encode())
    for shade, (name, count) in enumerate(CLIPS.items()):
        frames = [np.full((32, 32, 3), 40 * shade, np.uint8)] * count
        encode(tmp_path / f"{name}.mp4", frames, fps=8)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    return tmp_path


def config(folder: Path, rows: list[dict], **changes) -> BatchConfig:
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"manifest": path, "out": folder / "out", "model_dir": folder / "model"}
    return BatchConfig(**{**given, **changes})


def plan(batch: BatchConfig) -> list[Task]:
    tasks = make_tasks(read_manifest(batch.manifest), batch, "model", "run")
    return measure(tasks, batch, lambda done, total: None)


def row(reference: str, driving: str, **fields) -> dict:
    return {"reference": f"{reference}.png", "driving": f"{driving}.mp4", **fields}


def test_neighbours_share_shape_then_clip_then_picture(folder: Path) -> None:
    rows = [row(who, clip, seed=s) for s in (0, 1) for clip in CLIPS for who in PEOPLE]
    rows += [row("ann", "short", size="32x32"), row("ann", "broken")]
    tasks = plan(config(folder, rows))
    ordered = [task for chunk in chunks(tasks, engines=1) for task in chunk]
    assert sorted(task.id for task in ordered) == sorted(task.id for task in tasks)
    assert ordered[0].frames == 0  # what fails is known first
    kinds = [(task.shape, task.frames, task.shares[0]) for task in ordered]
    changes = sum(before != after for before, after in pairwise(kinds))
    assert changes == len(CLIPS) + 1  # each clip once; the one of another size apart
    for clip in {task.shares[0] for task in ordered}:
        people = [t.shares[1] for t in ordered if t.shares[0] == clip and not t.shape]
        assert people == sorted(people)
    assert [task.frames for task in ordered if not task.shape][1:] == [9] * 12 + [4] * 6


def test_a_chunk_has_one_clip_and_no_engine_gets_too_much(folder: Path) -> None:
    rows = [row(who, clip, seed=s) for s in range(8) for clip in CLIPS for who in PEOPLE]
    tasks = plan(config(folder, rows))
    for engines, most in ((1, 18), (4, 5), (100, 1)):
        parts = chunks(tasks, engines)
        assert max(map(len, parts)) <= most
        assert all(len({task.shares[0] for task in part}) == 1 for part in parts)
    assert len(chunks(tasks, 1)) <= 2 * len(CLIPS)


def test_work_counts_frames_pixels_and_steps(folder: Path) -> None:
    rows = [row("ann", "long"), row("eve", "long", steps=5), row("zoe", "long", size="128x64")]
    assert [task.work for task in plan(config(folder, rows))] == [9, 4.5, 18]
    fewer = config(folder, rows, changes=("sampling.steps=5",))
    assert [task.work for task in plan(fewer)] == [9, 9, 18]


def task(name: str, work: float, seconds: float = 0.0, status: str = "pending") -> Task:
    request = {"output": f"/out/{name}.mp4"}
    return Task(id=name, identity="", request=request, work=work, seconds=seconds, status=status)


def test_time_left_is_right_from_the_first_item_though_clips_differ() -> None:
    now = [100.0]
    pending = [task("long", 300), task("a", 30), task("b", 30), task("c", 30)]
    meter = Meter(pending, 5, engines=1, now=lambda: now[0])
    assert meter.left_seconds() is None
    assert meter.standing().stage == "open"
    now[0] += 40 + 60  # 40 s to open the engine
    meter.add(task("long", 300, 60, "done"))
    # By the number of items it would be 180 s, with those done before counted even less.
    assert meter.left_seconds() == pytest.approx(18)
    assert meter.items_per_hour == pytest.approx(60)
    now[0] += 4
    assert meter.left_seconds() == pytest.approx(14)
    now[0] += 2
    meter.add(task("a", 30, 6, "failed"))
    assert meter.left_seconds() == pytest.approx(12)  # a failure says nothing of the speed
    assert meter.standing().done == 7


def test_time_left_is_known_at_once_where_a_former_run_made_items() -> None:
    pending = [task(name, 100) for name in "abcd"]
    meter = Meter(pending, 2, engines=2, earlier=(50.0, 25.0), now=lambda: 0.0)
    assert meter.left_seconds() == pytest.approx(4 * 100 * 0.5 / 2)


def test_settings_that_decide_outputs_are_told_apart(folder: Path) -> None:
    rows = [row("ann", "short")]
    changes = [
        {},
        {"dtype": "bf16"},
        {"changes": ("sampling.churn=40",)},
        {"align": False},
        {"size": (64, 96)},
        {"framing": "crop"},
        {"alignment": "closed-form"},
        {"face": "cascade"},
    ]
    found = [json.dumps(read_settings(config(folder, rows, **each))) for each in changes]
    assert len(set(found)) == len(changes)
    pairs = ("a=1", "b=2"), ("b=2", "a=1")
    one, other = (read_settings(config(folder, rows, changes=each)) for each in pairs)
    assert one == other
    with pytest.raises(BatchError, match="framing is 'stretch', expected pad or crop"):
        config(folder, rows, framing="stretch")
