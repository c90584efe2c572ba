"""Validation beside training under Ray, as a task of its own, tracked with the run."""

import json

from mlflow import MlflowClient

from tests.validated_task import validated_config
from training.launch import train
from training.metrics import Quiet, read_metrics
from training.validate_checkpoint import read_validations


def test_validation_runs_as_a_task_of_ray_and_is_tracked(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    train(validated_config(track=True, workers=2), tmp_path / "out", progress=Quiet())
    out = tmp_path / "out"
    found = read_validations(out)
    assert found[-1]["samples_seen"] == 96
    best = min(found, key=lambda entry: entry["loss"])
    kept = json.loads((out / "best" / "metrics.json").read_text())
    assert kept["samples_seen"] == best["samples_seen"]

    run = json.loads((out / "mlflow.json").read_text())
    client = MlflowClient(run["uri"])
    stored = client.get_run(run["run_id"])
    assert stored.info.status == "FINISHED"
    history = client.get_metric_history(run["run_id"], "val/loss")
    assert {m.step: m.value for m in history} == {e["samples_seen"]: e["loss"] for e in found}
    pictures = client.list_artifacts(run["run_id"], "validation/samples-000000000096")
    assert "contact.png" in {item.path.rpartition("/")[2] for item in pictures}
    version = client.get_model_version_by_alias("stableanimator-validated", "best")
    assert version.tags["samples_seen"] == str(best["samples_seen"])
    assert len(read_metrics(out / "metrics.jsonl")) == 12
