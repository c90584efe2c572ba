"""Packs of networks as zip files: only flat ONNX files come out, and never more than expected."""

import lzma
import os
import re
import shutil
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from pipelines.model_catalogue import ModelError

MAX_MEMBERS = 64
MAX_BYTES = 2 << 30  # of all networks together
MAX_RATIO = 20  # weights hardly compress; a network that shrinks more is a bomb
_NAME = re.compile(r"\w[\w.-]{0,127}", re.ASCII)
_SYSTEM_UNIX = 3
# What `zipfile` lets through of damaged bytes, in members and in the directory.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    UnicodeDecodeError,
)


def unpack_networks(archive: Path, folder: Path) -> list[str]:
    """Unpack the ONNX files of a zip into the new folder `folder`; returns their names.

    They may lie at the top of the archive or together in one folder of it; files of other kinds
    stay inside.

    Raises:
        ModelError: the archive is damaged, holds no networks, or holds anything that does not
            belong into a pack: links, paths that lead elsewhere, encrypted or bloated members.
    """
    try:
        with zipfile.ZipFile(archive) as zipped:
            members = _networks(zipped.infolist(), archive)
            folder.mkdir(parents=True)
            for name, member in members.items():
                with zipped.open(member) as source, (folder / name).open("xb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
                    target.flush()
                    os.fsync(target.fileno())
    except _DAMAGE as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise _damaged(archive, error) from None
    except (OSError, RuntimeError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise ModelError(f"{archive.name} cannot be unpacked: {error}") from None
    return sorted(members)


def unpacked_size(archive: Path) -> int:
    """Bytes that the networks of a zip take, as it declares them; ModelError as above."""
    try:
        with zipfile.ZipFile(archive) as zipped:
            return sum(m.file_size for m in _networks(zipped.infolist(), archive).values())
    except _DAMAGE as error:
        raise _damaged(archive, error) from None
    except OSError as error:
        raise ModelError(f"{archive.name} is no readable zip file: {error}") from None


def _damaged(archive: Path, error: Exception) -> ModelError:
    reason = str(error) or "it ends early"
    return ModelError(f"{archive.name} is damaged or no zip file ({reason}): fetch it again")


def _networks(members: list[zipfile.ZipInfo], archive: Path) -> dict[str, zipfile.ZipInfo]:
    if len(members) > MAX_MEMBERS:
        raise ModelError(
            f"{archive.name} holds {len(members)} members, expected at most {MAX_MEMBERS}"
        )
    found: dict[str, zipfile.ZipInfo] = {}
    folders = set()
    for member in members:
        problem = _problem(member)
        if problem:
            raise ModelError(f"{archive.name} is refused: {member.filename!r} {problem}")
        path = PurePosixPath(member.filename)
        if member.is_dir() or path.suffix != ".onnx" or path.name.startswith("."):
            continue
        if path.name in found:
            raise ModelError(f"{archive.name} is refused: it holds {path.name} twice")
        found[path.name] = member
        folders.add(path.parent)
    if not found:
        raise ModelError(f"{archive.name} holds no .onnx files")
    if len(folders) > 1:
        raise ModelError(f"{archive.name} is refused: its networks lie in several folders")
    if sum(member.file_size for member in found.values()) > MAX_BYTES:
        raise ModelError(f"{archive.name} is refused: it unpacks to more than {MAX_BYTES} bytes")
    return found


def _problem(member: zipfile.ZipInfo) -> str | None:
    """Why a member does not belong into a pack."""
    # `orig_filename`: ZipInfo cuts names at a NUL byte and turns the system's separators round.
    name = member.orig_filename
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or ":" in name:
        return "leads outside the archive"
    kind = stat.S_IFMT(member.external_attr >> 16) if member.create_system == _SYSTEM_UNIX else 0
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a special file"
    if member.flag_bits & 0x1:
        return "is encrypted"
    if member.is_dir() or path.suffix != ".onnx" or path.name.startswith("."):
        return None  # stays inside
    if not _NAME.fullmatch(path.name):
        return "has an unusual name"
    if len(path.parts) > 2:
        return "lies deeper than one folder"
    if member.file_size > MAX_RATIO * max(member.compress_size, 1 << 10):
        return f"unpacks to more than {MAX_RATIO} times its size"
    return None
