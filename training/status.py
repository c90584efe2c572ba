"""What a run is doing, what it has reached and whether it is well, read from its folder alone.

Works on a run that goes on, on this machine or on another one that shares the folder, and on one
that is long over.
"""

import fcntl
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from training.journal import CLIPS, NOTES
from training.metrics import format_line, read_lines, read_metrics
from training.node_monitor import read_nodes
from training.status_text import clock
from training.tracking import tracked_run

State = Literal["running", "finished", "stopped", "failed", "new"]

_LATE = 50  # steps that "now" is the mean of
_SILENT = 10.0  # times its usual step, and a minute: then a running run is said to be silent
_NOTES = 5  # of the newest that are shown


class StatusError(ValueError):
    """A folder that is none of a training run."""


def read_status(out: Path) -> dict[str, Any]:
    """The state of a run as one JSON-ready dictionary; what is not known is None.

    Raises:
        StatusError: for a folder without a `config.json` of a run.
    """
    settings = _json(out / "config.json")
    if settings is None or "optim" not in settings:
        raise StatusError(
            f"{out} is no folder of a training run: expected a config.json that "
            "`animator train` wrote; give its --out folder."
        )
    records = read_metrics(out / "metrics.jsonl")
    summary, failure = _json(out / "summary.json"), _json(out / "failure.json")
    age = _age(out / "metrics.jsonl")
    position = _position(settings, records)
    state = _state(out, position, summary, failure)
    run = tracked_run(out)
    return {
        "folder": str(out),
        "task": settings.get("name"),
        "state": state,
        "message": _message(out, state, failure, records, age),
        "age": age,
        "position": position,
        "line": _line(records, position),
        "now": _now(records),
        "left_out": _left_out(out, records),
        "checkpoints": _checkpoints(out / "checkpoints"),
        "validation": _validations(out),
        "metric": settings.get("validate", {}).get("metric"),
        "best": _json(out / "best" / "metrics.json"),
        "model": str(out / "model") if (out / "model" / "config.json").exists() else None,
        "nodes": {node: rows[-1] for node, rows in read_nodes(out).items() if rows},
        "notes": [entry["text"] for entry in read_lines(out / NOTES, "text")[-_NOTES:]],
        "mlflow": None if run is None else {"uri": run.uri, "run_id": run.run_id},
    }


def _position(settings: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    samples, batch = settings["optim"]["samples"], settings["batch"]["global_batch"]
    last = records[-1] if records else {}
    seen = last.get("samples_seen", 0)
    return {
        "samples_seen": seen,
        "samples": samples,
        "share": min(1.0, seen / samples),
        "step": last.get("step", 0),
        "steps": -(-samples // batch),
        "epoch": last.get("epoch"),
        "eta": last.get("eta"),
    }


def _state(
    out: Path, position: Mapping[str, Any], summary: Any, failure: Mapping[str, Any] | None
) -> State:
    if _locked(out / ".lock") or _locked(out / "metrics.jsonl"):
        return "running"
    if summary is not None and position["samples_seen"] >= position["samples"]:
        return "finished"
    if failure is not None and failure.get("kind") != "Stopped":
        return "failed"
    return "stopped" if position["samples_seen"] else "new"


def _message(
    out: Path,
    state: State,
    failure: Mapping[str, Any] | None,
    records: Sequence[Mapping[str, Any]],
    age: float | None,
) -> str:
    if state == "finished":
        return "finished"
    if state == "failed" and failure:
        return f"failed: {failure['message']}"
    if state == "stopped":
        return "stopped; the same command continues it"
    if state == "new" or not records or age is None:
        return "starting" if state == "running" else "no step was made yet"
    usual = sorted(record["dt"] for record in records[-_LATE:])[len(records[-_LATE:]) // 2]
    if age > _SILENT * usual + 60:
        return f"running, but silent for {clock(age)} where a step takes {usual:.3g} s"
    return "running"


def _locked(path: Path) -> bool:
    """Whether a process holds the file's lock."""
    with suppress(OSError), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(file, fcntl.LOCK_UN)
    return False


def _line(records: Sequence[Mapping[str, Any]], position: Mapping[str, Any]) -> str | None:
    with suppress(KeyError, IndexError, TypeError):  # a record of an earlier version
        return format_line(records[-1], position["steps"])
    return None


# Of a record: what is shown in a place of its own.
_APART = frozenset(
    "samples_seen step samples lr dt data_wait compute optimiser other samples_per_second mfu "
    "memory_gb eta epoch skipped".split()
)


def _now(records: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Means over the last steps; of the gradient norm the median."""
    if not records:
        return None
    width = max(1, min(_LATE, len(records) // 2))  # so that first and last do not overlap
    late = records[-width:]
    seconds = sum(record["dt"] for record in late)
    samples = sum(record["samples_per_second"] * record["dt"] for record in late)
    numbers = {key: _mean(late, key) for key in late[-1] if key not in _APART}
    numbers |= {key: value for key, value in [("grad_norm", _middle(late, "grad_norm"))] if value}
    return {
        "steps": len(late),
        "numbers": {"loss": numbers.pop("loss", None), **numbers},
        "first_loss": _mean(records[:width], "loss"),
        "lr": late[-1].get("lr"),
        "seconds": seconds / len(late),
        "samples_per_second": samples / max(seconds, 1e-9),
        "data_wait": sum(record.get("data_wait", 0.0) for record in late) / max(seconds, 1e-9),
        "parts": {
            part: sum(record.get(part, 0.0) for record in late) / max(seconds, 1e-9)
            for part in ("data_wait", "compute", "optimiser", "other")
        },
        "mfu": _mean(late, "mfu"),
        "memory_gb": max(record.get("memory_gb") or 0.0 for record in late),
    }


def _mean(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [record[key] for record in records if isinstance(record.get(key), int | float)]
    return sum(values) / len(values) if values else None


def _middle(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """The median, which a single spike does not move."""
    values = sorted(r[key] for r in records if isinstance(r.get(key), int | float))
    return values[len(values) // 2] if values else None


def _left_out(out: Path, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    clips = [{k: e.get(k) for k in ("key", "reason")} for e in read_lines(out / CLIPS, "key")]
    return {"steps": records[-1].get("skipped") or 0 if records else 0, "clips": clips}


def _checkpoints(root: Path) -> list[dict[str, Any]]:
    from training.checkpoint import fault

    found = []
    for folder in sorted(root.glob("samples-*")):
        with suppress(OSError):
            found.append(
                {
                    "samples_seen": int(folder.name.rpartition("-")[2]),
                    "fault": fault(folder, thorough=False),
                    "bytes": sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()),
                    "age": _age(folder / "train.json"),
                }
            )
    return found


def _validations(out: Path) -> list[dict[str, Any]]:
    from training.validate_checkpoint import ABOUT, FOLDER, read_validations

    rows = []
    for entry in read_validations(out):
        folder = out / FOLDER / f"samples-{entry['samples_seen']:012d}"
        rows.append(
            {
                "samples_seen": entry["samples_seen"],
                "seconds": entry.get("seconds"),
                "metrics": {key: value for key, value in entry.items() if key not in ABOUT},
                "pictures": [str(path) for path in sorted(folder.glob("*.png"))],
            }
        )
    return rows


def _age(path: Path) -> float | None:
    try:
        return max(0.0, round(time.time() - path.stat().st_mtime, 1))
    except OSError:
        return None


def _json(path: Path) -> Any:
    with suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return None
