"""The durable job store: one SQLite file that knows every job and who may work on it.

A job is `queued`, then `in_progress` under a lease, then `completed` or `failed`. Each start of a
job takes the next attempt number; that number is the fencing token, and a worker whose token is no
longer the job's can write nothing, however late it wakes up. A row is on disk when a method returns
(WAL, synchronous=FULL). `history` keeps every change for good, those of deleted jobs too.
"""

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from inference.requests import AnimationOptions
from inference.serving.job import IdempotencyError, Job, LeaseLostError, StoreError, job_of

SCHEMA_VERSION = 1
MAX_ATTEMPTS = 5
BUSY_SECONDS = 30.0
STATUSES = ("queued", "in_progress", "completed", "failed")

_SCHEMA = """
CREATE TABLE jobs (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    status TEXT NOT NULL CHECK (status IN ('queued', 'in_progress', 'completed', 'failed')),
    options TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    idempotency_key TEXT UNIQUE,
    progress REAL NOT NULL DEFAULT 0,
    stage TEXT NOT NULL DEFAULT '',
    attempt INTEGER NOT NULL DEFAULT 0,
    lost INTEGER NOT NULL DEFAULT 0,
    owner TEXT,
    lease_until REAL,
    error_code TEXT,
    error_message TEXT,
    created_at REAL NOT NULL,
    completed_at REAL
);
CREATE INDEX jobs_by_status ON jobs (status, sequence);
CREATE TABLE boot (only INTEGER PRIMARY KEY CHECK (only = 1), name TEXT NOT NULL);
CREATE TABLE history (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    job_id TEXT NOT NULL,
    event TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    at REAL NOT NULL
);
CREATE INDEX history_by_job ON history (job_id, number);
"""


class JobStore:
    """Jobs in one SQLite file, shared by the threads and processes of one machine."""

    def __init__(self, path: Path, *, max_attempts: int = MAX_ATTEMPTS) -> None:
        self.max_attempts = max_attempts
        self._lock = threading.Lock()
        self._db = sqlite3.connect(
            path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        self._db.row_factory = sqlite3.Row
        try:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._migrate(path)
        except sqlite3.DatabaseError as error:
            raise StoreError(f"{path}: no job store ({error}); give another data folder") from None

    def _migrate(self, path: Path) -> None:
        with self._write() as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                for statement in filter(str.strip, _SCHEMA.split(";")):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            elif version != SCHEMA_VERSION:
                raise StoreError(
                    f"{path}: schema {version}, expected {SCHEMA_VERSION}; "
                    "use the version of animator that wrote it, or another data folder"
                )

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        """One transaction that holds the write lock from its start: what it reads stays true."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _read(self, query: str, values: tuple[Any, ...] = ()) -> list[sqlite3.Row]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def close(self) -> None:
        """Close the file; committed rows stay."""
        self._db.close()

    def create(
        self, job_id: str, options: AnimationOptions, fingerprint: str, key: str | None = None
    ) -> tuple[Job, bool]:
        """Commit a queued job; the row and True, or the earlier job of the same key and False.

        Raises IdempotencyError where the key was used with another fingerprint.
        """
        with self._write() as db:
            if key is not None:
                row = db.execute("SELECT * FROM jobs WHERE idempotency_key = ?", (key,)).fetchone()
                if row is not None and row["fingerprint"] != fingerprint:
                    raise IdempotencyError(
                        "this Idempotency-Key was used with other files or options; "
                        "send a new key with a new request"
                    )
                if row is not None:
                    return job_of(row), False
            row = db.execute(
                "INSERT INTO jobs (id, status, options, fingerprint, idempotency_key, created_at)"
                " VALUES (?, 'queued', ?, ?, ?, ?) RETURNING *",
                (job_id, json.dumps(asdict(options)), fingerprint, key, time.time()),
            ).fetchone()
            _log(db, row, "created")
            return job_of(row), True

    def get(self, job_id: str) -> Job | None:
        """The job, or None where there is none of that id."""
        rows = self._read("SELECT * FROM jobs WHERE id = ?", (job_id,))
        return job_of(rows[0]) if rows else None

    def page(self, *, limit: int, after: Job | None = None, ascending: bool = False) -> list[Job]:
        """Up to `limit` jobs by time of creation, those beyond `after` where it is given."""
        sign, order = (">", "ASC") if ascending else ("<", "DESC")
        where, values = (
            ("", ()) if after is None else (f"WHERE sequence {sign} ?", (after.sequence,))
        )
        rows = self._read(
            f"SELECT * FROM jobs {where} ORDER BY sequence {order} LIMIT ?", (*values, limit)
        )
        return [job_of(row) for row in rows]

    def counts(self) -> dict[str, int]:
        """How many jobs stand in each status."""
        rows = self._read("SELECT status, COUNT(*) AS n FROM jobs GROUP BY status")
        return dict.fromkeys(STATUSES, 0) | {row["status"]: row["n"] for row in rows}

    def history(self, job_id: str) -> list[tuple[str, int]]:
        """(event, attempt) of everything that happened to a job, oldest first."""
        query = "SELECT event, attempt FROM history WHERE job_id = ? ORDER BY number"
        return [(row["event"], row["attempt"]) for row in self._read(query, (job_id,))]

    def delete(self, job_id: str) -> bool:
        """Remove a job in any status; its worker finds its lease lost. False if there is none."""
        with self._write() as db:
            row = db.execute("DELETE FROM jobs WHERE id = ? RETURNING *", (job_id,)).fetchone()
            if row is not None:
                _log(db, row, "deleted")
            return row is not None

    def claim(self, owner: str, lease_seconds: float) -> Job | None:
        """Take the oldest queued job under a lease and the next attempt number, or None.

        `owner` is "boot/name". Raises LeaseLostError where another server has taken over: workers
        of a killed server live on for some seconds and must not start anything.
        """
        if not self._read("SELECT 1 FROM jobs WHERE status = 'queued' LIMIT 1"):
            return None  # an idle worker never takes the write lock
        with self._write() as db:
            boot = db.execute("SELECT name FROM boot").fetchone()
            if boot is not None and boot["name"] != _boot(owner):
                raise LeaseLostError(f"{owner}: server {boot['name']} has taken over")
            row = db.execute(
                "UPDATE jobs SET status = 'in_progress', attempt = attempt + 1, owner = ?,"
                " lease_until = ?, progress = 0, stage = '' WHERE sequence ="
                " (SELECT MIN(sequence) FROM jobs WHERE status = 'queued') RETURNING *",
                (owner, time.time() + lease_seconds),
            ).fetchone()
            if row is None:
                return None
            _log(db, row, "started")
            return job_of(row)

    def renew(self, job: Job, lease_seconds: float, progress: float, stage: str) -> None:
        """Keep the lease and note the progress (0..1); raises LeaseLostError."""
        with self._write() as db:
            self._held(db, job)
            db.execute(
                "UPDATE jobs SET lease_until = ?, progress = MAX(progress, ?), stage = ?"
                " WHERE id = ?",
                (time.time() + lease_seconds, min(max(progress, 0.0), 1.0), stage[:80], job.id),
            )

    def complete(self, job: Job, publish: Callable[[], None]) -> None:
        """Publish the output and commit the job as completed, if this worker still holds it.

        `publish` runs inside the transaction: no other worker can start or finish the job between
        the check of the token and the rename. Raises LeaseLostError, and then nothing is published.
        """
        with self._write() as db:
            row = self._held(db, job)
            publish()
            _finish(db, row, "completed")

    def fail(self, job: Job, code: str, message: str) -> None:
        """Commit the job as failed with a reason; raises LeaseLostError."""
        with self._write() as db:
            _finish(db, self._held(db, job), "failed", code, message)

    def release(self, job: Job) -> None:
        """Give the job back to the queue: the worker stops, the job is not to blame."""
        with self._write() as db:
            _requeue(db, self._held(db, job), "released")

    def take_over(self, boot: str, finished: Callable[[str], bool]) -> list[Job]:
        """Make `boot` the one server whose workers may start jobs, and recover all others' jobs."""
        with self._write() as db:
            db.execute("INSERT OR REPLACE INTO boot VALUES (1, ?)", (boot,))
            return self._recover(db, lambda row: _boot(row["owner"]) != boot, finished)

    def recover(
        self, owner: str | None = None, finished: Callable[[str], bool] = lambda job_id: False
    ) -> list[Job]:
        """Take jobs from workers that are gone: from `owner`, or with leases run out.

        A job whose output is already in place (`finished`) is completed; one whose workers died
        `max_attempts` times is failed; the others are queued again. Returns the jobs as they were.
        """
        now = time.time()
        with self._write() as db:
            return self._recover(
                db,
                lambda row: row["lease_until"] < now if owner is None else row["owner"] == owner,
                finished,
            )

    def _recover(
        self,
        db: sqlite3.Connection,
        gone: Callable[[sqlite3.Row], bool],
        finished: Callable[[str], bool],
    ) -> list[Job]:
        running = db.execute("SELECT * FROM jobs WHERE status = 'in_progress'").fetchall()
        rows = [row for row in running if gone(row)]
        for row in rows:
            if finished(row["id"]):
                _finish(db, row, "completed")
            elif row["lost"] + 1 >= self.max_attempts:
                message = (
                    f"the engine died or stopped answering {self.max_attempts} times on this "
                    "job; see the server's log, then send it again"
                )
                _finish(db, row, "failed", "engine_lost", message)
            else:
                _requeue(db, row, "lost")
        return [job_of(row) for row in rows]

    def _held(self, db: sqlite3.Connection, job: Job) -> sqlite3.Row:
        row = db.execute(
            "SELECT * FROM jobs WHERE id = ? AND attempt = ? AND status = 'in_progress'",
            (job.id, job.attempt),
        ).fetchone()
        if row is None:
            raise LeaseLostError(f"{job.id}: attempt {job.attempt} no longer holds the job")
        return row


def _boot(owner: str) -> str:
    return owner.partition("/")[0]


def _finish(
    db: sqlite3.Connection,
    row: sqlite3.Row,
    status: str,
    code: str | None = None,
    message: str | None = None,
) -> None:
    db.execute(
        "UPDATE jobs SET status = ?, error_code = ?, error_message = ?, completed_at = ?,"
        " owner = NULL, lease_until = NULL, stage = '',"
        " progress = CASE ? WHEN 'completed' THEN 1 ELSE progress END WHERE id = ?",
        (status, code, message, time.time(), status, row["id"]),
    )
    _log(db, row, status)


def _requeue(db: sqlite3.Connection, row: sqlite3.Row, event: str) -> None:
    db.execute(
        "UPDATE jobs SET status = 'queued', owner = NULL, lease_until = NULL, progress = 0,"
        " stage = '', lost = lost + ? WHERE id = ?",
        (event == "lost", row["id"]),
    )
    _log(db, row, event)


def _log(db: sqlite3.Connection, row: sqlite3.Row, event: str) -> None:
    db.execute(
        "INSERT INTO history (job_id, event, attempt, at) VALUES (?, ?, ?, ?)",
        (row["id"], event, row["attempt"], time.time()),
    )
