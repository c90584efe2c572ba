"""Training under Ray with two workers: plain PyTorch's numbers, and none lost to a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import toy_task
from mlflow import MlflowClient
from safetensors.torch import load_file

from training.checkpoint import checkpoint_name, newest_checkpoint
from training.launch import train
from training.metrics import TIMINGS, Quiet, read_metrics


def start_driver(out: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, toy_task.__file__, str(out), "--workers", "2", *options]
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    environment.pop("MLFLOW_TRACKING_URI", None)
    return subprocess.Popen(command, cwd=out.parent, env=environment, start_new_session=True)


def numbers(out: Path) -> list[dict]:
    """What the steps computed, without how long they took."""
    records = read_metrics(out / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in TIMINGS} for record in records]


def wait_for_samples(out: Path, samples: int, driver: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not any(r["samples_seen"] >= samples for r in read_metrics(out / "metrics.jsonl")):
        assert driver.poll() is None, "the driver ended early"
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    """A run of two workers that nobody disturbs."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert start_driver(out, "--track").wait(400) == 0
    return out


def test_two_workers_equal_plain_adamw(whole_run):
    losses = [record["loss"] for record in read_metrics(whole_run / "metrics.jsonl")]
    expected = toy_task.reference_losses(toy_task.toy_config())
    assert losses == pytest.approx(expected, abs=1e-6)


def test_run_is_tracked_from_its_folder(whole_run):
    run = json.loads((whole_run / "mlflow.json").read_text())
    stored = MlflowClient(run["uri"]).get_run(run["run_id"])
    assert stored.info.status == "FINISHED"
    assert stored.data.params["optim.lr"] == "0.01"
    last = numbers(whole_run)[-1]
    assert stored.data.metrics["train/loss"] == pytest.approx(last["loss"])


def test_run_continues_on_another_number_of_workers(whole_run, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole_run, out)
    (out / "summary.json").unlink()
    shutil.rmtree(out / "checkpoints" / checkpoint_name(96))
    summary = train(toy_task.toy_config(), out, progress=Quiet(), local=True)
    assert summary.samples_seen == 96
    for alone, two in zip(numbers(out), numbers(whole_run), strict=True):
        assert alone["loss"] == pytest.approx(two["loss"], abs=1e-6)


def test_stopped_driver_killed_driver_and_killed_worker_change_nothing(whole_run, tmp_path):
    out = tmp_path / "out"
    driver = start_driver(out, "--delay", "0.3")
    wait_for_samples(out, 8, driver)
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(100) == 1
    stopped = newest_checkpoint(out / "checkpoints").samples_seen
    assert stopped == numbers(out)[-1]["samples_seen"] < 96

    # The same command again; this time all is killed.
    driver = start_driver(out, "--delay", "0.5")
    wait_for_samples(out, 72, driver)
    os.killpg(driver.pid, signal.SIGSTOP)  # so that it starts nothing while Ray's are listed
    processes = psutil.Process(driver.pid).children(recursive=True)
    for process in processes:
        process.kill()
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait(10)
    psutil.wait_procs(processes, timeout=30)
    assert len(read_metrics(out / "metrics.jsonl")) < 12

    # And again; this time a worker is killed, after the last checkpoint at 64.
    driver = start_driver(out, "--accident-at", "85")
    assert driver.wait(400) == 0
    assert (out / "accident").exists()
    assert numbers(out) == numbers(whole_run)
    released, expected = (
        load_file(folder / "model" / "model.safetensors") for folder in (out, whole_run)
    )
    assert all(released[name].equal(value) for name, value in expected.items())
    assert not list((out / "checkpoints").glob(".*"))


def test_failure_of_a_worker_is_one_sentence(tmp_path):
    config = toy_task.toy_config(workers=2, bad_sample=20, max_failures=0)
    with pytest.raises(ValueError, match=r"^sample 20 is not readable.*errors\.log\)$"):
        train(config, tmp_path / "out", progress=Quiet())
    assert "Traceback" in (tmp_path / "out" / "errors.log").read_text()
