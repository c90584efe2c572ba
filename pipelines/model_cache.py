"""The cache of pulled and imported models: its record, accepted licences, and how things get in.

cache/
  models.json      what is here, where from, what it was verified against; licences accepted
  .incoming/NAME/  a pull that is under way; the same pull continues in it
  .importing/      an import that is under way
  face/ pose/ ...  the models, each appearing whole or not at all
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipelines.model_catalogue import KnownModel, ModelError, Terms
from pipelines.models import cache_folder, is_model

RECORD = "models.json"
_FORMAT = 1
_LOCK = ".lock"
_SPARE = 256 << 20  # bytes left free beside what is written


class SourceError(ModelError):
    """The network, a source or the disk did not give what it should; no mistake of the user's."""


def now() -> str:
    """The time as records state it: ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_record() -> dict[str, Any]:
    """The cache's record: `models` and `licences` by name, empty where nothing is recorded yet.

    Raises:
        ModelError: the record cannot be read.
    """
    path = cache_folder() / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"format": _FORMAT, "licences": {}, "models": {}}
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} cannot be read ({error}): remove it, and pull again") from None
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        raise ModelError(f"{path} is of another version: remove it, and pull again")
    return record


def record_model(name: str, entry: dict[str, Any]) -> None:
    """Note a model that was put into the cache; call it inside `cache_lock`."""
    record = read_record()
    record["models"][name] = entry
    _write(record)


def missing_licences(models: Iterable[KnownModel]) -> list[Terms]:
    """The licences of these models that nobody has accepted here yet, each once."""
    accepted = read_record()["licences"]
    terms = dict.fromkeys(terms for model in models for terms in model.terms)
    return [t for t in terms if t.name not in accepted]


def accept_licences(terms: Iterable[Terms]) -> None:
    """Note that the user accepts these licences, and when, so that they are not asked again."""
    with cache_lock():
        record = read_record()
        for each in terms:
            record["licences"][each.name] = {"url": each.url, "accepted_at": now()}
        _write(record)


def _write(record: dict[str, Any]) -> None:
    write_json(cache_folder() / RECORD, record)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write so that `path` is always the old file or the new one, never a part."""
    # `pipelines.shards` has the same for shards, but brings torch with it.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(data, file, indent=2, ensure_ascii=False, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextmanager
def cache_lock() -> Iterator[None]:
    """Keep other pulls and imports out. The system frees the lock when its process dies.

    Raises:
        SourceError: another process holds it.
    """
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SourceError(
                f"another pull or import works in {folder}: wait for it to end, then try again"
            ) from None
        yield


def incoming(name: str) -> Path:
    """Where a pull of `name` gathers its files."""
    return cache_folder() / ".incoming" / name


@contextmanager
def importing() -> Iterator[Path]:
    """An empty folder where an import gathers its files; gone afterwards."""
    folder = cache_folder() / ".importing"
    shutil.rmtree(folder, ignore_errors=True)  # what a killed import left
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_name(name: str) -> str:
    """`name` as a folder of the cache.

    Raises:
        ModelError: it cannot be one.
    """
    if not re.fullmatch(r"\w[\w.-]{0,63}", name, re.ASCII) or name in ("face", "pose", "models"):
        raise ModelError(
            f"{name!r} cannot name a model: expected letters, digits, '-', '_' and '.', "
            "other than face, pose and models"
        )
    return name


def check_disk(needed: int) -> None:
    """Raise SourceError where the cache's disk has no room for `needed` bytes more."""
    folder = cache_folder()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed and free < needed + _SPARE:
        raise SourceError(
            f"{cache_folder()} has {size_text(free)} free, but {size_text(needed + _SPARE)} are "
            "needed: make room, or point XDG_CACHE_HOME to another disk"
        )


def put(staged: Path, place: Path) -> None:
    """Move a whole file or folder to where it is looked for; what lay there is replaced."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.is_dir():
        old = staged.with_name(staged.name + ".replaced")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(place, old)
        os.replace(staged, place)
        shutil.rmtree(old)
    else:
        os.replace(staged, place)
    descriptor = os.open(place.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def whole_in_cache(model: KnownModel) -> Path | None:
    """Where the model lies in the cache, all files of its record with their sizes; else None."""
    place = cache_folder() / model.places[0]
    entry = read_record()["models"].get(model.name)
    if entry is None or not is_model(model, place):
        return None
    base = place.parent if place.is_file() else place
    for file in entry["files"]:
        path = base / file["path"]
        if not path.is_file() or path.stat().st_size != file["size"]:
            return None
    return place


def size_text(size: float | None) -> str:
    """A number of bytes for people."""
    if size is None:
        return "unknown"
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
