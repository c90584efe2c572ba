"""The log of a run: one JSON line a step in `metrics.jsonl`, and how a line reads on a console.

What belongs to the machine and the moment and not to the run's result has its names in `TIMINGS`.
"""

import fcntl
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, Self

Record = dict[str, Any]

TIMINGS = frozenset(
    "dt data_wait compute optimiser other samples_per_second mfu memory_gb eta".split()
)


class Appender:
    """Appends JSON lines to a file; what a full disk refuses is written once there is room.

    Every line is handed to the system at once, so that it survives a kill of this process.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: int | None = None
        self._waiting = b""
        self._open()

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append one entry; never raises an OSError."""
        self._waiting += json.dumps(entry).encode() + b"\n"
        self._flush()

    def sync(self) -> None:
        """See to it that what was appended survives a loss of power, where there is room."""
        self._flush()
        if self._handle is not None:
            with suppress(OSError):
                os.fsync(self._handle)

    def close(self) -> None:
        self._flush()
        if self._handle is not None:
            with suppress(OSError):  # some storage reports a full disk only here
                os.close(self._handle)
            self._handle = None

    def _open(self) -> None:
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def _flush(self) -> None:
        if self._handle is None:
            self._open()
        with suppress(OSError):
            while self._waiting and self._handle is not None:
                # A disk that is nearly full takes a part; the rest of the line follows later.
                self._waiting = self._waiting[os.write(self._handle, self._waiting) :]


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
        self._lines = Appender(path)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; it survives a kill of this process."""
        self._lines.write(record)

    def sync(self) -> None:
        """See to it that a checkpoint made now does not outlive the records before it."""
        self._lines.sync()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._file.close()


def read_metrics(path: Path) -> list[Record]:
    """All complete records of a run."""
    return read_lines(path, "samples_seen")


def read_lines(path: Path, key: str) -> list[Record]:
    """All complete entries of a file of JSON lines that have this key."""
    if not path.exists():
        return []
    records = (_parse(line, key) for line in path.read_bytes().splitlines(keepends=True))
    return [record for record in records if record is not None]


class MetricsTail:
    """Follows a growing file of JSON lines; `new()` gives the entries since the last call.

    Args:
        key: what every entry has; a line without it is not complete.
    """

    def __init__(self, path: Path, key: str = "samples_seen") -> None:
        self._path, self._key = path, key
        self._offset = path.stat().st_size if path.exists() else 0

    def new(self) -> Iterator[Record]:
        if not self._path.exists():
            return
        self._offset = min(self._offset, self._path.stat().st_size)
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                record = _parse(line, self._key)
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
        self._bar.update(self._task, completed=step, description=f"loss {_loss(record)}")
        if step % self._log_every == 0 or step == self._num_steps:
            self._console.print(format_line(record, self._num_steps))


def format_line(record: Mapping[str, Any], num_steps: int) -> str:
    """`step 00010/01000 (1.0%) | loss 0.1234 | grad 1.2 | lr 1.0e-03 | … | eta 03:21`."""
    step, norm = record["step"], record["grad_norm"]
    parts = [
        f"step {step:05d}/{num_steps:05d} ({100 * step / num_steps:.1f}%)",
        f"loss {_loss(record)}",
        f"grad {'–' if norm is None else format(norm, '.2g')}",
        f"lr {record['lr']:.1e}",
        f"{record['samples_per_second']:.1f} samples/s",
        f"data {100 * record['data_wait'] / max(record['dt'], 1e-9):.0f}%",
        f"mem {record['memory_gb']:.1f} GB",
        f"pos {record['epoch']:.2f}",
        f"eta {_clock(record['eta'])}",
    ]
    if record.get("mfu") is not None:
        parts.insert(5, f"mfu {100 * record['mfu']:.1f}%")
    if record.get("skipped"):
        parts.append(f"left out {record['skipped']}")
    return " | ".join(parts)


def _loss(record: Mapping[str, Any]) -> str:
    return "–" if record["loss"] is None else f"{record['loss']:.4f}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:02d}:{seconds:02d}"


def _parse(line: bytes, key: str = "samples_seen") -> Record | None:
    """The record of a complete line; None for a torn one."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and key in record else None


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
