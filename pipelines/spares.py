"""Spare clips: members that new thresholds took out of a shard, kept should others want them back.

Beside `shard-000123.tar` there may be `spare/spare-000123.tar`, of the same format, and its record
`spare/spare-000123.json`. Only a revision of thresholds makes them; nothing reads clips from them,
and a folder can lose them at any time: the clips are then made again when they are wanted.
"""

from dataclasses import dataclass
from pathlib import Path

from pipelines import schema
from pipelines.overrides import from_dict
from pipelines.schema import ShardError

SPARE_FOLDER = "spare"


@dataclass(frozen=True, kw_only=True)
class SpareRecord:
    """What the spare tar of one shard holds; `members` gives every member's size in bytes."""

    name: str
    tar_sha256: str
    tar_bytes: int
    members: dict[str, int]

    def __post_init__(self) -> None:
        for member in self.members:
            schema.split_member(member)


def spare_name(shard: str) -> str:
    """`spare-000123` for `shard-000123`."""
    return f"spare-{schema.shard_index(shard):06d}"


def spare_tar(folder: Path, shard: str) -> Path:
    """Where the spare clips of a shard lie; its record lies beside it."""
    return folder / SPARE_FOLDER / f"{spare_name(shard)}.tar"


def read_spare(folder: Path, shard: str) -> SpareRecord | None:
    """The record of a shard's spare clips; None where there are none.

    Raises:
        ShardError: it is damaged.
    """
    path = spare_tar(folder, shard).with_suffix(".json")
    if not path.is_file():
        return None
    if path.stat().st_size > schema.MAX_RECORD_BYTES:
        raise ShardError(f"{path.name} is too large for a record: remove it and its tar.")
    try:
        data = schema.decode_json(path.read_bytes(), path.name, schema.MAX_RECORD_BYTES)
        record = from_dict(SpareRecord, data)
    except ValueError as error:
        raise ShardError(
            f"{path.name} is not a record of spare clips ({error}): remove it and its tar."
        ) from None
    if record.name != path.stem:
        raise ShardError(f"{path.name} is the record of {record.name}: it was renamed.")
    return record
