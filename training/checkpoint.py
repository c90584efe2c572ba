"""The state a run resumes from: one folder, complete or not there.

    samples-000000001000/
      train.json        samples seen, settings, data fingerprint, size and sha256 of every file
      ema.safetensors   averaged weights (rank 0)
      state/            DeepSpeed: model, and each worker's share of the optimiser

Each worker writes its files into a folder of its own and the reporter merges the folders, so a kill
can leave one behind with parts missing. `train.json` lists every file of every worker: a folder
counts only when it matches its list.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file, save_file

from training.config import TrainConfig, binding_settings, changed_settings
from training.ema import WeightAverage
from training.engine import Engine, convert_state

_RECORD = "train.json"
_AVERAGE = "ema.safetensors"
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

    def state_for(self, world: int) -> Path:
        """The folder whose state that many workers can load."""
        if world == self.world:
            return self.folder
        return self.folder.with_name(f"{_CONVERTED}{self.folder.name}")

    def average(self) -> dict[str, Any]:
        """The averaged weights and buffers, fp32, under the model's own names."""
        return load_file(self.folder / _AVERAGE)


def checkpoint_name(samples_seen: int) -> str:
    return f"{_PREFIX}{samples_seen:012d}"


def describe_run(config: TrainConfig, fingerprint: str, world: int) -> dict[str, Any]:
    """What `train.json` says of the run, besides its position and its files."""
    packages = ("torch", "deepspeed", "ray")
    return {
        "seed": config.run.seed,
        "world": world,
        "global_batch": config.batch.global_batch,
        "settings": binding_settings(config),
        "fingerprint": fingerprint,
        "versions": {name: version(name) for name in packages},
    }


def write_checkpoint(
    folder: Path, engine: Engine, average: WeightAverage, record: Mapping[str, Any]
) -> None:
    """Write one worker's files into its own empty folder; every worker calls it."""
    engine.save(folder)
    state = average.state()
    if engine.rank == 0:
        save_file(state, folder / _AVERAGE)
    mine = {
        path.relative_to(folder).as_posix(): _measure(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    parts: list[Any] = [None] * engine.world
    dist.all_gather_object(parts, mine)
    if engine.rank == 0:
        files = {name: entry for part in parts for name, entry in part.items()}
        text = json.dumps({**record, "files": files}, indent=1, sort_keys=True)
        (folder / _RECORD).write_text(text)


def read_checkpoint(checkpoint: Checkpoint, engine: Engine, average: WeightAverage) -> None:
    """Take over model, optimiser and average; every worker calls it."""
    engine.load(checkpoint.state_for(engine.world))
    average.load(checkpoint.average() if engine.rank == 0 else {})


def newest_checkpoint(root: Path, *, thorough: bool = True) -> Checkpoint | None:
    """The newest complete checkpoint under `root`.

    Args:
        thorough: compare contents too, not only names and sizes.
    """
    for folder in _folders(root):
        if fault(folder, thorough=thorough) is None:
            record = json.loads((folder / _RECORD).read_text())
            return Checkpoint(folder=folder, record=record)
    return None


def fault(folder: Path, *, thorough: bool = True) -> str | None:
    """Why a folder is no complete checkpoint, in a few words; None where it is one."""
    try:
        record = json.loads((folder / _RECORD).read_text())
        files = record["files"].items()
        record["samples_seen"]
    except FileNotFoundError:
        return f"{_RECORD} is missing"
    except (ValueError, KeyError, AttributeError):
        return f"{_RECORD} is damaged"
    for name, (size, digest) in files:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if thorough and _measure(path)[1] != digest:
            return f"{name} has other contents than were written"
    return None


def remove_incomplete(root: Path) -> list[str]:
    """Remove what a kill left behind: folders newer than the newest complete one; a line each."""
    for pattern in (".writing-*", f"{_CONVERTED}*"):
        for scratch in root.glob(pattern):
            shutil.rmtree(scratch, ignore_errors=True)
    lines = []
    for folder in _folders(root):
        reason = fault(folder)
        if reason is None:
            break
        shutil.rmtree(folder)
        lines.append(f"Checkpoint {folder.name} is not complete ({reason}); removed.")
    return lines


def prune(root: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for folder in _folders(root)[keep:]:
        shutil.rmtree(folder, ignore_errors=True)


def fit_world(checkpoint: Checkpoint, world: int) -> str | None:
    """Convert the state where another number of workers saved it; a line that says so.

    The run goes on from the same state, but sums are taken in another order from there on.
    """
    target = checkpoint.state_for(world)
    if target == checkpoint.folder:
        return None
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


def _folders(root: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    if not root.is_dir():
        return []
    return sorted((p for p in root.glob(f"{_PREFIX}*") if p.is_dir()), reverse=True)


def _measure(path: Path) -> list[Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return [path.stat().st_size, digest]
