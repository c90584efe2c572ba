"""The folder of a run: what lies in it before, and how it says what ended it.

out/
  config.json      the resolved settings
  metrics.jsonl    one line a step
  notes.jsonl      what was said on the console while workers trained
  left-out/        batches of steps that were left out, and the clips that were replaced
  checkpoints/     what a run resumes from
  validation/      metrics and pictures of validated checkpoints
  system/          what each node measured of itself
  best/            the model of the checkpoint that was best in validation
  model/           the released model (averaged weights), with its card
  summary.json     written last; a run that has it is finished
"""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training import checkpoint as ckpt
from training.config import TrainConfig, binding_settings, changed_settings, describe
from training.metrics import Progress
from training.stop_request import StopRequest
from training.task import Stopped, Task, TrainingError

_FAILURE = "failure.json"


@dataclass(frozen=True, kw_only=True)
class TrainSummary:
    """How a run ended."""

    task: str
    samples_seen: int
    steps: int
    loss: float  # of the last step that was taken
    seconds: float  # spent in steps, over all attempts
    model: Path
    run_id: str | None  # MLflow's


@contextmanager
def only_run_in(out: Path) -> Iterator[None]:
    """Refuse a second run in the same folder while the first one lives."""
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{out} is in use by another run: wait for it, or choose another folder."
            ) from None
        yield


def finished_summary(config: TrainConfig, out: Path) -> TrainSummary | None:
    """The summary of a run that is already complete under the same settings."""
    path = out / "summary.json"
    if not path.exists() or not (out / "model").is_dir():
        return None
    data = json.loads(path.read_text())
    settings = data.pop("settings")
    if data["samples_seen"] < config.optim.samples:
        return None
    if changed_settings(settings, binding_settings(config)):
        return None  # the checkpoint says which, and how to mend it
    return TrainSummary(**{**data, "model": out / data["model"]})


def prepare_folder(
    config: TrainConfig, task: Task, out: Path, world: int, progress: Progress
) -> int:
    """Check what lies in `out`, write `config.json`; the samples already seen."""
    root = out / "checkpoints"
    for line in ckpt.remove_incomplete(root):
        progress.note(line)
    StopRequest(out).clear()
    (out / _FAILURE).unlink(missing_ok=True)
    latest = ckpt.newest_checkpoint(root, thorough=False)
    if latest is not None:
        ckpt.check_resume(latest, config, task.fingerprint)
        ckpt.check_start(latest, task)
        if latest.samples_seen < config.optim.samples and (line := ckpt.fit_world(latest, world)):
            progress.note(line)
        progress.note(f"Continuing from {latest.samples_seen} samples.")
    write_json(out / "config.json", describe(config))
    return latest.samples_seen if latest else 0


def enter_folder(folder: Path) -> None:
    """Make relative paths of the settings start where the driver's do.

    Raises:
        ValueError: this machine does not have the folder.
    """
    try:
        os.chdir(folder)
    except OSError as error:
        raise ValueError(
            f"{socket.gethostname()} cannot enter {folder} ({error.strerror}), where the run was "
            "started and where relative paths of its settings begin: start it from a folder that "
            "every machine of the cluster has."
        ) from None


def has_failure(out: Path) -> bool:
    """Whether an attempt of this start ended in a way that another would repeat."""
    return (out / _FAILURE).exists()


def write_failure(out: Path, error: Exception) -> None:
    """Keep the message of an error that trying again would not mend."""
    write_json(out / _FAILURE, {"kind": type(error).__name__, "message": str(error)})


def raise_failure(out: Path) -> None:
    """Raise what a worker said cannot be mended by trying again."""
    path = out / _FAILURE
    if path.exists():
        failure = json.loads(path.read_text())
        if failure["kind"] == "Stopped":
            raise Stopped(failure["message"])
        if failure["kind"] == "TrainingError":
            raise TrainingError(failure["message"])
        raise ValueError(f"{failure['message']} (Log: {out / 'errors.log'})")


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file that is there completely or not."""
    text = json.dumps(data, indent=2, sort_keys=True, default=str) + "\n"
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text)
        os.replace(scratch, path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise
