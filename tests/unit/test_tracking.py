"""The tracker: what it keeps of a run, and that it neither loses numbers nor stops training."""

import json
import shutil
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from mlflow import MlflowClient

from training import tracking
from training.node_monitor import NodeMonitor, read_nodes
from training.outbox import Outbox
from training.registry import Validation, validation_outbox


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """MLflow's file with its tables, which take it seconds to make."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def store(empty_store, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return tmp_path


def record(step: int, **numbers: object) -> dict:
    return {"step": step, "samples_seen": 8 * step, "loss": 1 / step, "dt": 0.5, **numbers}


def test_restart_joins_the_run_and_keeps_its_parameters(store):
    out = store / "out"
    out.mkdir()
    settings = {"optim": {"lr": 0.1}, "name": "toy"}
    run = tracking.open_run(out, "toy", settings, "same")
    assert run is not None
    assert run.uri == f"sqlite:///{store / 'mlflow.db'}"  # MLflow's default store, made absolute
    tracker = tracking.MlflowTracker(run)
    tracker.log(record(1, nothing=None))
    tracker.log(record(2))
    tracker.close()
    tracking.close_run(run, finished=False)

    again = tracking.open_run(out, "toy", {"optim": {"lr": 0.1}, "log_every": 3}, "same")
    assert again == run
    tracking.close_run(again, finished=True)

    client = MlflowClient(run.uri)
    stored = client.get_run(run.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.data.params == {"optim.lr": "0.1", "name": "toy"}
    losses = [(m.step, m.value) for m in client.get_metric_history(run.run_id, "train/loss")]
    assert losses == [(8, 1.0), (16, 0.5)]
    assert "perf/step_seconds" in stored.data.metrics
    assert client.get_experiment_by_name("stableanimator/toy") is not None

    other = tracking.open_run(out, "toy", {"optim": {"lr": 0.2}}, "other settings")
    assert other is not None
    assert other.run_id != run.run_id  # parameters never change, so other settings are another run


def test_on_a_cluster_the_store_lies_beside_the_run_and_a_restart_elsewhere_finds_it(
    store, monkeypatch
):
    shared, pods = store / "shared", [store / "pod-1", store / "pod-2"]
    for folder in (shared / "out", *pods):
        folder.mkdir(parents=True)
    shutil.move(store / "mlflow.db", shared / "mlflow.db")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.5:6379")
    monkeypatch.chdir(pods[0])
    run = tracking.open_run(shared / "out", "toy", {"optim": {"lr": 0.1}}, "same")
    assert run is not None
    assert run.uri == f"sqlite:///{shared / 'mlflow.db'}"
    files = MlflowClient(run.uri).get_run(run.run_id).info.artifact_uri
    assert str(files).startswith(str(shared / "mlruns"))
    assert not list(pods[0].iterdir())

    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.chdir(pods[1])
    assert tracking.open_run(shared / "out", "toy", {"optim": {"lr": 0.1}}, "same") == run
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{pods[1] / 'mlflow.db'}")
    assert tracking.tracking_uri(shared / "out") == f"sqlite:///{pods[1] / 'mlflow.db'}"


def test_tracker_that_fails_warns_and_never_raises(store, monkeypatch):
    out = store / "out"
    out.mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.warns(RuntimeWarning, match="training goes on"):
        assert tracking.open_run(out, "toy", {}, "x") is None
    run = tracking.TrackedRun(uri="http://127.0.0.1:9", run_id="none", identity="x")
    said: list[str] = []
    tracker = tracking.MlflowTracker(run, say=said.append)
    tracker.log(record(1))
    tracker.close(patience=2)
    assert "does not answer" in said[0]
    assert "training goes on" in said[0]
    assert said[1:] == ["1 entries did not reach MLflow; they are in the run's folder."]
    tracker.log(record(2))
    with pytest.warns(RuntimeWarning, match="training goes on"):
        tracking.close_run(run, finished=True)


def test_what_made_the_run_is_kept_with_it(store):
    out = store / "out"
    out.mkdir()
    run = tracking.open_run(out, "toy", {"optim": {"lr": 0.1}}, "x", fingerprint="ab" * 32)
    assert run is not None
    client = MlflowClient(run.uri)
    assert json.loads(Path(client.download_artifacts(run.run_id, "config.json")).read_text()) == {
        "optim": {"lr": 0.1}
    }
    packages = Path(client.download_artifacts(run.run_id, "packages.txt")).read_text()
    assert f"torch=={version('torch')}" in packages.splitlines()
    stored = client.get_run(run.run_id)
    assert stored.inputs.dataset_inputs[0].dataset.digest == ("ab" * 32)[:36]


def test_numbers_that_are_refused_do_not_hold_up_the_others(store):
    out = store / "out"
    out.mkdir()
    run = tracking.open_run(out, "toy", {}, "x")
    assert run is not None
    said: list[str] = []
    tracker = tracking.MlflowTracker(run, say=said.append)
    for step in range(1, 4):
        tracker.log(record(step, **{"a ✗ name": 1.0} if step == 2 else {}))
    tracker.close()
    history = MlflowClient(run.uri).get_metric_history(run.run_id, "train/loss")
    assert [m.step for m in history] == [8, 24]
    assert len(said) == 1
    assert "refuses" in said[0]


def test_best_model_is_registered_as_a_pointer_that_moves_only_to_better_ones(store):
    out, best = store / "out", store / "out" / "best"
    best.mkdir(parents=True)
    (best / "config.json").write_text("{}")
    (best / "model.safetensors").write_bytes(b"heavy")
    run = tracking.open_run(out, "toy", {}, "x")
    assert run is not None
    said: list[str] = []
    outbox = validation_outbox(run, said.append)
    client = MlflowClient(run.uri)

    def validated(samples: int, loss: float, fingerprint: str = "data") -> None:
        folder = out / f"samples-{samples}"
        folder.mkdir(exist_ok=True)
        (folder / "sheet.png").write_bytes(b"picture")
        outbox.put(
            Validation(
                task="toy",
                samples_seen=samples,
                metrics={"loss": loss, "psnr": 20.0},
                folder=folder,
                fingerprint=fingerprint,
                metric="loss",
                higher_is_better=False,
                best=best,
                time_ms=samples,
            )
        )

    def holder() -> str:
        return client.get_model_version_by_alias("stableanimator-toy", "best").tags["samples_seen"]

    for samples, loss, expected in ((8, 0.5, "8"), (16, 0.4, "16"), (24, 0.6, "16")):
        validated(samples, loss)
        deadline = time.monotonic() + 30
        while len(outbox) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert holder() == expected
    validated(32, 0.9, fingerprint="other data")  # cannot be compared
    assert outbox.close() == 0
    assert said == []
    assert holder() == "32"
    assert [m.step for m in client.get_metric_history(run.run_id, "val/psnr")] == [8, 16, 24, 32]
    names = {item.path for item in client.list_artifacts(run.run_id, "best")}
    assert names == {"best/config.json"}  # the weights stay where they are
    assert client.list_artifacts(run.run_id, "validation/samples-8")
    tags = client.get_model_version_by_alias("stableanimator-toy", "best").tags
    assert tags["folder"] == str(best)
    assert tags["val.psnr"] == "20.0"


def test_queue_that_is_full_keeps_the_whole_span_and_says_that_some_are_lost():
    taken: list[int] = []
    is_open, said = threading.Event(), []

    def send(items: list[int]) -> None:
        if not is_open.is_set():
            raise ConnectionError("nobody there")
        taken.extend(items)

    outbox = Outbox("it", send, room=8, together=1, say=said.append)
    outbox.put(0)
    while not said:
        time.sleep(0.01)
    for number in range(1, 100):
        outbox.put(number)
    is_open.set()
    assert outbox.close() == 0
    assert len(taken) <= 9
    assert taken == sorted(set(taken))
    assert taken[0] == 0
    assert taken[-1] == 99
    assert "nobody there" in said[0]
    assert f"{100 - len(taken)} of the entries are lost" in said[1]


def test_node_is_measured_into_the_runs_folder(tmp_path):
    with NodeMonitor(None, tmp_path, node="a/b", seconds=0.05):
        deadline = time.monotonic() + 20
        while not (rows := read_nodes(tmp_path).get("a-b")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert 0 <= rows[0]["cpu_utilization_percentage"] <= 100
    assert rows[0]["system_memory_usage_megabytes"] > 10
    assert 0 < rows[0]["disk_usage_percentage"] <= 100
    assert "network_receive_megabytes_per_second" in rows[0]


def test_importing_the_tracker_does_not_import_mlflow():
    # Start-up of `animator --help` must not pay for it.
    import subprocess

    code = "import sys, training.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
