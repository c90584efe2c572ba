"""MLflow, kept at arm's length: it never slows training down and never stops it.

The driver opens the run, so that every worker and every restart writes to the same one. Rank 0
hands its numbers to a thread, which keeps them while a server is away and sends them when it is
back. Weights are never uploaded: the registry holds pointers to them.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from training.outbox import Outbox, warn

Say = Callable[[str], None]

_RUN_FILE = "mlflow.json"
_NAMES = {
    "dt": "perf/step_seconds",
    "data_wait": "perf/data_wait_seconds",
    "samples_per_second": "perf/samples_per_second",
    "memory_gb": "mem/peak_gb",
    "mfu": "perf/mfu",
    "compute": "perf/compute_seconds",
    "optimiser": "perf/optimiser_seconds",
    "other": "perf/other_seconds",
    "eta": "perf/eta_seconds",
}
_DIGEST = 36  # characters that MLflow keeps of a dataset's digest
_MAX_PATCH = 1 << 20  # bytes of uncommitted changes that are kept
_CALL = 900  # numbers in one call; MLflow takes 1,000
# The server is there and says no; what else goes wrong may go right later.
_REFUSED = {
    "INVALID_PARAMETER_VALUE",
    "RESOURCE_DOES_NOT_EXIST",
    "RESOURCE_ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "BAD_REQUEST",
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
    started: float = 0.0  # seconds of the epoch; a node's measures are placed from here on


def tracking_uri(out: Path) -> str:
    """Where a run is tracked: `MLFLOW_TRACKING_URI`, else where it already is, else a SQLite file.

    The file is MLflow's default one, in the current folder. On a cluster the driver's current
    folder may be gone with its machine, and no worker need see it: there it lies beside the run.
    """
    if named := os.environ.get("MLFLOW_TRACKING_URI"):
        return named
    if known := tracked_run(out):
        return known.uri
    return _store(_folder_beside(out) or Path.cwd())


def _store(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow.db'}"


def _folder_beside(out: Path) -> Path | None:
    """The folder that holds the run's, where the run is on a cluster (Ray's jobs are too)."""
    return out.resolve().parent if "RAY_ADDRESS" in os.environ else None


def tracked_run(out: Path) -> TrackedRun | None:
    """The run that an output folder already has."""
    path = out / _RUN_FILE
    return TrackedRun(**json.loads(path.read_text())) if path.exists() else None


def open_run(
    out: Path,
    task: str,
    settings: Mapping[str, Any],
    identity: str,
    *,
    fingerprint: str = "",
    say: Say = warn,
) -> TrackedRun | None:
    """Create the run of an output folder, or join the one it already has; None if that fails.

    A run that exists is joined also while its server is away: it may come back.

    Args:
        settings: the resolved config, nested; logged once as parameters, which MLflow never lets
            change, and as `config.json`.
        identity: a hash of the settings that define the run; another one starts a new run.
        fingerprint: of the data, logged as the run's dataset.
        say: takes a sentence for the user.
    """
    uri, known = tracking_uri(out), tracked_run(out)
    try:
        client = client_of(uri)
        if known is not None and (known.uri, known.identity) == (uri, identity):
            try:
                client.update_run(known.run_id, status="RUNNING")
                return known
            except Exception as error:
                if not refused(error):
                    _tell(say, error)
                    return known
        run_id = _create(client, uri, out, task, settings)
        run = TrackedRun(uri=uri, run_id=run_id, identity=identity, started=round(time.time(), 3))
        (out / _RUN_FILE).write_text(json.dumps(asdict(run)))
    except Exception as error:
        _tell(say, error)
        return None
    try:
        _log_origin(client, run_id, task, settings, fingerprint)
    except Exception as error:
        _tell(say, error)
    return run


def close_run(run: TrackedRun | None, *, finished: bool, say: Say = warn) -> None:
    """Mark the run as ended."""
    if run is None:
        return
    try:
        status = "FINISHED" if finished else "FAILED"
        client_of(run.uri).set_terminated(run.run_id, status=status)
    except Exception as error:
        _tell(say, error)


class MlflowTracker:
    """Sends numbers to one MLflow run from a thread of its own; the step is `samples_seen`.

    A thread with a bounded queue, where MLflow's asynchronous mode would do the same, because
    importing MLflow must not hold up the caller either, and what a server that is away did not
    take must wait for it.
    """

    def __init__(self, run: TrackedRun, *, say: Say = warn) -> None:
        self._outbox = number_outbox(run, say)

    def log(self, record: Mapping[str, Any]) -> None:
        self._outbox.put({**record, "time_ms": int(time.time() * 1000)})

    def close(self, patience: float = 20.0) -> None:
        """Wait a while for what is still queued."""
        self._outbox.close(patience)


def tracker_of(run: TrackedRun | None, *, say: Say = warn) -> Tracker:
    """The tracker of a run; one that does nothing where there is none."""
    return MlflowTracker(run, say=say) if run else NullTracker()


def number_outbox(run: TrackedRun, say: Say = warn) -> Outbox[dict[str, Any]]:
    """A queue of records to a run: numbers by name, with `samples_seen` and `time_ms`.

    Names with a slash are MLflow's own; the others are put under `train/` or `perf/`.
    """

    def send(records: list[dict[str, Any]]) -> None:
        numbers = [number for record in records for number in metrics_of(record)]
        client = client_of(run.uri)
        for start in range(0, len(numbers), _CALL):
            client.log_batch(run.run_id, metrics=numbers[start : start + _CALL])

    return Outbox("MLflow", send, refused=refused, say=say)


@cache
def client_of(uri: str) -> Any:
    """MLflow's client of a server or store; needs neither to be there."""
    import logging

    # A server that does not answer costs seconds, not MLflow's default of many minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    from mlflow import MlflowClient

    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    return MlflowClient(uri)


def _create(client: Any, uri: str, out: Path, task: str, settings: Mapping[str, Any]) -> str:
    from mlflow.entities import Param

    name = f"stableanimator/{task}"
    experiment = client.get_experiment_by_name(name)
    number = experiment.experiment_id if experiment else None
    if number is None:
        beside = _folder_beside(out)
        # MLflow would put files, unlike numbers, in the driver's current folder.
        files = str(beside / "mlruns" / name) if beside and uri == _store(beside) else None
        number = client.create_experiment(name, artifact_location=files)
    tags = {"output": str(out)}
    if commit := _git("rev-parse", "HEAD"):
        tags["mlflow.source.git.commit"] = commit.strip()
        tags["changed_since_commit"] = str(bool(_git("status", "--porcelain", "-uno"))).lower()
    run = client.create_run(number, run_name=out.name, tags=tags)
    params = [Param(key, str(value)[:6000]) for key, value in flatten(settings).items()]
    for start in range(0, len(params), 100):
        client.log_batch(run.info.run_id, params=params[start : start + 100])
    return run.info.run_id


def _log_origin(
    client: Any, run_id: str, task: str, settings: Mapping[str, Any], fingerprint: str
) -> None:
    """What made the run what it is: settings, packages, changes to the code, data."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    client.log_dict(run_id, dict(settings), "config.json")
    found = {f"{d.name}=={d.version}" for d in metadata.distributions()}
    client.log_text(run_id, "\n".join(sorted(found, key=str.lower)) + "\n", "packages.txt")
    if patch := _git("diff", "HEAD")[:_MAX_PATCH]:
        client.log_text(run_id, patch, "changes.patch")
    if fingerprint:
        dataset = Dataset(
            name=f"{task} data",
            digest=fingerprint[:_DIGEST],
            source_type="local",
            source=json.dumps({"fingerprint": fingerprint}),
        )
        tags = [InputTag("mlflow.data.context", "training")]
        client.log_inputs(run_id, [DatasetInput(dataset=dataset, tags=tags)])


def _git(*arguments: str) -> str:
    """What git says of the package's own checkout; nothing where it is none."""
    folder = Path(__file__).resolve().parents[1]
    if not (folder / ".git").exists():
        return ""
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"optim": {"lr": 1}}` → `{"optim.lr": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def metrics_of(record: Mapping[str, Any]) -> list[Any]:
    """The numbers of a record with `samples_seen` and `time_ms` as MLflow has them."""
    from mlflow.entities import Metric

    when, step = record["time_ms"], record["samples_seen"]
    return [
        Metric(_name(key), float(value), when, step)
        for key, value in record.items()
        if isinstance(value, int | float) and key not in ("time_ms", "samples_seen", "step")
    ]


def _name(key: str) -> str:
    return key if "/" in key else _NAMES.get(key, f"train/{key}")


def refused(error: Exception) -> bool:
    """Whether MLflow is there and says no, so that asking again is of no use."""
    return getattr(error, "error_code", None) in _REFUSED


def _tell(say: Say, error: Exception) -> None:
    reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
    say(
        f"MLflow does not take part ({reason[0]}); training goes on, its numbers are in "
        "metrics.jsonl."
    )
