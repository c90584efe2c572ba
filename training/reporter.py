"""Where checkpoints go: through Ray Train, or straight to disk for one process without Ray."""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import psutil

_SCRATCH = "animator-checkpoint-"  # then the process that writes there; a killed one leaves it


class Reporter(Protocol):
    """Commits a checkpoint; every worker calls `save` the same number of times."""

    def save(
        self, name: str, write: Callable[[Path], None], metrics: Mapping[str, Any]
    ) -> None: ...


class RayReporter:
    """Hands each worker's files to Ray Train, which merges them in the run's storage."""

    def __init__(self) -> None:
        for left in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
            process = left.name.removeprefix(_SCRATCH).partition("-")[0]
            if process.isdigit() and not psutil.pid_exists(int(process)):
                shutil.rmtree(left, ignore_errors=True)

    def save(self, name: str, write: Callable[[Path], None], metrics: Mapping[str, Any]) -> None:
        import ray.train

        # A folder a worker: workers of one node that share one delete it under each other.
        with tempfile.TemporaryDirectory(prefix=f"{_SCRATCH}{os.getpid()}-") as scratch:
            write(Path(scratch))
            ray.train.report(
                dict(metrics),
                checkpoint=ray.train.Checkpoint.from_directory(scratch),
                checkpoint_dir_name=name,
            )


class LocalReporter:
    """One process: written beside its final place, then renamed."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def save(self, name: str, write: Callable[[Path], None], metrics: Mapping[str, Any]) -> None:
        self._root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=self._root) as scratch:
            folder = Path(scratch) / name
            folder.mkdir()
            write(folder)
            shutil.rmtree(self._root / name, ignore_errors=True)
            os.replace(folder, self._root / name)
