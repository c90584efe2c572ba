"""What of a plan is done: the folder's lock, its committed shards, the traces of dead attempts."""

import fcntl
import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from pipelines import schema
from pipelines.curation import commits
from pipelines.curation.commits import Commit
from pipelines.curation.plan import Plan, PlannedShard
from pipelines.damaged import set_aside
from pipelines.shards import sha256_file

WORK_FOLDER = ".work"
THUMBS_FOLDER = "thumbs"
_LOCK_FILE = ".lock"
# A process that dies on a source is started again; after this many deaths the source is given up.
# Videos are decoded in processes of their own, so it is hardly ever the source that kills this one.
MAX_DEATHS = 4
_READERS = 8


class FolderInUseError(ValueError):
    """Another run is writing into the folder."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """A source is done: its verdict, and how many clips it gave.

    kind: of a failure (`permanent`, `transient`, `timeout`, …); None where it did not fail.
    seconds: of wall time in each stage; video_seconds: how long the source is.
    """

    source: str
    verdict: str
    reasons: tuple[str, ...]
    clips: int
    kind: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    video_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class DoneShards:
    """What of a plan is committed and whole.

    names: of the shards that are done.
    stale: of those whose sources are the plan's but whose settings were others; what they hold
        may be taken over.
    failed, not_stored: of those done with a source that failed, or a clip that was never stored.
    totals: over the shards that are done: sources `kept`, `rejected` and `failed`, `clips` kept,
        `bytes` of their tars.
    """

    names: frozenset[str] = frozenset()
    stale: frozenset[str] = frozenset()
    failed: tuple[str, ...] = ()
    not_stored: tuple[str, ...] = ()
    totals: Mapping[str, int] = field(default_factory=dict)

    def todo(self, plan: Plan) -> list[PlannedShard]:
        """The shards that are not done, in order."""
        return [shard for shard in plan.shards() if shard.name not in self.names]


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


def scan_done(folder: Path, plan: Plan, *, keep_cache: bool = True) -> DoneShards:
    """Look which shards of the plan are done.

    A shard is done when its record parses, its settings and sources are the plan's, and its tar has
    the recorded size and is not newer than the record (else its SHA-256 decides). What records say
    is kept in a cache (`pipelines.curation.commits`), so that they need not be read each time;
    without `keep_cache` nothing is written.

    Raises:
        RunError: a record or a tar is there and cannot be read.
    """
    records, tars = _shard_files(folder, plan)
    cached, is_clean = commits.read_cache(folder)
    fresh = {
        name: commit
        for name, commit in cached.items()
        if name in records and commit.is_of(records[name])
    }
    unread = sorted(records.keys() - fresh.keys())
    # Threads hide the latency of a shared file system.
    with ThreadPoolExecutor(max_workers=_READERS) as pool:
        for commit in pool.map(lambda name: commits.read_commit(folder, name), unread):
            if commit is not None:
                fresh[commit.name] = commit
        candidates = [fresh[name] for name in sorted(fresh) if _is_planned(fresh[name], plan)]
        checked = list(
            pool.map(lambda commit: _check_tar(folder, commit, tars.get(commit.name)), candidates)
        )
    whole = [commit for commit in checked if commit is not None]
    fresh.update({commit.name: commit for commit in whole})
    if keep_cache and (not is_clean or fresh != cached):
        # A folder that only its owner may write in can still be looked at.
        with suppress(OSError):
            commits.write_cache(folder, fresh.values())
    return _summary(whole, plan)


def clean_up(folder: Path, plan: Plan, done: DoneShards) -> DoneShards:
    """Remove what dead attempts left: work folders and tars without a record.

    Repacked shards that were complete when their run died are put in their places first. Damaged
    shards are moved into DIR/damaged/.

    Returns:
        what is done afterwards: `done`, or more where shards were put in place.
    """
    from pipelines.curation.repack import roll_forward

    if roll_forward(folder):
        done = scan_done(folder, plan)
    shutil.rmtree(folder / WORK_FOLDER, ignore_errors=True)
    kept = done.names | done.stale
    lost: set[str] = set()
    with os.scandir(folder) as entries:
        for entry in entries:
            name, _, suffix = entry.name.rpartition(".")
            is_temporary = name.startswith(".") and suffix == "tmp"
            is_shard = suffix in ("tar", "json") and _index(name, plan) is not None
            if is_temporary:
                Path(entry.path).unlink(missing_ok=True)
            elif is_shard and name not in kept:
                lost.add(name)
    for name in sorted(lost):
        set_aside(folder, name)
    return done


def _shard_files(
    folder: Path, plan: Plan
) -> tuple[dict[str, os.stat_result], dict[str, os.stat_result]]:
    """The records and the tars of the plan's shards that are there, by the shard's name."""
    found: dict[str, dict[str, os.stat_result]] = {"json": {}, "tar": {}}
    with os.scandir(folder) as entries:
        for entry in entries:
            name, _, suffix = entry.name.rpartition(".")
            if suffix in found and _index(name, plan) is not None:
                # A file that is taken away meanwhile is not there.
                try:
                    found[suffix][name] = entry.stat()
                except FileNotFoundError:
                    continue
                except OSError as error:
                    raise commits.unreadable(Path(entry.path), error) from None
    return found["json"], found["tar"]


def _index(name: str, plan: Plan) -> int | None:
    """The number of a shard of the plan; None for any other name."""
    try:
        index = schema.shard_index(name)
    except schema.ShardError:
        return None
    return index if index < plan.num_shards and schema.shard_name(index) == name else None


def _is_planned(commit: Commit, plan: Plan) -> bool:
    index = _index(commit.name, plan)
    return index is not None and commit.rows == commits.hash_rows(plan.shard_ids(index))


def _check_tar(folder: Path, commit: Commit, tar: os.stat_result | None) -> Commit | None:
    """The commit, if the tar is the one it is of."""
    if tar is None or tar.st_size != commit.tar_bytes:
        return None
    if tar.st_mtime_ns <= commit.json_mtime_ns or tar.st_mtime_ns == commit.tar_checked_ns:
        return commit
    try:
        if sha256_file(folder / f"{commit.name}.tar") != commit.tar_sha256:
            return None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise commits.unreadable(folder / f"{commit.name}.tar", error) from None
    return replace(commit, tar_checked_ns=tar.st_mtime_ns)


def _summary(whole: list[Commit], plan: Plan) -> DoneShards:
    done = [commit for commit in whole if commit.config_hash == plan.config_hash]
    names = frozenset(commit.name for commit in done)
    return DoneShards(
        names=names,
        stale=frozenset(commit.name for commit in whole) - names,
        failed=tuple(commit.name for commit in done if commit.failed),
        not_stored=tuple(commit.name for commit in done if commit.not_stored),
        totals={
            "kept": sum(commit.kept for commit in done),
            "rejected": sum(commit.rejected for commit in done),
            "failed": sum(commit.failed for commit in done),
            "clips": sum(commit.clips for commit in done),
            "bytes": sum(commit.tar_bytes for commit in done),
        },
    )


class RunJournal:
    """Files in a run's work folder by which workers tell the driver, and each other, of progress.

    `events/` has a file a worker process, appended a line a source. `started/` has a file a source
    with a line for each process that began it: lines without an end are processes that died.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self.root = folder / WORK_FOLDER / run
        self._read: dict[str, int] = {}
        # Process numbers come again; a line cut off by a death must stay the last of its file.
        self._name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"

    @classmethod
    def create(cls, folder: Path) -> tuple["RunJournal", str]:
        """A fresh journal and the run's name."""
        run = uuid.uuid4().hex
        journal = cls(folder, run)
        (journal.root / "events").mkdir(parents=True)
        (journal.root / "started").mkdir()
        return journal, run

    def is_there(self) -> bool:
        """Whether this machine sees what `create` made."""
        return (self.root / "started").is_dir()

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
        line = json.dumps(asdict(event), separators=(",", ":"))
        with (self.root / "events" / self._name).open("a") as stream:
            stream.write(line + "\n")
        if not given_up:
            (self.root / "started" / event.source).unlink(missing_ok=True)

    def new_events(self) -> list[Event]:
        """What workers have noted since the last call; a repeated shard repeats its sources."""
        events = []
        with os.scandir(self.root / "events") as entries:
            grown = [
                entry.path
                for entry in entries
                if entry.stat().st_size > self._read.get(entry.path, 0)
            ]
        for path in sorted(grown):
            with open(path, "rb") as stream:
                stream.seek(self._read.get(path, 0))
                data = stream.read()
            # A line without its end is still being written.
            complete = data[: data.rfind(b"\n") + 1]
            self._read[path] = self._read.get(path, 0) + len(complete)
            for line in complete.splitlines():
                entry = json.loads(line)
                events.append(Event(**entry | {"reasons": tuple(entry["reasons"])}))
        return events

    def close(self) -> None:
        """Remove the run's work folder."""
        shutil.rmtree(self.root, ignore_errors=True)
        with suppress(OSError):
            self.root.parent.rmdir()
