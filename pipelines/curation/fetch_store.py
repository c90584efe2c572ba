"""Finished downloads of a folder: `ID.bin` and, written last, `ID.json`; all else is unfinished.

Attempts work in folders of their own, `.ID.XXXX.part`, which they hold a lock on. What a dead
process left is known by its lock being free, and removed by the next attempt.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.curation.fetch_errors import no_room
from pipelines.model_cache import write_json


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A finished download: where it lies, what it is and where it came from."""

    path: Path
    bytes: int
    sha256: str
    provenance: dict[str, Any]


def find(folder: Path, name: str, uri: str) -> Kept | None:
    """The finished download of that name and address, if it is whole."""
    path = folder / f"{name}.bin"
    try:
        record = json.loads((folder / f"{name}.json").read_bytes())
        kept = Kept(
            path=path,
            bytes=int(record["bytes"]),
            sha256=str(record["sha256"]),
            provenance=dict(record["provenance"]),
        )
        whole = path.is_file() and path.stat().st_size == kept.bytes
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kept if whole and kept.provenance.get("uri") == uri else None


def keep(folder: Path, name: str, file: Path, provenance: dict[str, Any]) -> Kept:
    """Make a fetched file durable and give it its name; its record comes last."""
    with file.open("rb+") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        os.fsync(stream.fileno())
        size = os.fstat(stream.fileno()).st_size
    path = folder / f"{name}.bin"
    (folder / f"{name}.json").unlink(missing_ok=True)
    os.replace(file, path)
    record = {"bytes": size, "sha256": sha256, "provenance": provenance}
    write_json(folder / f"{name}.json", record)
    _sync(folder)
    return Kept(path=path, bytes=size, sha256=sha256, provenance=provenance)


def discard(folder: Path, name: str) -> None:
    """Remove a download, finished or not."""
    (folder / f"{name}.json").unlink(missing_ok=True)
    (folder / f"{name}.bin").unlink(missing_ok=True)
    _remove_dead(folder, name)


@contextmanager
def attempt(folder: Path, name: str) -> Iterator[Path]:
    """A fresh folder to fetch into, removed at the end with what is still in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_dead(folder, name)
        place = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".part", dir=folder))
        lock = os.open(place, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise no_room(error) from None
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        os.close(lock)


def _remove_dead(folder: Path, name: str) -> None:
    for place in folder.glob(f".{name}.*.part"):
        try:
            lock = os.open(place, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(place, ignore_errors=True)
        except OSError:
            pass  # somebody is at work there
        finally:
            os.close(lock)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
