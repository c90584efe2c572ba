"""One job as the store keeps it, and what can go wrong with one."""

import json
import secrets
import sqlite3
from dataclasses import dataclass

from inference.requests import AnimationOptions


class LeaseLostError(Exception):
    """The job was deleted or given to another worker; whatever this one made is void."""


class IdempotencyError(ValueError):
    """An idempotency key came back with another request."""


class StoreError(ValueError):
    """The file is no job store that this version can use."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One row. `attempt` is the fencing token, `lost` counts workers that died on the job."""

    sequence: int
    id: str
    status: str
    options: AnimationOptions
    fingerprint: str
    progress: float
    stage: str
    attempt: int
    lost: int
    owner: str | None
    error_code: str | None
    error_message: str | None
    created_at: float
    completed_at: float | None


def new_job_id() -> str:
    """An id that cannot be guessed and is safe as a file name."""
    return f"video_{secrets.token_hex(16)}"


def job_of(row: sqlite3.Row) -> Job:
    """The job of a row of the store."""
    names = [name for name in Job.__dataclass_fields__ if name != "options"]
    options = AnimationOptions(**json.loads(row["options"]))
    return Job(options=options, **{name: row[name] for name in names})
