"""Other clips in a shard: its tar and record replaced, all or nothing, whenever the process dies.

New files are made in a folder of their own, DIR/.work/repack/SHARD.NUMBER, flushed, and declared
complete by a file `ready`. Only then are they moved to their places, the record last. What a dead
process left is either complete and put in place at the next start (`roll_forward`), or not, and
removed: the shard is then the old one or the new one.

Clips that are taken out can be put aside into the shard's spare tar (`pipelines.spares`), from
which they come back without a frame being decoded.
"""

import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pipelines import schema, shards, spares
from pipelines.curation.ledger import WORK_FOLDER
from pipelines.curation.outcomes import Stored
from pipelines.schema import ShardError, ShardRecord
from pipelines.spares import SpareRecord
from pipelines.tars import Content, Slice, index_tar, read_member, write_tar

REPACK_FOLDER = "repack"
_READY = "ready"
_OF_TAR = ("tar_sha256", "tar_bytes", "members")
# What `ready` holds when the spare clips of the shard are used up.
_NO_SPARES = b"no spares\n"


class SpareClips:
    """The spare clips of one shard. Damaged ones are as if they were not there."""

    def __init__(self, folder: Path, shard: str) -> None:
        self.folder = folder
        self.shard = shard

    @cached_property
    def members(self) -> dict[str, Slice]:
        """Every member by its name. The tar is read through first."""
        tar = spares.spare_tar(self.folder, self.shard)
        try:
            record = spares.read_spare(self.folder, self.shard)
        except ShardError:
            return {}
        if record is None or shards.tar_problem(tar, record, deep=True):
            return {}
        return {name: Slice(tar, *place) for name, place in index_tar(tar).items()}

    def find(self, key: str) -> Stored | None:
        """What is stored of a clip; None if it is not among them."""
        member = self.members.get(f"{key}.json")
        if member is None:
            return None
        data = schema.decode_json(_read(member), f"{member.path.name}: {key}.json")
        height, width = data["size"]
        return Stored(num_frames=data["num_frames"], fps=data["fps"], width=width, height=height)


def repack(
    folder: Path,
    before: ShardRecord,
    after: ShardRecord,
    members: Mapping[str, Content] | None = None,
    *,
    spare: SpareClips | None = None,
    put_aside: bool = False,
) -> None:
    """Make a shard hold exactly the clips that `after` keeps.

    Members are taken from `members`, else from the shard's tar, else from the spare clips, and
    copied as they are but for the settings' hash in KEY.json. What `after` says of the tar is
    found anew.

    Args:
        before: the shard's record as it is.
        members: of clips that are new, by name.
        spare: the shard's spare clips, if they have been read before.
        put_aside: whether clips that are taken out go to the spare ones, unless they are of no
            clip of the record any more.

    Raises:
        ShardError: the shard's tar is damaged, or a clip that is to be kept is nowhere.
    """
    tar = folder / f"{before.name}.tar"
    problem = shards.tar_problem(tar, before, deep=False)
    if problem:
        raise ShardError(problem)
    read = tar.stat()
    there = _by_key({name: Slice(tar, *place) for name, place in index_tar(tar).items()})
    spare = spare or SpareClips(folder, before.name)
    spared = _by_key(spare.members)
    kept = [clip.key for clip in after.kept_clips]
    content = _collect(after, kept, [_by_key(members or {}), there, spared])
    known = {clip.key for source in after.sources for clip in source.clips}
    aside = spared | there if put_aside else spared
    aside = {key: names for key, names in aside.items() if key in known.difference(kept)}

    # Its own, since a worker that was given up for dead may still be at the same shard.
    staged = folder / WORK_FOLDER / REPACK_FOLDER / f"{before.name}.{uuid.uuid4().hex}"
    staged.mkdir(parents=True)
    if content != _flat(there) or aside.keys() != spared.keys():
        # Damage must not be copied and then be given a sum of its own.
        problem = shards.tar_problem(tar, before, deep=True)
        if problem:
            raise ShardError(problem)
    if content != _flat(there):
        after = replace(after, **_write_tar(staged / tar.name, content))
        if (tar.stat().st_ino, tar.stat().st_mtime_ns) != (read.st_ino, read.st_mtime_ns):
            raise ShardError(f"{tar.name} was replaced while it was read: run it again.")
    else:
        after = replace(after, **{name: getattr(before, name) for name in _OF_TAR})
    if aside and aside.keys() != spared.keys():
        spare_tar = staged / spares.spare_tar(folder, before.name).name
        record = SpareRecord(name=spare_tar.stem, **_write_tar(spare_tar, _flat(aside)))
        shards.write_atomic(spare_tar.with_suffix(".json"), schema.encode_record(record))
    shards.write_atomic(staged / f"{before.name}.json", schema.encode_record(after))
    shards.write_atomic(staged / _READY, b"" if aside else _NO_SPARES)
    for parent in (staged.parent, staged.parent.parent, folder):
        shards.sync_folder(parent)
    _put_in_place(folder, staged)


def roll_forward(folder: Path) -> int:
    """Finish what dead processes left of repacking: complete shards are put in their places.

    Called where no other process is repacking: when a run starts and when it ends.

    Returns:
        how many were.
    """
    work = folder / WORK_FOLDER / REPACK_FOLDER
    completed = 0
    for staged in sorted(work.iterdir()) if work.is_dir() else ():
        if (staged / _READY).is_file():
            _put_in_place(folder, staged)
            completed += 1
        else:
            shutil.rmtree(staged, ignore_errors=True)
    for path in (work, work.parent):
        with suppress(OSError):
            path.rmdir()
    return completed


def roll_shard_forward(folder: Path, name: str) -> None:
    """Put a shard in its place that a dead process had repacked, before its record is believed.

    Others may be at work on other shards. What is not complete is left to `roll_forward`.
    """
    for staged in _staged(folder, name):
        if (staged / _READY).is_file():
            _put_in_place(folder, staged)


def drop_staged(folder: Path, name: str) -> None:
    """Remove what was repacked of a shard that is now made from its sources: it must not return."""
    for staged in _staged(folder, name):
        # First what makes it complete, should this die too.
        (staged / _READY).unlink(missing_ok=True)
        shutil.rmtree(staged, ignore_errors=True)


def _staged(folder: Path, name: str) -> list[Path]:
    return sorted((folder / WORK_FOLDER / REPACK_FOLDER).glob(f"{name}.*"))


def _put_in_place(folder: Path, staged: Path) -> None:
    """Move what is complete. Each step may have been done before; the record comes last.

    Two processes may do so at once: a file that is gone has been moved by the other.
    """
    name = schema.shard_name(schema.shard_index(staged.name.partition(".")[0]))
    spare_tar = spares.spare_tar(folder, name)
    spare_files = (spare_tar, spare_tar.with_suffix(".json"))
    try:
        spares_left = (staged / _READY).read_bytes() != _NO_SPARES
    except FileNotFoundError:
        return
    if not spares_left:
        for path in reversed(spare_files):
            path.unlink(missing_ok=True)
        with suppress(OSError):
            spare_tar.parent.rmdir()
    for path in (*spare_files, folder / f"{name}.tar", folder / f"{name}.json"):
        if (staged / path.name).is_file():
            path.parent.mkdir(exist_ok=True)
            with suppress(FileNotFoundError):
                os.replace(staged / path.name, path)
            shards.sync_folder(path.parent)
    shutil.rmtree(staged, ignore_errors=True)


def _collect(
    after: ShardRecord, kept: Sequence[str], places: Sequence[Mapping[str, dict[str, Content]]]
) -> dict[str, Content]:
    """The members of the clips that are kept, each clip's from the first place that has it."""
    content: dict[str, Content] = {}
    for key in kept:
        names = next((place[key] for place in places if key in place), {})
        for suffix in schema.CLIP_MEMBERS:
            if f"{key}.{suffix}" not in names:
                raise ShardError(f"{after.name}: there is no {key}.{suffix} to keep: curate again.")
        for name, member in names.items():
            if name == f"{key}.json" and isinstance(member, Slice):
                member = _with_hash(member, after.config_hash)
            content[name] = member
    return content


def _with_hash(member: Slice, config_hash: str) -> Content:
    """A clip's JSON with the hash of these settings; the member itself if it has it."""
    data = schema.decode_json(_read(member), member.path.name)
    if data.get("config_hash") == config_hash:
        return member
    return schema.encode_json(data | {"config_hash": config_hash})


def _write_tar(path: Path, content: Mapping[str, Content]) -> dict[str, Any]:
    """What a record says of the tar that is written."""
    sizes = write_tar(path, content)
    found = (shards.sha256_file(path), path.stat().st_size, sizes)
    return dict(zip(_OF_TAR, found, strict=True))


def _by_key(members: Mapping[str, Content]) -> dict[str, dict[str, Content]]:
    found: dict[str, dict[str, Content]] = {}
    for name, member in members.items():
        found.setdefault(schema.split_member(name)[0], {})[name] = member
    return found


def _flat(members: Mapping[str, dict[str, Content]]) -> dict[str, Content]:
    return {name: member for names in members.values() for name, member in names.items()}


def _read(member: Slice) -> bytes:
    return read_member(member.path, member.offset, member.size)
