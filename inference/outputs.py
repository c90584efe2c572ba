"""Finished videos on disk: a staged mp4 and its record become visible together, once.

A published video is NAME.mp4 and NAME.json; the record holds the video's size and SHA-256, so a
reader can tell a finished pair from a torn one.
"""

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipelines.shards import sha256_file, write_atomic

MAKING_LOCK = "lock"  # of a folder in which an output is made
MAKING_TRIES = 10  # names for it, before what takes them away is said


class FolderInUseError(ValueError):
    """Another process works in the folder; the message says which."""


class FolderLock:
    """One process a folder, or many that share it. The kernel lets go when a process ends.

    Raises FolderInUseError where another holds it and does not end within `wait` seconds.
    """

    def __init__(
        self, folder: Path, name: str, work: str, *, shared: bool = False, wait: float = 0.0
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / name
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            deadline = time.monotonic() + wait
            while not self._taken(fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
                if time.monotonic() >= deadline:
                    holder = os.pread(self._descriptor, 32, 0).decode() or "unknown"
                    raise FolderInUseError(
                        f"{folder}: another {work} (process {holder}) works in this folder; "
                        "wait for it, stop it, or give another folder"
                    )
                time.sleep(0.1)
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, str(os.getpid()).encode(), 0)
        except BaseException:  # nobody else has the descriptor to close, or the lock to let go
            os.close(self._descriptor)
            raise

    def _taken(self, kind: int) -> bool:
        try:
            fcntl.flock(self._descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def is_in_place(self) -> bool:
        """Whether the folder still holds the file: nobody removed it before it was locked."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), self._path.stat())
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Let the next process in."""
        os.close(self._descriptor)


@contextmanager
def making(output: Path) -> Iterator[Path]:
    """A folder beside `output` in which to make it, removed at the end whatever comes.

    It is locked as long as its process lives. What processes of this machine left that were killed
    while they made the same output is removed first; other machines' locks may not be seen here,
    so theirs is left to them.
    """
    mark = f".{output.stem}.{_machine()}-"
    _remove_dead(output.absolute().parent, mark)
    for _ in range(MAKING_TRIES):
        folder = output.with_name(f"{mark}{secrets.token_hex(4)}.part")
        lock = None
        try:
            lock = FolderLock(folder, MAKING_LOCK, "run")
            if lock.is_in_place():
                break
            lock.close()
        except (FolderInUseError, FileNotFoundError):
            pass  # another run thought it dead before it was locked: take another name
        except OSError:  # a file system without locks: what is left there is never removed
            folder.mkdir(parents=True, exist_ok=True)
            break
    else:
        raise FileNotFoundError(
            f"{output.absolute().parent}: {MAKING_TRIES} folders to make {output.name} in were "
            "gone as soon as they were made; look whether something else tidies this folder, or "
            "give another output."
        )
    try:
        yield folder
    finally:
        if lock is not None:
            lock.close()
        shutil.rmtree(folder, ignore_errors=True)


def _remove_dead(parent: Path, mark: str) -> None:
    own = re.compile(re.escape(mark) + r"[0-9a-f]{8}\.part")
    found = parent.iterdir() if parent.is_dir() else ()
    for folder in [path for path in found if own.fullmatch(path.name)]:
        remove_if_dead(folder)


def remove_if_dead(folder: Path) -> None:
    """Remove a folder of `making`, unless a living process holds it or it cannot be locked."""
    with suppress(FolderInUseError, OSError):  # alive, another user's, or without locks
        lock = FolderLock(folder, MAKING_LOCK, "run")
        try:
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            lock.close()
        # NFS keeps a removed file's name until nobody has it open, and so kept the folder. Only an
        # empty one goes now: who made it may have locked it anew since the lock's file was removed.
        folder.rmdir()


def _machine() -> str:
    """Short for this machine's name, which may be too long for a part of a file's name."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def sync(path: Path) -> None:
    """Have a file or a folder's entries reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write a record so that readers see the old one or the new one, never a part."""
    text = json.dumps(data, indent=2, ensure_ascii=False, default=str)
    write_atomic(path, (text + "\n").encode("utf-8", "backslashreplace"))


def read_json(path: Path) -> dict[str, Any] | None:
    """A record, or None where there is none that can be read."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def describe(staged: Path, record: dict[str, Any]) -> dict[str, Any]:
    """`record` with the size and hash of the staged video; the video is synced to disk."""
    if not staged.is_file() or not staged.stat().st_size:
        raise RuntimeError("the engine returned without writing a video")
    sync(staged)
    file = {"bytes": staged.stat().st_size, "sha256": sha256_file(staged)}
    return {**record, "file": file}


def publish(staged: Path, final: Path, record: dict[str, Any]) -> None:
    """Move a described video to its name and write its record beside it, the record first.

    A video that is in place is therefore always whole and has its record; see `published`.
    """
    write_json(final.with_suffix(".json"), record)
    os.replace(staged, final)
    sync(final.parent)


def published(final: Path) -> dict[str, Any] | None:
    """The record of a published video, or None where the pair is missing, torn or changed."""
    record = read_json(final.with_suffix(".json"))
    file = (record or {}).get("file")
    if not isinstance(file, dict) or not final.is_file():
        return None
    if final.stat().st_size != file.get("bytes") or sha256_file(final) != file.get("sha256"):
        return None
    return record
