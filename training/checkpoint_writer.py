"""Writes checkpoints beside the training: copied at once, written in a thread, then renamed.

    .writing-samples-000000001000/
      rank-0/ rank-1/ …   each worker's files; a folder each, since nobody may write into another's
      whole/              rank 0 brings them together here and writes `train.json`

Every worker copies its share to host memory, which holds training up, and hands the copy to a
thread. Once all threads are done, rank 0 moves the files together and renames `whole` to the
checkpoint's name. A kill before the rename leaves only scratch. All of it lies on the storage that
the workers share, so nothing is copied twice.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from training import checkpoint as ckpt
from training.engine import Engine

Files = dict[str, list[Any]]  # size and sha256 by name


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time; every worker has one.

    `start` and `finish` are collective; every worker calls them at the same step.

    Args:
        root: the folder of checkpoints.
        tidy: removes old checkpoints; called on rank 0, in a thread, after each new one.
    """

    def __init__(self, root: Path, engine: Engine, tidy: Callable[[], None]) -> None:
        self._root, self._engine, self._tidy = root, engine, tidy
        self._pending: tuple[str, Mapping[str, Any], Future[Files]] | None = None
        # One thread: removing the old waits for nothing, and the next write waits for it.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        if engine.rank == 0:
            ckpt.remove_scratch(root)  # of workers that were killed

    @property
    def pending(self) -> bool:
        """Whether a checkpoint was started and not finished: the same on every worker."""
        return self._pending is not None

    @property
    def done(self) -> bool:
        """Whether this worker's thread has nothing left to write."""
        return self._pending is None or self._pending[2].done()

    def start(self, average: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Copy this worker's state and begin to write it; one is not begun before another's end.

        Args:
            average: the averaged weights, on the CPU; written by rank 0, from this very copy.
            record: what `train.json` says, besides the files; `samples_seen` gives the name.
        """
        if self._pending is not None:
            raise RuntimeError("finish the checkpoint that is pending first")
        name = ckpt.checkpoint_name(record["samples_seen"])
        folder = self._root / f"{ckpt.WRITING}{name}" / f"rank-{self._engine.rank}"
        write = self._engine.snapshot()
        future = self._thread.submit(_write, folder, write, average)
        self._pending = name, record, future

    def finish(self) -> str | None:
        """Wait for the threads of all workers and commit.

        Returns:
            Why the checkpoint was given up; None where it is there.
        """
        if self._pending is None:
            return None
        name, record, future = self._pending
        self._pending = None
        mine: Files | str
        try:
            mine = future.result()
        except Exception as error:  # a full disk has many names: OSError, RuntimeError of torch, …
            mine = _sentence(error)
        engine, parts = self._engine, [mine] * self._engine.world
        dist.all_gather_object(parts, mine)
        outcome: list[str | None] = [None]
        if engine.rank == 0:
            outcome = [self._commit(name, record, parts)]
        dist.broadcast_object_list(outcome, src=0)
        return outcome[0]

    def _commit(self, name: str, record: Mapping[str, Any], parts: list[Files | str]) -> str | None:
        scratch = self._root / f"{ckpt.WRITING}{name}"
        try:
            if failed := next((part for part in parts if isinstance(part, str)), None):
                return failed
            whole = scratch / "whole"
            files = _bring_together(scratch, whole, [p for p in parts if isinstance(p, dict)])
            text = json.dumps({**record, "files": files}, indent=1, sort_keys=True)
            with (whole / ckpt.RECORD).open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            _sync_folders([whole, *(path for path in whole.rglob("*") if path.is_dir())])
            if (self._root / name).exists():
                ckpt.remove(self._root / name)  # a damaged one, else the run had gone on from it
            os.rename(whole, self._root / name)
            _sync_folders([self._root])
        except OSError as error:
            return _sentence(error)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        self._thread.submit(self._tidy)
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True)


def _write(folder: Path, write: Callable[[Path], None], average: Mapping[str, Tensor]) -> Files:
    """Write one worker's files and see that they are on the disk; none is left if that fails."""
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was killed
    try:
        folder.mkdir(parents=True)
        write(folder)
        if average:
            save_file(dict(average), folder / ckpt.AVERAGE)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in paths:
            with path.open("r+b") as file:
                os.fsync(file.fileno())
        return {path.relative_to(folder).as_posix(): ckpt.measure(path) for path in paths}
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # what it took is needed
        raise


def _bring_together(scratch: Path, whole: Path, parts: list[Files]) -> Files:
    """Move the workers' files into one folder.

    Raises:
        OSError: a file is not there, as where the workers do not share the storage.
    """
    shutil.rmtree(whole, ignore_errors=True)
    files: Files = {}
    for rank, part in enumerate(parts):
        for name, entry in part.items():
            source, target = scratch / f"rank-{rank}" / name, whole / name
            if not source.is_file() or source.stat().st_size != entry[0]:
                raise OSError(
                    f"rank 0 does not see {source.relative_to(scratch)}: the run's folder must be "
                    "on storage that all workers share"
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(source, target)
            files[name] = entry
    return files


def _sync_folders(folders: Iterable[Path]) -> None:
    """Make the names in them last through a loss of power, where the file system can."""
    for folder in folders:
        with suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _sentence(error: BaseException) -> str:
    """The error in a line: the system's own, where a library hides it behind one of its own."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    error = cause or error
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
