"""Shards on disk: commits that are all or nothing, their readers and their checks.

Files are made under a temporary name, checked, flushed to the disk and renamed. A shard exists
when its JSON does; a tar without one is a leftover of a run that died.
"""

import hashlib
import os
import tempfile
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import schema, spares
from pipelines.schema import ShardError, ShardRecord
from pipelines.spares import SpareRecord
from pipelines.tars import Slice, index_tar, read_member, write_tar
from pipelines.video import VideoError, probe

__all__ = [
    "VerifyReport",
    "as_file",
    "commit",
    "committed",
    "index_tar",
    "iter_records",
    "read_member",
    "read_record",
    "read_records",
    "record_paths",
    "sha256_file",
    "sync_folder",
    "tar_problem",
    "verify",
    "write_atomic",
    "write_tar",
]


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What a check of a folder of shards found; empty `problems` means all is well.

    spare_clips: clips that new thresholds took out, and that are kept in case they come back.
    """

    shards: int = 0
    clips: int = 0
    bytes: int = 0
    spare_clips: int = 0
    problems: tuple[str, ...] = ()


def sha256_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` so that `path` is always the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk, so that renames in it outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def as_file(data: bytes | Slice) -> Iterator[Path]:
    """A clip's bytes as a short-lived file, for readers that need to seek in one."""
    with tempfile.NamedTemporaryFile(suffix=".mp4") as stream:
        for chunk in data.chunks() if isinstance(data, Slice) else (data,):
            stream.write(chunk)
        stream.flush()
        yield Path(stream.name)


def commit(folder: Path, tar: Path, record: ShardRecord) -> None:
    """Move a finished tar into `folder` and write its record, which makes it part of the set.

    Raises:
        ShardError: the tar is not the one the record describes, or the record is too large.
    """
    data = schema.encode_record(record)
    problem = tar_problem(tar, record, deep=True)
    if problem:
        raise ShardError(problem)
    os.replace(tar, folder / f"{record.name}.tar")
    sync_folder(folder)
    write_atomic(folder / f"{record.name}.json", data)


def committed(folder: Path, name: str, *, deep: bool = False) -> ShardRecord | None:
    """The record of a shard that is wholly there; None if it is missing or damaged.

    Args:
        deep: whether to read the tar through. Else it is believed by its size, unless it is newer
            than its record, which a commit never leaves behind.

    Raises:
        OSError: it is there and cannot be read.
    """
    path, tar = folder / f"{name}.json", folder / f"{name}.tar"
    try:
        record = read_record(path)
        deep = deep or tar.stat().st_mtime_ns > path.stat().st_mtime_ns
    except (FileNotFoundError, ShardError):
        return None
    if not deep:
        return record if tar.stat().st_size == record.tar_bytes else None
    return record if tar_problem(tar, record, deep=True) is None else None


def read_record(path: Path) -> ShardRecord:
    """The record in a commit's JSON file. Raises ShardError where it is damaged, OSError."""
    size = path.stat().st_size
    if size > schema.MAX_RECORD_BYTES:
        raise ShardError(f"{path.name} has {size} bytes, too many for a record: curate again.")
    record = schema.decode_record(path.read_bytes(), path.name)
    if record.name != path.stem:
        raise ShardError(f"{path.name} is the record of {record.name}: it was renamed.")
    return record


def iter_records(folder: Path) -> Iterator[ShardRecord]:
    """Every commit in a folder, one at a time, in order of the shards' numbers.

    Raises:
        ShardError: the folder holds no shards, or a record is damaged.
    """
    return map(read_record, record_paths(folder))


def read_records(folder: Path) -> list[ShardRecord]:
    """All that `iter_records` gives at once, for folders that fit into memory."""
    return list(iter_records(folder))


def record_paths(folder: Path) -> list[Path]:
    """The JSON files of the commits in a folder, in order of the shards' numbers.

    Raises:
        ShardError: the folder holds none.
    """
    paths = [path for path in folder.glob("shard-*.json") if path.is_file()]
    if not paths:
        raise ShardError(
            f"{folder} holds no committed shards: give the folder that `animator curate` wrote."
        )
    return sorted(paths, key=lambda path: schema.shard_index(path.stem))


def tar_problem(tar: Path, record: ShardRecord | SpareRecord, *, deep: bool) -> str | None:
    """Why a tar is not the one its record describes; None if it is."""
    if not tar.is_file():
        return f"{tar.name} is missing: curate into this folder again to make it."
    size = tar.stat().st_size
    if size != record.tar_bytes:
        return f"{tar.name} has {size} bytes, its record says {record.tar_bytes}: curate again."
    if deep and sha256_file(tar) != record.tar_sha256:
        return f"{tar.name} has been changed (its SHA-256 differs from its record): curate again."
    try:
        sizes = {name: size for name, (_, size) in index_tar(tar).items()}
    except ShardError as error:
        return str(error)
    if sizes != record.members:
        return f"{tar.name} does not hold the members that its record lists: curate again."
    return None


def verify(folder: Path, progress: Callable[[str], Any] | None = None) -> VerifyReport:
    """Check every byte and every member of a folder of shards, one shard at a time.

    SHA-256 of each tar, the size and name of each member, that arrays have the contract's shapes,
    that clips open and decode, and that no clip is missing or in two shards; the same of spare
    clips, if there are some.
    """
    problems: list[str] = []
    keys = array("Q")
    num_clips = num_bytes = num_spare = 0
    paths = record_paths(folder)
    for path in paths:
        try:
            record = read_record(path)
        except ShardError as error:
            problems.append(str(error))
            continue
        num_clips += len(record.kept_clips)
        num_bytes += record.tar_bytes
        problems += _shard_problems(folder / f"{record.name}.tar", record)
        keys.extend({_short_hash(clip.key) for clip in record.kept_clips})
        found, num_members = _spare_problems(folder, record.name)
        problems += found
        num_spare += num_members // len(schema.CLIP_MEMBERS)
        if progress:
            progress(record.name)
    problems += _repeated(folder, np.frombuffer(keys, np.uint64))
    for pattern in ("shard-*.tar", f"{spares.SPARE_FOLDER}/spare-*.tar"):
        for tar in sorted(folder.glob(pattern)):
            if not tar.with_suffix(".json").is_file():
                problems.append(f"{tar.name} has no record: a run died here; run it again.")
    return VerifyReport(
        shards=len(paths),
        clips=num_clips,
        bytes=num_bytes,
        spare_clips=num_spare,
        problems=tuple(problems),
    )


def _shard_problems(tar: Path, record: ShardRecord) -> list[str]:
    problem = tar_problem(tar, record, deep=True)
    if problem:
        return [problem]
    if record.kind == "latents":
        from pipelines.encode.members import shard_problems

        return shard_problems(tar, record)
    frames = {clip.key: clip.num_frames for clip in record.kept_clips}
    problems = []
    if record.kind == "clips":
        wanted = {f"{key}.{suffix}" for key in frames for suffix in schema.CLIP_MEMBERS}
        there = record.members.keys()
        problems += [f"{tar.name}: {name} is missing." for name in sorted(wanted - there)]
        problems += [f"{tar.name}: {name} is of no clip." for name in sorted(there - wanted)]
    return problems + _member_problems(tar, frames)


def _spare_problems(folder: Path, shard: str) -> tuple[list[str], int]:
    """What is wrong with a shard's spare clips, and how many members they have."""
    try:
        record = spares.read_spare(folder, shard)
    except ShardError as error:
        return [str(error)], 0
    if record is None:
        return [], 0
    tar = spares.spare_tar(folder, shard)
    problem = tar_problem(tar, record, deep=True)
    return ([problem] if problem else _member_problems(tar, {})), len(record.members)


def _member_problems(tar: Path, frames: dict[str, int]) -> list[str]:
    problems = []
    for name, (offset, size) in index_tar(tar).items():
        key, _ = schema.split_member(name)
        try:
            _check_member(name, Slice(tar, offset, size), frames.get(key), tar.name)
        except ShardError as error:
            problems.append(str(error))
    return problems


def _check_member(name: str, content: Slice, num_frames: int | None, shard: str) -> None:
    what = f"{shard}: {name}"
    if name.endswith(".mp4"):
        try:
            with as_file(content) as path:
                info = probe(path)
        except VideoError as error:
            raise ShardError(f"{what} does not decode: {error}") from None
        if num_frames is not None and info.num_frames != num_frames:
            raise ShardError(f"{what} has {info.num_frames} frames, expected {num_frames}.")
        return
    data = read_member(content.path, content.offset, content.size)
    if name.endswith(".npz"):
        arrays = schema.unpack_arrays(data, what)
        if num_frames is not None and name.endswith(".pose.npz"):
            schema.check_pose(arrays, num_frames, what)
        if num_frames is not None and name.endswith(".face.npz"):
            schema.check_faces(arrays, num_frames, what)
    elif name.endswith(".json"):
        schema.decode_json(data, what)


def _repeated(folder: Path, keys: np.ndarray) -> list[str]:
    """Clips that are in two shards, from short hashes of all keys; names are looked up if so."""
    values, counts = np.unique(keys, return_counts=True)
    repeated = set(values[counts > 1].tolist())
    if not repeated:
        return []
    first: dict[str, str] = {}
    problems = []
    for path in record_paths(folder):
        try:
            record = read_record(path)
        except ShardError:
            continue
        for clip in record.kept_clips:
            if _short_hash(clip.key) not in repeated:
                continue
            other = first.setdefault(clip.key, record.name)
            if other != record.name:
                problems.append(f"{record.name}.tar: clip {clip.key} is also in {other}.")
    return problems


def _short_hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
