"""Damaged shards: taken out of a folder, so that they are made anew, but never deleted.

What cannot be read today may be whole (a file system has its moods), so it is for a person to look
at and to remove.
"""

import os
from pathlib import Path

from pipelines.shards import sync_folder

DAMAGED_FOLDER = "damaged"


def set_aside(folder: Path, name: str) -> None:
    """Move a shard's record and tar into DIR/damaged/; a tar without a record is removed.

    Such a tar is what a run that died leaves: it never was a part of the set.
    """
    record, tar = (folder / f"{name}.{suffix}" for suffix in ("json", "tar"))
    if not record.exists():
        tar.unlink(missing_ok=True)
        return
    place = folder / DAMAGED_FOLDER
    place.mkdir(exist_ok=True)
    number = 0
    while any((place / _numbered(path, number)).exists() for path in (record, tar)):
        number += 1
    # The record last: until then the next start comes here again.
    for path in (tar, record):
        if path.exists():
            os.replace(path, place / _numbered(path, number))
    sync_folder(place)
    sync_folder(folder)


def damaged_notes(folder: Path) -> tuple[str, ...]:
    """A line for people where the folder has damaged shards lying aside; else nothing."""
    place = folder / DAMAGED_FOLDER
    count = len(list(place.glob("shard-*.json")))
    if not count:
        return ()
    said = "1 damaged shard lies" if count == 1 else f"{count} damaged shards lie"
    return (f"{said} in {place}, made anew here: look there, then remove that folder",)


def _numbered(path: Path, number: int) -> str:
    return path.name if number == 0 else f"{path.stem}.{number}{path.suffix}"
