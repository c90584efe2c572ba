"""MLflow, kept at arm's length: it never slows training down and never stops it.

The driver opens the run, so that every worker and every restart writes to the same one. Rank 0
hands its numbers to a thread; a tracker that fails says so once and falls silent.
"""

import json
import os
import queue
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

_RUN_FILE = "mlflow.json"
_QUEUE_SIZE = 10_000
_BATCH = 50  # records sent at once; MLflow takes 1,000 numbers a call
_NAMES = {
    "dt": "perf/step_seconds",
    "data_wait": "perf/data_wait_seconds",
    "samples_per_second": "perf/samples_per_second",
    "memory_gb": "mem/peak_gb",
}


class Tracker(Protocol):
    """Receives the numbers of a step; never raises."""

    def log(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class NullTracker:
    """Tracks nothing."""

    def log(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """Where a run is tracked; kept in `out/mlflow.json` so that a restart joins it."""

    uri: str
    run_id: str
    identity: str  # of the settings; MLflow's parameters cannot change with them


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, else MLflow's default store, a SQLite file in the current folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


def tracked_run(out: Path) -> TrackedRun | None:
    """The run that an output folder already has."""
    path = out / _RUN_FILE
    return TrackedRun(**json.loads(path.read_text())) if path.exists() else None


def open_run(out: Path, task: str, settings: Mapping[str, Any], identity: str) -> TrackedRun | None:
    """Create the run of an output folder, or join the one it already has; None if that fails.

    Args:
        settings: the resolved config, nested; logged once as parameters, which MLflow never lets
            change.
        identity: a hash of the settings that define the run; another one starts a new run.
    """
    uri = tracking_uri()
    # A server that does not answer costs seconds, not MLflow's default of many minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    try:
        client = _client(uri)
        known = tracked_run(out)
        if known is not None and (known.uri, known.identity) == (uri, identity):
            client.update_run(known.run_id, status="RUNNING")
            return known
        run_id = _create(client, out, task, settings)
        run = TrackedRun(uri=uri, run_id=run_id, identity=identity)
        (out / _RUN_FILE).write_text(json.dumps(asdict(run)))
        return run
    except Exception as error:
        _warn(error)
        return None


def close_run(run: TrackedRun | None, *, finished: bool) -> None:
    """Mark the run as ended."""
    if run is None:
        return
    try:
        status = "FINISHED" if finished else "FAILED"
        _client(run.uri).set_terminated(run.run_id, status=status)
    except Exception as error:
        _warn(error)


class MlflowTracker:
    """Sends numbers to one MLflow run from a thread of its own; the step is `samples_seen`.

    A thread with a bounded queue, where MLflow's asynchronous mode would do the same, because
    importing MLflow and a server that does not answer must not hold up the caller either.
    """

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(_QUEUE_SIZE)
        self._thread = threading.Thread(target=self._send, name="mlflow", daemon=True)
        self._thread.start()

    def log(self, record: Mapping[str, Any]) -> None:
        try:
            self._queue.put_nowait({**record, "time_ms": int(time.time() * 1000)})
        except queue.Full:
            pass  # nothing is lost: the numbers are in metrics.jsonl

    def close(self, patience: float = 20.0) -> None:
        """Wait a while for what is still queued."""
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(patience)

    def _send(self) -> None:
        try:
            client = _client(self._run.uri)
            while (records := self._take()) is not None:
                metrics = [metric for record in records for metric in _metrics(record)]
                client.log_batch(self._run.run_id, metrics=metrics)
        except Exception as error:
            _warn(error)

    def _take(self) -> list[dict[str, Any]] | None:
        """Everything queued, up to a batch; waits for the first; None at the end."""
        records: list[dict[str, Any]] = []
        while not records or (len(records) < _BATCH and not self._queue.empty()):
            record = self._queue.get()
            if record is None:
                if records:
                    self._queue.put(None)
                return records or None
            records.append(record)
        return records


def _client(uri: str) -> Any:
    import logging

    from mlflow import MlflowClient

    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    return MlflowClient(uri)


def _create(client: Any, out: Path, task: str, settings: Mapping[str, Any]) -> str:
    from mlflow.entities import Param

    name = f"stableanimator/{task}"
    experiment = client.get_experiment_by_name(name)
    number = experiment.experiment_id if experiment else client.create_experiment(name)
    run = client.create_run(number, run_name=out.name, tags={"output": str(out)})
    params = [Param(key, str(value)[:6000]) for key, value in flatten(settings).items()]
    for start in range(0, len(params), 100):
        client.log_batch(run.info.run_id, params=params[start : start + 100])
    return run.info.run_id


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"optim": {"lr": 1}}` → `{"optim.lr": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _metrics(record: Mapping[str, Any]) -> list[Any]:
    from mlflow.entities import Metric

    when, step = record["time_ms"], record["samples_seen"]
    return [
        Metric(_NAMES.get(key, f"train/{key}"), float(value), when, step)
        for key, value in record.items()
        if value is not None and key not in ("time_ms", "samples_seen", "step")
    ]


def _warn(error: Exception) -> None:
    reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
    warnings.warn(
        f"MLflow does not take part ({reason[0]}); training goes on, its numbers are in "
        "metrics.jsonl.",
        RuntimeWarning,
        stacklevel=2,
    )
