"""A tracking server that is killed in the middle of a run and comes back: nothing is lost."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlflow import MlflowClient

from training import tracking
from training.node_monitor import NodeMonitor, read_nodes


@contextmanager
def server(folder: Path, port: int) -> Iterator[None]:
    """A real server on the same store and port every time; killed at the end, not asked to stop."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", str(port), "--backend-store-uri", f"sqlite:///{folder / 'store.db'}"]
    command += ["--artifacts-destination", str(folder / "artefacts")]
    with (folder / "server.log").open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while True:
            with suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            assert process.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_numbers_of_before_during_and_after_an_outage_all_arrive(tmp_path, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    said: list[str] = []

    def log(steps: range) -> list[float]:
        durations = []
        for step in steps:
            started = time.perf_counter()
            tracker.log({"step": step, "samples_seen": 8 * step, "loss": 1 / step})
            durations.append(time.perf_counter() - started)
        return durations

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the sentences are all that is said
        with server(tmp_path, port):
            settings = {"optim": {"lr": 0.1}}
            run = tracking.open_run(
                out, "toy", settings, "x", fingerprint="f" * 64, say=said.append
            )
            assert run is not None
            assert said == []
            client = MlflowClient(run.uri)
            monitor = NodeMonitor(run, out, node="node-0", seconds=0.5, say=said.append)
            monitor.__enter__()
            tracker = tracking.MlflowTracker(run, say=said.append)
            durations = log(range(1, 11))
            while len(client.get_metric_history(run.run_id, "train/loss")) < 10:
                time.sleep(0.1)
        durations += log(range(11, 21))  # nobody there
        deadline = time.monotonic() + 30
        while sum("does not answer" in text for text in said) < 2:  # the tracker's and the node's
            assert time.monotonic() < deadline
            time.sleep(0.1)
        away = tracking.open_run(out, "toy", settings, "x", say=said.append)
        assert away == run  # a restart now would join it all the same
        with server(tmp_path, port):
            durations += log(range(21, 31))
            tracker.close()
            monitor.__exit__()
            tracking.close_run(run, finished=True, say=said.append)
            stored = client.get_run(run.run_id)
            history = client.get_metric_history(run.run_id, "train/loss")
            name = "system/node-0/cpu_utilization_percentage"
            measured = client.get_metric_history(run.run_id, name)
            artefacts = {item.path for item in client.list_artifacts(run.run_id)}

    assert [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)] == [
        (8 * step, 1 / step) for step in range(1, 31)
    ]
    assert stored.info.status == "FINISHED"
    assert len(measured) == len(read_nodes(out)["node-0"]) > 10
    assert {"config.json", "packages.txt"} <= artefacts
    assert stored.inputs.dataset_inputs[0].dataset.digest == "f" * 36
    back = [text for text in said if "answers again" in text]
    assert len(back) == 2
    assert all("nothing is lost" in text for text in back)
    assert sum("does not answer" in text for text in said) == 2
    assert sorted(durations)[len(durations) // 2] < 1e-3  # a step never waits for the server
