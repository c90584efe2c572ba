"""Finished videos on disk: a staged mp4 and its record become visible together, once.

A published video is NAME.mp4 and NAME.json; the record holds the video's size and SHA-256, so a
reader can tell a finished pair from a torn one.
"""

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

from pipelines.shards import sha256_file, write_atomic


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
        self._descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o600)
        deadline = time.monotonic() + wait
        while not self._taken(fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
            if time.monotonic() >= deadline:
                holder = os.pread(self._descriptor, 32, 0).decode() or "unknown"
                os.close(self._descriptor)
                raise FolderInUseError(
                    f"{folder}: another {work} (process {holder}) works in this folder; "
                    "wait for it, stop it, or give another folder"
                )
            time.sleep(0.1)
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, str(os.getpid()).encode(), 0)

    def _taken(self, kind: int) -> bool:
        try:
            fcntl.flock(self._descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Let the next process in."""
        os.close(self._descriptor)


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
