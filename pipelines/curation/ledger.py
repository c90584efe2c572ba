"""What of a plan is done: the folder's lock, its committed shards, the traces of dead attempts."""

import fcntl
import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pipelines import shards
from pipelines.curation.plan import Plan, PlannedShard
from pipelines.schema import ShardRecord

WORK_FOLDER = ".work"
THUMBS_FOLDER = "thumbs"
_LOCK_FILE = ".lock"
# A process that dies on a source is started again; after this many deaths the source is given up.
MAX_DEATHS = 2


class FolderInUseError(ValueError):
    """Another run is writing into the folder."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """A source is done: its verdict, and how many clips it gave."""

    source: str
    verdict: str
    reasons: tuple[str, ...]
    clips: int


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder. The system frees the lock when its process dies.

    Raises:
        FolderInUseError: a living process holds it.
    """
    path = folder / _LOCK_FILE
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            raise FolderInUseError(
                f"{folder} is being written by {holder}: wait for it, stop it, "
                "or give another --out folder."
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def done_shards(folder: Path, plan: Plan) -> dict[str, ShardRecord]:
    """The shards of the plan that are committed and whole; anything else is not done."""
    done = {}
    for shard in plan.shards:
        record = shards.committed(folder, shard.name)
        if record is None or record.config_hash != plan.config_hash:
            continue
        if tuple(source.id for source in record.sources) == shard.sources:
            done[shard.name] = record
    return done


def clean_up(folder: Path, plan: Plan, done: dict[str, ShardRecord]) -> None:
    """Remove what dead attempts left: work folders, tars without a record, damaged shards."""
    shutil.rmtree(folder / WORK_FOLDER, ignore_errors=True)
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
    for shard in plan.shards:
        if shard.name not in done:
            (folder / f"{shard.name}.json").unlink(missing_ok=True)
            (folder / f"{shard.name}.tar").unlink(missing_ok=True)


class RunJournal:
    """Files in a run's work folder by which workers tell the driver, and each other, of progress.

    `events/` has a file a worker process, appended a line a source. `started/` has a file a source
    with a line for each process that began it: lines without an end are processes that died.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self.root = folder / WORK_FOLDER / run
        self._read: dict[Path, int] = {}

    @classmethod
    def create(cls, folder: Path) -> tuple["RunJournal", str]:
        """A fresh journal and the run's name."""
        run = uuid.uuid4().hex
        journal = cls(folder, run)
        (journal.root / "events").mkdir(parents=True)
        (journal.root / "started").mkdir()
        return journal, run

    @contextmanager
    def attempt(self, shard: PlannedShard) -> Iterator[Path]:
        """A folder of its own for one attempt at a shard, removed afterwards."""
        path = self.root / f"{shard.name}.{uuid.uuid4().hex}"
        path.mkdir(parents=True)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def begin(self, source: str) -> int:
        """Note that a source is begun; returns how many processes have died on it before."""
        path = self.root / "started" / source
        deaths = len(path.read_bytes()) if path.exists() else 0
        with path.open("ab") as stream:
            stream.write(b"x")
        return deaths

    def end(self, event: Event, *, given_up: bool = False) -> None:
        """Note that a source is done, and tell the driver; one given up stays so in this run."""
        line = json.dumps([event.source, event.verdict, event.reasons, event.clips])
        with (self.root / "events" / f"{socket.gethostname()}-{os.getpid()}").open("a") as stream:
            stream.write(line + "\n")
        if not given_up:
            (self.root / "started" / event.source).unlink(missing_ok=True)

    def new_events(self) -> list[Event]:
        """What workers have noted since the last call; a repeated shard repeats its sources."""
        events = []
        for path in sorted((self.root / "events").glob("*")):
            with path.open("rb") as stream:
                stream.seek(self._read.get(path, 0))
                data = stream.read()
            # A line without its end is still being written.
            complete = data[: data.rfind(b"\n") + 1]
            self._read[path] = self._read.get(path, 0) + len(complete)
            for line in complete.splitlines():
                source, verdict, reasons, clips = json.loads(line)
                events.append(
                    Event(source=source, verdict=verdict, reasons=tuple(reasons), clips=clips)
                )
        return events

    def close(self) -> None:
        """Remove the run's work folder."""
        shutil.rmtree(self.root, ignore_errors=True)
        with suppress(OSError):
            self.root.parent.rmdir()
