"""The state a run resumes from: one folder, complete or not there.

    samples-000000001000/
      train.json        samples seen, settings, data fingerprint, the guard's memory,
                        size and sha256 of every file
      ema.safetensors   averaged weights (rank 0)
      state/            the engine's: model, and each worker's share of the optimiser

`checkpoint_writer` makes it under another name, and only a rename gives it this one. `train.json`
lists every file of every worker: a folder that storage has damaged all the same does not count.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Container, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from training.config import TrainConfig, binding_settings, changed_settings
from training.engine import convert_state
from training.task import Task

RECORD = "train.json"
AVERAGE = "ema.safetensors"
WRITING = ".writing-"  # then the name: not yet a checkpoint
REMOVING = ".removing-"  # no longer one
_PREFIX = "samples-"
_CONVERTED = "converted-"


class ResumeError(ValueError):
    """A run cannot continue from what lies in its folder."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint folder and its `train.json`."""

    folder: Path
    record: Mapping[str, Any]

    @property
    def samples_seen(self) -> int:
        return self.record["samples_seen"]

    @property
    def world(self) -> int:
        return self.record["world"]

    def needs_conversion(self, world: int) -> bool:
        """Whether the state is shared out among another number of workers."""
        shared_out = self.record["settings"]["run"]["engine"] == "deepspeed"
        return shared_out and world != self.world

    def state_for(self, world: int) -> Path:
        """The folder whose state that many workers can load."""
        if not self.needs_conversion(world):
            return self.folder
        return self.folder.with_name(f"{_CONVERTED}{self.folder.name}")

    def average(self) -> dict[str, Any]:
        """The averaged weights and buffers, fp32, under the model's own names."""
        return load_file(self.folder / AVERAGE)


def checkpoint_name(samples_seen: int) -> str:
    return f"{_PREFIX}{samples_seen:012d}"


def describe_run(
    config: TrainConfig, fingerprint: str, world: int, start: str = ""
) -> dict[str, Any]:
    """What `train.json` says of the run, besides its position and its files.

    Args:
        start: the task's `start_digest`.
    """
    packages = ("torch", "deepspeed", "ray")
    return {
        "seed": config.run.seed,
        "world": world,
        "global_batch": config.batch.global_batch,
        "settings": binding_settings(config),
        "fingerprint": fingerprint,
        "start": start,
        "versions": {name: version(name) for name in packages},
    }


def newest_checkpoint(root: Path, *, thorough: bool = True) -> Checkpoint | None:
    """The newest complete checkpoint under `root`.

    Args:
        thorough: compare contents too, not only names and sizes.
    """
    for folder in _folders(root):
        if fault(folder, thorough=thorough) is None:
            record = json.loads((folder / RECORD).read_text())
            return Checkpoint(folder=folder, record=record)
    return None


def fault(folder: Path, *, thorough: bool = True) -> str | None:
    """Why a folder is no complete checkpoint, in a few words; None where it is one."""
    try:
        record = json.loads((folder / RECORD).read_text())
        files = record["files"].items()
        record["samples_seen"]
    except FileNotFoundError:
        return f"{RECORD} is missing"
    except (ValueError, KeyError, AttributeError):
        return f"{RECORD} is damaged"
    for name, (size, digest) in files:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if thorough and measure(path)[1] != digest:
            return f"{name} has other contents than were written"
    return None


def remove_incomplete(root: Path) -> list[str]:
    """Remove what a kill left behind: folders newer than the newest complete one; a line each."""
    remove_scratch(root)
    remove_converted(root)
    lines = []
    for folder in _folders(root):
        reason = fault(folder)
        if reason is None:
            break
        remove(folder)
        lines.append(f"Checkpoint {folder.name} is not complete ({reason}); removed.")
    return lines


def remove_scratch(root: Path) -> None:
    """Remove what was being written or removed when a kill came; nobody may be writing."""
    for pattern in (f"{WRITING}*", f"{REMOVING}*"):
        for scratch in root.glob(pattern):
            shutil.rmtree(scratch, ignore_errors=True)


def remove_converted(root: Path) -> None:
    """Remove converted states, which serve until the next checkpoint."""
    for folder in root.glob(f"{_CONVERTED}*"):
        shutil.rmtree(folder, ignore_errors=True)


def prune(root: Path, keep: int, best: Container[str] = ()) -> None:
    """Remove all but the newest `keep` checkpoints and those named in `best`."""
    for folder in _folders(root)[keep:]:
        if folder.name not in best:
            remove(folder)


def remove(folder: Path) -> None:
    """Remove a checkpoint in such a way that a kill leaves no part of it under its name."""
    aside = folder.with_name(f"{REMOVING}{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    with suppress(OSError):
        os.replace(folder, aside)
        shutil.rmtree(aside, ignore_errors=True)


def best_checkpoints(root: Path, metric: str, count: int, *, higher_is_better: bool) -> list[str]:
    """Names of the checkpoints whose validation was best, best first.

    Args:
        root: the folder of checkpoints; `validation/NAME/metrics.json` is looked for beside it.
    """
    ranked = []
    for folder in _folders(root):
        path = root.parent / "validation" / folder.name / "metrics.json"
        with suppress(OSError, ValueError, TypeError, KeyError):
            value = float(json.loads(path.read_text())[metric])
            if math.isfinite(value):
                ranked.append((-value if higher_is_better else value, folder.name))
    return [name for _, name in sorted(ranked)[:count]]


def fit_world(checkpoint: Checkpoint, world: int) -> str | None:
    """Convert the state where another number of workers saved it; a line that says so.

    The run goes on from the same state, but sums are taken in another order from there on.
    """
    if not checkpoint.needs_conversion(world):
        return None
    target = checkpoint.state_for(world)
    shutil.rmtree(target, ignore_errors=True)
    convert_state(checkpoint.folder, target)
    return f"{checkpoint.folder.name}: {checkpoint.world} workers' state converted for {world}."


def check_resume(checkpoint: Checkpoint, config: TrainConfig, fingerprint: str) -> None:
    """Refuse to continue a run under other settings or on other data.

    Raises:
        ResumeError: what differs and how to mend it.
    """
    record, name = checkpoint.record, checkpoint.folder.name
    changed = changed_settings(record["settings"], binding_settings(config))
    if changed:
        raise ResumeError(
            f"{name} was trained with other settings ({'; '.join(changed)}): "
            "set them back, or start in an empty folder."
        )
    if record["fingerprint"] != fingerprint:
        raise ResumeError(
            f"{name} was trained on other data (fingerprint {record['fingerprint'][:12]}, given "
            f"{fingerprint[:12]}): give the same data, or start in an empty folder."
        )


def check_start(checkpoint: Checkpoint, task: Task) -> None:
    """Refuse to put the trained weights of a run beside frozen ones of another start.

    Checkpoints of versions that recorded none are taken as they are.

    Raises:
        ResumeError: which start differs and how to mend it.
    """
    recorded = checkpoint.record.get("start")
    if recorded and (given := task.start_digest()) != recorded:
        raise ResumeError(
            f"{checkpoint.folder.name} belongs to other weights than those of task.start: what "
            f"is not trained has the sha256 {given[:12] or 'of nothing'}, expected "
            f"{recorded[:12]}. Give a folder with the weights the run started from, with --set "
            "task.start=DIR; it may lie elsewhere than it did."
        )


def _folders(root: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    if not root.is_dir():
        return []
    return sorted((p for p in root.glob(f"{_PREFIX}*") if p.is_dir()), reverse=True)


def measure(path: Path) -> list[Any]:
    """Size in bytes and sha256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return [path.stat().st_size, digest]
