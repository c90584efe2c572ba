"""Shards on disk: deterministic tars, commits that are all or nothing, and their checks.

Files are made under a temporary name, checked, flushed to the disk and renamed. A shard exists
when its JSON does; a tar without one is a leftover of a run that died.
"""

import hashlib
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pipelines import schema
from pipelines.schema import ShardError, ShardRecord
from pipelines.video import VideoError, probe

_BLOCK = 512
_CHUNK = 1 << 20
_MAX_MEMBERS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What a check of a folder of shards found; empty `problems` means all is well."""

    shards: int = 0
    clips: int = 0
    bytes: int = 0
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
    _sync_folder(path.parent)


def write_tar(path: Path, members: Mapping[str, bytes | Path]) -> dict[str, int]:
    """Write a USTAR tar whose bytes depend on the members alone; returns each one's size.

    Members are sorted by name; owner, mode and time are fixed. `path` appears when complete.

    Raises:
        ShardError: a member's name breaks the contract.
    """
    sizes = {}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as stream:
        for name in sorted(members):
            schema.split_member(name)
            content = members[name]
            sizes[name] = len(content) if isinstance(content, bytes) else content.stat().st_size
            header = tarfile.TarInfo(name)
            header.size, header.mode = sizes[name], 0o644
            stream.write(header.tobuf(tarfile.USTAR_FORMAT))
            _copy_content(content, stream)
            stream.write(b"\0" * (-sizes[name] % _BLOCK))
        stream.write(b"\0" * (2 * _BLOCK))
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    return sizes


def index_tar(path: Path) -> dict[str, tuple[int, int]]:
    """(offset, size) of every member, from the headers alone.

    Reads only what `write_tar` writes: plain files with names of the contract. An own reader of
    512-byte headers, since the standard library's has had holes with hostile archives.

    Raises:
        ShardError: links, folders, other formats, wrong checksums, members past the end.
    """
    total = path.stat().st_size
    index: dict[str, tuple[int, int]] = {}
    with path.open("rb") as stream:
        offset = 0
        while True:
            header = stream.read(_BLOCK)
            if header == b"\0" * _BLOCK:
                return index
            if len(header) != _BLOCK:
                raise ShardError(f"{path.name} ends in the middle: curate this shard again.")
            name, size = _parse_header(header, path.name)
            offset += _BLOCK
            if name in index or len(index) >= _MAX_MEMBERS:
                raise ShardError(f"{path.name} holds {name} twice or too many members.")
            if offset + size > total:
                raise ShardError(f"{path.name}: {name} runs past the end of the file.")
            index[name] = (offset, size)
            offset += size + (-size % _BLOCK)
            stream.seek(offset)


def read_member(path: Path, offset: int, size: int) -> bytes:
    """The bytes of one member at a place that `index_tar` gave."""
    with path.open("rb") as stream:
        stream.seek(offset)
        data = stream.read(size)
    if len(data) != size:
        raise ShardError(f"{path.name} was cut short at byte {offset}: curate this shard again.")
    return data


@contextmanager
def as_file(data: bytes) -> Iterator[Path]:
    """A clip's bytes as a short-lived file, for readers that need to seek in one."""
    with tempfile.NamedTemporaryFile(suffix=".mp4") as stream:
        stream.write(data)
        stream.flush()
        yield Path(stream.name)


def commit(folder: Path, tar: Path, record: ShardRecord) -> None:
    """Move a finished tar into `folder` and write its record, which makes it part of the set.

    Raises:
        ShardError: the tar is not the one the record describes.
    """
    problem = _tar_problem(tar, record, deep=True)
    if problem:
        raise ShardError(problem)
    os.replace(tar, folder / f"{record.name}.tar")
    _sync_folder(folder)
    write_atomic(folder / f"{record.name}.json", schema.encode_json(record))


def committed(folder: Path, name: str) -> ShardRecord | None:
    """The record of a shard that is wholly there, by size and SHA-256; None if it is not."""
    path = folder / f"{name}.json"
    if not path.is_file():
        return None
    try:
        record = _read_record(path)
    except ShardError:
        return None
    return record if _tar_problem(folder / f"{name}.tar", record, deep=True) is None else None


def read_records(folder: Path) -> list[ShardRecord]:
    """Every commit in a folder, in order of the shards' numbers.

    Raises:
        ShardError: the folder holds no shards, or a record is damaged.
    """
    return [_read_record(path) for path in _record_paths(folder)]


def verify(folder: Path, progress: Callable[[str], Any] | None = None) -> VerifyReport:
    """Check every byte and every member of a folder of shards.

    SHA-256 of each tar, the size and name of each member, that arrays have the contract's shapes,
    that clips open and decode, and that no clip is missing or in two shards.
    """
    problems: list[str] = []
    seen: set[str] = set()
    num_clips = num_bytes = 0
    paths = _record_paths(folder)
    for path in paths:
        try:
            record = _read_record(path)
        except ShardError as error:
            problems.append(str(error))
            continue
        num_clips += len(record.kept_clips)
        num_bytes += record.tar_bytes
        problems += _shard_problems(folder, record, seen)
        if progress:
            progress(record.name)
    for tar in sorted(folder.glob("shard-*.tar")):
        if not tar.with_suffix(".json").is_file():
            problems.append(f"{tar.name} has no record: a run died here; run it again.")
    return VerifyReport(
        shards=len(paths), clips=num_clips, bytes=num_bytes, problems=tuple(problems)
    )


def _shard_problems(folder: Path, record: ShardRecord, seen: set[str]) -> list[str]:
    tar = folder / f"{record.name}.tar"
    problem = _tar_problem(tar, record, deep=True)
    if problem:
        return [problem]
    problems = []
    index = index_tar(tar)
    frames = {clip.key: clip.num_frames for clip in record.kept_clips}
    if record.kind == "clips":
        wanted = {f"{key}.{suffix}" for key in frames for suffix in schema.CLIP_MEMBERS}
        problems += [f"{tar.name}: {name} is missing." for name in sorted(wanted - index.keys())]
        problems += [f"{tar.name}: {name} is of no clip." for name in sorted(index.keys() - wanted)]
    problems += [
        f"{tar.name}: clip {key} is also in another shard." for key in frames if key in seen
    ]
    seen |= frames.keys()
    for name, (offset, size) in index.items():
        key, _ = schema.split_member(name)
        try:
            _check_member(name, read_member(tar, offset, size), frames.get(key), tar.name)
        except ShardError as error:
            problems.append(str(error))
    return problems


def _check_member(name: str, data: bytes, num_frames: int | None, shard: str) -> None:
    what = f"{shard}: {name}"
    if name.endswith(".npz"):
        arrays = schema.unpack_arrays(data, what)
        if num_frames is not None and name.endswith(".pose.npz"):
            schema.check_pose(arrays, num_frames, what)
        if num_frames is not None and name.endswith(".face.npz"):
            schema.check_faces(arrays, num_frames, what)
    elif name.endswith(".json"):
        schema.decode_json(data, what)
    elif name.endswith(".mp4"):
        try:
            with as_file(data) as path:
                info = probe(path)
        except VideoError as error:
            raise ShardError(f"{what} does not decode: {error}") from None
        if num_frames is not None and info.num_frames != num_frames:
            raise ShardError(f"{what} has {info.num_frames} frames, expected {num_frames}.")


def _tar_problem(tar: Path, record: ShardRecord, *, deep: bool) -> str | None:
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


def _read_record(path: Path) -> ShardRecord:
    size = path.stat().st_size
    if size > schema.MAX_JSON_BYTES:
        raise ShardError(f"{path.name} has {size} bytes, too many for a record: curate again.")
    record = schema.decode_record(path.read_bytes(), path.name)
    if record.name != path.stem:
        raise ShardError(f"{path.name} is the record of {record.name}: it was renamed.")
    return record


def _record_paths(folder: Path) -> list[Path]:
    paths = [path for path in folder.glob("shard-*.json") if path.is_file()]
    if not paths:
        raise ShardError(
            f"{folder} holds no committed shards: give the folder that `animator curate` wrote."
        )
    return sorted(paths, key=lambda path: schema.shard_index(path.stem))


def _parse_header(header: bytes, where: str) -> tuple[str, int]:
    blank = header[:148] + b" " * 8 + header[156:]
    try:
        checksum = int(header[148:156].strip(b" \0"), 8)
        size = int(header[124:136].strip(b" \0"), 8)
        name = header[:100].rstrip(b"\0").decode("ascii")
    except ValueError:
        raise ShardError(f"{where} is not a tar of clips: a header is damaged.") from None
    plain = header[156:157] in (b"0", b"\0") and header[257:262] == b"ustar"
    if checksum != sum(blank) or not plain or header[345:500].strip(b"\0"):
        raise ShardError(f"{where} is not a tar of clips: a header is damaged or not a plain file.")
    schema.split_member(name)
    return name, size


def _copy_content(content: bytes | Path, stream: BinaryIO) -> None:
    if isinstance(content, bytes):
        stream.write(content)
        return
    with content.open("rb") as source:
        for chunk in _chunks(source):
            stream.write(chunk)


def _chunks(stream: BinaryIO) -> Iterable[bytes]:
    while chunk := stream.read(_CHUNK):
        yield chunk


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
