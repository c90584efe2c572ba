import sys

import pytest
from mlflow import MlflowClient

from training import tracking


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
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


def test_tracker_that_fails_warns_and_never_raises(store, monkeypatch):
    out = store / "out"
    out.mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.warns(RuntimeWarning, match="training goes on"):
        assert tracking.open_run(out, "toy", {}, "x") is None
    run = tracking.TrackedRun(uri="http://127.0.0.1:9", run_id="none", identity="x")
    tracker = tracking.MlflowTracker(run)
    tracker.log(record(1))
    with pytest.warns(RuntimeWarning, match="training goes on"):
        tracker.close()
    tracker.log(record(2))
    with pytest.warns(RuntimeWarning, match="training goes on"):
        tracking.close_run(run, finished=True)


def test_importing_the_tracker_does_not_import_mlflow():
    # Start-up of `animator --help` must not pay for it.
    import subprocess

    code = "import sys, training.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
