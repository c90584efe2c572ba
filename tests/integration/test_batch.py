"""A batch on real Ray Data: failures stay their own, and a kill loses and repeats nothing."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from inference import outputs
from inference.batch.config import found_networks
from inference.batch.manifest import read_manifest
from inference.batch.plan import make_tasks
from inference.batch.run import BatchConfig, BatchError, animate_batch
from inference.batch.task import sweep
from inference.batch.worker import EngineActor
from inference.outputs import FolderInUseError, FolderLock
from inference.requests import RequestError
from pipelines.ray_sizes import RunError
from pipelines.video import encode, probe

HERE = Path(__file__).parent
FACTORY = "stand_in_engine:StandInEngine"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    Image.new("RGB", (48, 64), "teal").save(tmp_path / "person.png")
    encode(tmp_path / "dance.mp4", [np.full((32, 32, 3), 90, np.uint8)] * 6, fps=8)
    return tmp_path


def manifest(folder: Path, *seeds: int) -> BatchConfig:
    lines = [
        {"reference": "person.png", "driving": "dance.mp4", "seed": seed, "id": f"item-{seed}"}
        for seed in seeds
    ]
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return BatchConfig(
        manifest=path,
        out=folder / "out",
        model_dir=folder / "model",
        engine_factory=FACTORY,
        engines=1,
        cpus_per_engine=1,
    )


def have_packs(home: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let this process find these face packs and no other networks."""
    for name in names:
        pack = home / "models" / "face" / name
        pack.mkdir(parents=True)
        for network in ("detection.onnx", "recognition.onnx"):
            (pack / network).touch()
    monkeypatch.setenv("ANIMATOR_MODELS", str(home / "models"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One Ray for the tests that run in this process."""
    import ray

    path = os.pathsep.join([str(HERE), *sys.path])
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=200 << 20,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_failures_are_recorded_stop_nothing_and_are_tried_again(folder: Path) -> None:
    config = manifest(folder, 1, 401, 500, 666, 888, 2)
    summary = animate_batch(config, show_progress=False)
    assert (summary["done"], summary["skipped"], summary["failed"]) == (3, 0, 3)
    assert summary == outputs.read_json(config.out / "batch.json")
    errors = {item["id"]: item["error"] for item in summary["items"] if "error" in item}
    assert errors["item-401"].endswith("no person found; choose a clearer picture")
    assert errors["item-500"].startswith("RuntimeError: out of memory")
    assert errors["item-666"].endswith("process died 3 times on this item")
    for seed in (401, 500, 666):
        record = outputs.read_json(config.out / f"item-{seed}.error.json")
        assert record is not None
        assert record["error"] == errors[f"item-{seed}"]
    assert probe(config.out / "item-1.mp4").num_frames == 4
    # A process that lost its device is another's business, not the item's.
    starts = (outputs.read_json(config.out / "item-888.json") or {})["batch"]["starts"]
    assert starts == 2

    # The picture is changed, so that everything is another item now; one error is mended.
    (config.out / "item-2.mp4").write_bytes(b"a damaged video")
    summary = animate_batch(manifest(folder, 1, 401, 2), show_progress=False)
    status = {item["id"]: item["status"] for item in summary["items"]}
    assert status == {"item-1": "skipped", "item-401": "failed", "item-2": "done"}

    Image.new("RGB", (48, 64), "red").save(folder / "person.png")
    summary = animate_batch(manifest(folder, 1), show_progress=False)
    assert (summary["done"], summary["skipped"]) == (1, 0)


@pytest.mark.usefixtures("cluster")
def test_what_cannot_run_is_said_at_once(folder: Path) -> None:
    config = manifest(folder, 1)
    greedy = BatchConfig(**{**vars(config), "engines": 1, "cpus_per_engine": 3})
    with pytest.raises(RunError, match=r"1 workers need 3 CPUs each.*fewer --engines or --cpus"):
        animate_batch(greedy, show_progress=False)
    (folder / "model" / "config.json").rename(folder / "model" / "other.json")
    with pytest.raises(BatchError, match=r"no config\.json; give a model folder"):
        animate_batch(config, show_progress=False)


@pytest.mark.usefixtures("cluster")
def test_a_worker_that_finds_other_networks_than_the_driver_makes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = manifest(folder, 1)
    # The driver alone: the cluster's processes have the environment they were begun with.
    have_packs(folder / "driver", monkeypatch, "anothers")
    host = socket.gethostname()
    said = (
        rf"worker on {host} would see by .*; poses: .* started with faces: anothers; poses: .* "
        r"same ANIMATOR_MODELS and the same models in the cache folder \(.*animator models list"
    )
    with pytest.raises(BatchError, match=said):
        animate_batch(config, show_progress=False)
    assert not list(config.out.glob("item-*"))
    monkeypatch.undo()
    assert animate_batch(config, show_progress=False)["done"] == 1


@pytest.mark.usefixtures("cluster")
def test_settings_reach_the_engine_and_another_setting_makes_all_anew(folder: Path) -> None:
    config = manifest(folder, 1, 2)
    with config.manifest.open("a") as stream:
        own = {"size": "64x96", "framing": "crop", "id": "own"}
        stream.write(json.dumps({"reference": "person.png", "driving": "dance.mp4", **own}))
    said: list[str] = []
    given = {"dtype": "bf16", "changes": ("sampling.churn=40",), "size": (32, 32), "align": False}
    config = BatchConfig(**{**vars(config), **given})
    summary = animate_batch(config, show_progress=False, say=said.append)
    assert (summary["done"], summary["changed"], said) == (3, [], [])
    asked = {
        name: (outputs.read_json(config.out / f"{name}.json") or {})["asked"]
        for name in ("item-1", "own")
    }
    for each in asked.values():
        assert (each["dtype"], each["changes"]) == ("bf16", ["sampling.churn=40"])
        assert each["align"] is False
    assert asked["item-1"]["size"] == [32, 32]
    assert "framing" not in asked["item-1"]
    assert (asked["own"]["size"], asked["own"]["framing"]) == ([64, 96], "crop")

    (folder / "model" / "config.json").write_text('{"another": "model"}')
    again = BatchConfig(**{**vars(config), "changes": ("sampling.churn=20",)})
    summary = animate_batch(again, show_progress=False, say=said.append)
    assert (summary["done"], summary["skipped"]) == (3, 0)
    [remark] = said
    assert remark.startswith("3 finished item(s) are made anew, as something changed: ")
    assert "changes.sampling.churn: '40' → '20'; model: '" in remark
    assert len(summary["changed"]) == 2
    assert animate_batch(again, show_progress=False)["skipped"] == 3


@pytest.mark.usefixtures("cluster")
def test_two_runs_in_one_folder_refuse_each_other(folder: Path) -> None:
    config = manifest(folder, 1)
    other = FolderLock(config.out, ".batch.lock", "animator batch")
    with pytest.raises(FolderInUseError, match="another animator batch"):
        animate_batch(config, show_progress=False)
    other.close()
    assert animate_batch(config, show_progress=False)["done"] == 1


def test_what_is_computed_of_a_long_item_is_kept_for_the_next_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(HERE)
    config = manifest(folder, 1, 500)
    short, long = make_tasks(read_manifest(config.manifest), config, "model", "run")
    sweep(config.out, [])
    long = replace(long, frames=100, request={**long.request, "seed": 2})
    worker = EngineActor(config, found_networks(config))
    records = [worker.run(task).final.with_suffix(".json") for task in (short, long)]
    worker.lock.close()
    asked = [(outputs.read_json(path) or {})["asked"] for path in records]
    assert "work" not in asked[0]
    assert asked[1]["work"] == str(long.states)
    for path in (long.states, short.states):
        path.mkdir()
        (path / "latents").touch()
    (long.starts_file.parent / "half.mp4").touch()
    (config.out / ".item-2.json.77.tmp").touch()
    sweep(config.out, [long])
    assert [path.name for path in long.starts_file.parent.iterdir()] == [long.states.name]
    assert not list(config.out.glob(".*.tmp"))


@pytest.mark.parametrize(
    ("face", "learned", "driver", "worker", "refused"),
    [
        ("auto", "", ["buffalo_l"], ["buffalo_l", "buffalo_s", "others"], False),
        ("auto", "", ["buffalo_l"], ["antelopev2", "buffalo_l"], True),
        ("auto", "buffalo_l", ["buffalo_l"], ["antelopev2", "buffalo_l"], False),
        ("auto", "buffalo_l", ["antelopev2", "buffalo_l"], ["antelopev2"], True),
        ("insightface", "", ["buffalo_l"], ["buffalo_s"], True),
        ("insightface:buffalo_s", "", ["buffalo_l", "buffalo_s"], ["buffalo_s"], False),
        ("insightface:buffalo_s", "", ["buffalo_l", "buffalo_s"], ["buffalo_l"], True),
        ("cascade", "", ["buffalo_l"], [], False),
    ],
)
def test_a_worker_may_have_networks_that_it_does_not_see_by(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    face: str,
    learned: str,
    driver: list[str],
    worker: list[str],
    refused: bool,
) -> None:
    monkeypatch.syspath_prepend(HERE)
    animator = {"face_embedding": "insightface" if learned else "thumbnail", "face_model": learned}
    (folder / "model" / "config.json").write_text(json.dumps({"animator": animator}))
    config = replace(manifest(folder, 1), face=face)
    have_packs(folder / "driver", monkeypatch, *driver)
    networks = found_networks(config)
    assert networks["faces"] == driver, "what finished items are known by"
    have_packs(folder / "worker", monkeypatch, *worker)
    actor = EngineActor(config, networks)
    actor.lock.close()
    status, error = actor.refusal
    assert (status, actor.engine is None) == (("refused", True) if refused else ("", False))
    assert str(folder / "worker" / "cache") in error or not refused


def test_nothing_starts_on_a_malformed_manifest(folder: Path) -> None:
    config = manifest(folder, 1, 2)
    with config.manifest.open("a") as stream:
        stream.write('{"reference": "person.png"}\n')
    with pytest.raises(RequestError, match="line 3: 'driving' is missing"):
        animate_batch(config)
    assert not config.out.exists()


def test_outputs_never_overwrite_inputs(folder: Path) -> None:
    config = manifest(folder, 1)
    line = {"reference": "person.png", "driving": "dance.mp4", "output": "dance.mp4"}
    config.manifest.write_text(json.dumps(line))
    with pytest.raises(BatchError, match=r"line 1: 'dance\.mp4' would be written over an input"):
        animate_batch(BatchConfig(**{**vars(config), "out": folder}))


def test_a_killed_batch_loses_and_repeats_nothing(folder: Path) -> None:
    config = manifest(folder, *range(8))
    log = folder / "log"
    env = {**os.environ, "STAND_IN_LOG": str(log), "STAND_IN_SECONDS": "0.08"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE), *sys.path])
    script = (
        "from pathlib import Path; from inference.batch.run import BatchConfig, animate_batch\n"
        f"animate_batch(BatchConfig(manifest=Path({str(config.manifest)!r}),"
        f" out=Path({str(config.out)!r}), model_dir=Path({str(config.model_dir)!r}),"
        f" engine_factory={FACTORY!r}))\n"
    )
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while not (config.out / "item-2.json").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {p.name for p in config.out.glob("item-*.mp4") if outputs.published(p)}
    assert 1 <= len(finished) < 8

    subprocess.run(command, env=env, stderr=subprocess.DEVNULL, check=True, timeout=120)
    summary = outputs.read_json(config.out / "batch.json")
    assert summary is not None
    assert (summary["done"] + summary["skipped"], summary["failed"]) == (8, 0)
    assert summary["skipped"] >= len(finished)
    assert all(outputs.published(config.out / f"item-{seed}.mp4") for seed in range(8))
    starts = Counter(line.split()[2] for line in log.read_text().split("\n") if "start" in line)
    # One item was in the making when the batch was killed; it alone began twice.
    assert sum(starts.values()) <= 9
    assert all(starts[name.removesuffix(".mp4").removeprefix("item-")] == 1 for name in finished)
    left = {p.name for p in config.out.iterdir()} - {".batch.lock", ".batch.workers", "batch.json"}
    assert left == {f"item-{seed}.{kind}" for seed in range(8) for kind in ("mp4", "json")}
