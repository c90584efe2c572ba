"""The folder of a run: what lies in it before, and what is written into it at the end.

out/
  config.json      the resolved settings
  metrics.jsonl    one line a step
  checkpoints/     what a run resumes from, and Ray Train's own files
  model/           the released model (averaged weights), with its card
  summary.json     written last; a run that has it is finished
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from training import checkpoint as ckpt
from training.card import write_card
from training.config import TrainConfig, binding_settings, changed_settings, describe
from training.metrics import Progress, read_metrics
from training.task import Task, TrainingError
from training.tracking import tracked_run

_FAILURE = "failure.json"


@dataclass(frozen=True, kw_only=True)
class TrainSummary:
    """How a run ended."""

    task: str
    samples_seen: int
    steps: int
    loss: float  # of the last step
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
    # Ray's own list of checkpoints; one that a kill left torn, or that names a folder that is
    # gone, would keep Ray from starting. The folders say for themselves what they are.
    (root / "checkpoint_manager_snapshot.json").unlink(missing_ok=True)
    (out / _FAILURE).unlink(missing_ok=True)
    latest = ckpt.newest_checkpoint(root, thorough=False)
    if latest is not None:
        ckpt.check_resume(latest, config, task.fingerprint)
        if latest.samples_seen < config.optim.samples and (line := ckpt.fit_world(latest, world)):
            progress.note(line)
        progress.note(f"Continuing from {latest.samples_seen} samples.")
    _write_json(out / "config.json", describe(config))
    return latest.samples_seen if latest else 0


def export_model(config: TrainConfig, task: Task, out: Path, progress: Progress) -> TrainSummary:
    """Write `model/` from the averaged weights of the last checkpoint, then `summary.json`.

    A model without its card is still a model: what keeps the card from being written is noted.
    """
    import torch

    latest = ckpt.newest_checkpoint(out / "checkpoints", thorough=False)
    records = read_metrics(out / "metrics.jsonl")
    if latest is None or not records:
        raise TrainingError(f"{out} holds no checkpoint to export: start the run again.")
    torch.manual_seed(config.run.seed)
    model = task.build()
    model.load_state_dict(latest.average(), strict=False)  # frozen parameters are not averaged
    scratch, folder = out / ".model", out / "model"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    task.save_model(model.state_dict(), scratch)
    try:
        write_card(config, task, sum(p.numel() for p in model.parameters()), out, scratch)
    except Exception as error:
        progress.note(f"The model has no card: {type(error).__name__}: {error}")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(scratch, folder)
    summary = TrainSummary(
        task=config.task.name,
        samples_seen=latest.samples_seen,
        steps=records[-1]["step"],
        loss=records[-1]["loss"],
        seconds=round(sum(record["dt"] for record in records), 3),
        model=folder,
        run_id=run.run_id if config.run.track and (run := tracked_run(out)) else None,
    )
    settings = binding_settings(config)
    _write_json(out / "summary.json", {**asdict(summary), "model": "model", "settings": settings})
    return summary


def has_failure(out: Path) -> bool:
    """Whether an attempt of this start ended in a way that another would repeat."""
    return (out / _FAILURE).exists()


def write_failure(out: Path, error: Exception) -> None:
    """Keep the message of an error that trying again would not mend."""
    _write_json(out / _FAILURE, {"kind": type(error).__name__, "message": str(error)})


def raise_failure(out: Path) -> None:
    """Raise what a worker said cannot be mended by trying again."""
    path = out / _FAILURE
    if path.exists():
        failure = json.loads(path.read_text())
        if failure["kind"] == "TrainingError":
            raise TrainingError(failure["message"])
        raise ValueError(f"{failure['message']} (Log: {out / 'errors.log'})")


def _write_json(path: Path, data: Any) -> None:
    text = json.dumps(data, indent=2, sort_keys=True, default=str) + "\n"
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text)
    os.replace(scratch, path)
