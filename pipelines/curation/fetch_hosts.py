"""Politeness between the processes of one machine: so many downloads from a host at a time.

Locks are files in the machine's temporary folder, which the system frees when a process dies.
Where a host asked to be left alone for a while, the time is kept beside them for all.
"""

import fcntl
import hashlib
import os
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipelines.curation.fetch_errors import FetchError

_POLL = 0.2
_STALE = 60.0
_MAX_REST = 300.0  # whoever asks for more is given up, and asked again after that


@contextmanager
def slot(host: str, limit: int, deadline: float | None) -> Iterator[None]:
    """One of a host's `limit` places, held while the block runs.

    Args:
        deadline: of `time.monotonic()`; without it the wait has no end, but the holders' own
            time limits.

    Raises:
        FetchError: transient, no place became free before the deadline.
    """
    name = _name(host)
    while (place := _lock_one(name, limit)) is None:
        _sleep(_POLL * random.uniform(0.5, 1.5), deadline, host)
    path, descriptor = place
    try:
        while (left := _quiet_until(name) - time.time()) > 0:
            if deadline is not None and time.monotonic() + left > deadline:
                raise FetchError(
                    f"has a host that asked to be left alone for {left:.0f} s: try again later",
                    "transient",
                    retry_after=left,
                )
            _sleep(min(left, 1.0), deadline, host)
        yield
    finally:
        path.unlink(missing_ok=True)  # before the lock is let go, so it is nobody else's yet
        os.close(descriptor)


def leave_alone(host: str, seconds: float) -> None:
    """Nobody on this machine asks `host` for so long, or for five minutes."""
    path = _folder() / f"{_name(host)}.until"
    with suppress(OSError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            until = time.time() + min(seconds, _MAX_REST)
            os.utime(descriptor, (until, until))
        finally:
            os.close(descriptor)


def _quiet_until(name: str) -> float:
    path = _folder() / f"{name}.until"
    try:
        until = path.stat().st_mtime
    except OSError:
        return 0.0
    if until < time.time() - _STALE:
        path.unlink(missing_ok=True)
    return until


def _lock_one(name: str, limit: int) -> tuple[Path, int] | None:
    for number in range(limit):
        path = _folder() / f"{name}.{number}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The file may have been removed by its last holder since it was opened.
            if os.path.samestat(path.stat(), os.fstat(descriptor)):
                return path, descriptor
        except OSError:
            pass
        os.close(descriptor)
    return None


def _sleep(seconds: float, deadline: float | None, host: str) -> None:
    if deadline is not None and time.monotonic() + seconds > deadline:
        raise FetchError(
            "waited too long for other downloads from its host: try again later, or raise "
            "download.per_host",
            "transient",
        )
    time.sleep(seconds)


def _folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"animator-fetch-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise FetchError(
            "found the folder of download locks in the temporary folder to belong to somebody "
            "else: remove it or set TMPDIR"
        )
    return folder


def _name(host: str) -> str:
    return hashlib.sha256(host.lower().encode()).hexdigest()[:16]
