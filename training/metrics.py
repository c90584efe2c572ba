"""The log of a run: one JSON line a step in `metrics.jsonl`, and how a line reads on a console."""

import fcntl
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

Record = dict[str, Any]


class MetricsLog:
    """Appends records to `metrics.jsonl`, from the position where the run continues.

    Lines beyond that position belong to steps that will be run again, and are cut off. The file
    is locked while it is open: a worker that outlives its killed driver must not write into it.
    """

    def __init__(self, path: Path, samples_seen: int, *, patience: float = 60.0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        _lock(self._file, path, patience)
        self._file.seek(0)
        end = 0
        for line in self._file:
            record = _parse(line)
            if record is None or record["samples_seen"] > samples_seen:
                break
            end += len(line)
        self._file.truncate(end)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; it survives a kill of this process."""
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[Record]:
    """All complete records of a run."""
    if not path.exists():
        return []
    records = (_parse(line) for line in path.read_bytes().splitlines(keepends=True))
    return [record for record in records if record is not None]


class MetricsTail:
    """Follows a growing `metrics.jsonl`; `new()` gives the records since the last call."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0

    def new(self) -> Iterator[Record]:
        if not self._path.exists():
            return
        self._offset = min(self._offset, self._path.stat().st_size)
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                record = _parse(line)
                if record is None:
                    return
                self._offset += len(line)
                yield record


class Progress(Protocol):
    """What a driver shows while workers train."""

    def note(self, text: str) -> None:
        """Something happened that the user should know."""

    def step(self, record: Record) -> None:
        """A step was logged."""


class Quiet:
    """Shows nothing."""

    def note(self, text: str) -> None: ...

    def step(self, record: Record) -> None: ...


class Console:
    """A progress bar, and above it a line every `log_every` steps."""

    def __init__(self, num_steps: int, log_every: int) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        self._num_steps, self._log_every = num_steps, log_every
        self._console = RichConsole(stderr=True, highlight=False, soft_wrap=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._bar = Bar(*columns, console=self._console, transient=True)
        self._task = self._bar.add_task("starting", total=num_steps)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def note(self, text: str) -> None:
        self._console.print(text)

    def step(self, record: Record) -> None:
        step = record["step"]
        self._bar.update(self._task, completed=step, description=f"loss {record['loss']:.4f}")
        if step % self._log_every == 0 or step == self._num_steps:
            self._console.print(format_line(record, self._num_steps))


def format_line(record: Mapping[str, Any], num_steps: int) -> str:
    """`step 00010/01000 (1.0%) | loss 0.1234 | grad 1.2 | lr 1.0e-03 | … | eta 03:21`."""
    step = record["step"]
    seconds = (num_steps - step) * record["dt"]
    parts = [
        f"step {step:05d}/{num_steps:05d} ({100 * step / num_steps:.1f}%)",
        f"loss {record['loss']:.4f}",
        f"grad {record['grad_norm']:.2g}",
        f"lr {record['lr']:.1e}",
        f"{record['samples_per_second']:.1f} samples/s",
        f"data {100 * record['data_wait'] / max(record['dt'], 1e-9):.0f}%",
        f"mem {record['memory_gb']:.1f} GB",
        f"pos {record['epoch']:.2f}",
        f"eta {_clock(seconds)}",
    ]
    return " | ".join(parts)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:02d}:{seconds:02d}"


def _parse(line: bytes) -> Record | None:
    """The record of a complete line; None for a torn one."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "samples_seen" in record else None


def _lock(file: Any, path: Path, patience: float) -> None:
    deadline = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{path} is being written by another run (this is process {os.getpid()}): "
                    "stop that run, or choose another folder."
                ) from None
            time.sleep(0.2)
