"""Deterministic tars: the same members give the same bytes, and any member is read in place.

The format is USTAR without folders, links or long names: what every tar program reads, and no more.
"""

import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipelines import schema
from pipelines.schema import ShardError

_BLOCK = 512
_CHUNK = 1 << 20
_MAX_MEMBERS = 1_000_000


@dataclass(frozen=True)
class Slice:
    """A part of a file, such as a member in its tar: where it begins and how long it is, bytes."""

    path: Path
    offset: int
    size: int

    def chunks(self) -> Iterator[bytes]:
        """The bytes, a little at a time. Raises ShardError where the file is too short."""
        left = self.size
        with self.path.open("rb") as stream:
            stream.seek(self.offset)
            while left:
                data = stream.read(min(_CHUNK, left))
                if not data:
                    raise _cut_short(self.path, self.offset)
                left -= len(data)
                yield data


Content = bytes | Path | Slice


def write_tar(path: Path, members: Mapping[str, Content]) -> dict[str, int]:
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
            sizes[name] = _size(content)
            header = tarfile.TarInfo(name)
            header.size, header.mode = sizes[name], 0o644
            stream.write(header.tobuf(tarfile.USTAR_FORMAT))
            _copy_content(content, sizes[name], stream)
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
        raise _cut_short(path, offset)
    return data


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


def _size(content: Content) -> int:
    if isinstance(content, Slice):
        return content.size
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _copy_content(content: Content, size: int, stream: BinaryIO) -> None:
    if isinstance(content, bytes):
        stream.write(content)
        return
    whole = content if isinstance(content, Slice) else Slice(content, 0, size)
    for chunk in whole.chunks():
        stream.write(chunk)


def _cut_short(path: Path, offset: int) -> ShardError:
    return ShardError(f"{path.name} was cut short at byte {offset}: curate this shard again.")
