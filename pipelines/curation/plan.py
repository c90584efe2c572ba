"""What a run will do, fixed before it starts: sorted sources, divided into shards by their number.

`plan.json` in the output folder holds the settings and a hash of the sources; `plan.arrow` holds
the sources, one row each, and is mapped into memory rather than read. A second run into the folder
must have the same plan; it then does what is left of it.
"""

# pyright: reportAttributeAccessIssue=false
# (the functions of pyarrow.compute are made when it is imported)

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import schema
from pipelines.curation.config import CurationConfig, is_threshold, outcome
from pipelines.overrides import config_hash, differences, from_dict, to_dict
from pipelines.shards import write_atomic

PLAN_FILE = "plan.json"
TABLE_FILE = "plan.arrow"
PLAN_FORMAT = 2
SOURCES_PER_SHARD = 8
# More shards than this make the folder slow to list, above all on a shared file system.
MAX_SHARDS = 32_000
SOURCE_COLUMNS = ("uri", "licence", "uploader", "title", "sha256")
SOURCE_SCHEMA = pa.schema(
    # Offsets of 64 bits: five million long addresses pass 2 GiB.
    [pa.field(name, pa.large_string(), nullable=name != "uri") for name in SOURCE_COLUMNS]
)
_CHUNK_ROWS = 1 << 16
_MAX_LISTED = 12
_MAX_EXAMPLES = 3
_ROW_END = pa.scalar("\n", pa.large_string())
_FIELD_END = pa.scalar("\x1f", pa.large_string())


class PlanError(ValueError):
    """A run that cannot start: no sources, or a folder that belongs to another plan."""


@dataclass(frozen=True, kw_only=True)
class PlannedSource:
    """One row of the plan: a video by its name, and what is known of it beforehand.

    id: 16 hex digits of the SHA-256 of the URI; expected_sha256: of the bytes, where a manifest
    gives it.
    """

    id: str
    uri: str
    licence: str | None = None
    uploader: str | None = None
    title: str | None = None
    expected_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class PlannedShard:
    """A shard's name and its number, from which its sources follow."""

    name: str
    index: int


class PlanTable:
    """The sources of a plan, one row each; only the rows that are asked for are read.

    One that lies in a file travels to other processes as the file's name.
    """

    def __init__(self, table: pa.Table | None = None, path: Path | None = None) -> None:
        if table is None and path is None:
            raise TypeError("expected a table or the path of one")
        self.path = path
        self._table = table

    @property
    def arrow(self) -> pa.Table:
        """All rows, with the columns of SOURCE_SCHEMA; mapped into memory where they are a file."""
        if self._table is None:
            self._table = pa.ipc.open_file(pa.memory_map(str(self.path))).read_all()
        return self._table

    def rows(self, start: int, stop: int) -> list[PlannedSource]:
        """The sources of rows `start` to `stop`, in order."""
        return [
            PlannedSource(
                id=source_id(row["uri"]),
                uri=row["uri"],
                licence=row["licence"],
                uploader=row["uploader"],
                title=row["title"],
                expected_sha256=row["sha256"],
            )
            for row in self.arrow.slice(start, stop - start).to_pylist()
        ]

    def ids(self, start: int, stop: int) -> list[str]:
        """The ids of rows `start` to `stop`, in order."""
        return [source_id(uri) for uri in self.arrow["uri"].slice(start, stop - start).to_pylist()]

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_table": self._table if self.path is None else None}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole run, before it starts. Two plans are equal when settings and sources are."""

    config: CurationConfig
    config_hash: str
    num_sources: int
    sources_per_shard: int
    table_sha256: str
    models: dict[str, str] = field(default_factory=dict)
    format: int = PLAN_FORMAT
    table: PlanTable = field(compare=False, repr=False)

    @property
    def num_shards(self) -> int:
        """How many shards there are; the last may have fewer sources than the others."""
        return -(-self.num_sources // self.sources_per_shard)

    def shard(self, index: int) -> PlannedShard:
        """The shard of that number. Raises IndexError where the plan has none."""
        if not 0 <= index < self.num_shards:
            raise IndexError(f"shard {index} is not in a plan of {self.num_shards} shards")
        return PlannedShard(name=schema.shard_name(index), index=index)

    def shards(self) -> Iterator[PlannedShard]:
        """Every shard, in order."""
        return map(self.shard, range(self.num_shards))

    def shard_rows(self, index: int) -> list[PlannedSource]:
        """The sources of a shard, in order."""
        return self.table.rows(*self._span(index))

    def shard_ids(self, index: int) -> list[str]:
        """The ids of a shard's sources, in order."""
        return self.table.ids(*self._span(index))

    def _span(self, index: int) -> tuple[int, int]:
        start = self.shard(index).index * self.sources_per_shard
        return start, min(start + self.sources_per_shard, self.num_sources)


def source_id(uri: str) -> str:
    """The id of a source by its name: 16 hex digits."""
    return hashlib.sha256(uri.encode()).hexdigest()[:16]


def shard_size(num_sources: int, config: CurationConfig) -> int:
    """Sources a shard: as set, else 8, and more where that would make very many shards."""
    return config.output.sources_per_shard or max(SOURCES_PER_SHARD, -(-num_sources // MAX_SHARDS))


def make_plan(
    sources: pa.Table, config: CurationConfig, models: dict[str, str] | None = None
) -> Plan:
    """Divide the sources that `read_sources` found; the same inputs give the same plan.

    Raises:
        PlanError: there are no sources.
    """
    if sources.num_rows == 0:
        raise PlanError("got no sources, expected at least one video.")
    sources = sources.select(SOURCE_COLUMNS).cast(SOURCE_SCHEMA)
    return Plan(
        config=config,
        config_hash=config_hash(outcome(config)),
        num_sources=sources.num_rows,
        sources_per_shard=shard_size(sources.num_rows, config),
        table_sha256=_table_sha256(sources),
        models=models or {},
        table=PlanTable(sources),
    )


def save_plan(folder: Path, plan: Plan) -> Plan:
    """Write the plan into the folder, or check that the folder's own plan is the same.

    Settings that do not decide what comes of a run may differ; the new ones are then kept.

    Returns:
        the plan with its sources in the folder's file instead of in memory.

    Raises:
        PlanError: the folder belongs to another plan; the message lists what differs.
    """
    if (folder / PLAN_FILE).exists():
        before = load_plan(folder)
        changes = list_changes(before, plan)
        if changes:
            raise PlanError(_refusal(folder, before, plan, changes))
        if before.config != plan.config:
            _write_settings(folder, plan)
    else:
        if any(folder.glob("shard-*")):
            raise PlanError(f"{folder} holds shards but no {PLAN_FILE}: give another --out folder.")
        _write_table(folder / TABLE_FILE, plan.table.arrow)
        _write_settings(folder, plan)
    return replace(plan, table=PlanTable(path=(folder / TABLE_FILE).resolve()))


def list_changes(before: Plan, after: Plan) -> list[str]:
    """Lines on all that decides what comes of a run and differs between two plans; none if same."""
    lines = _setting_changes(before, after)
    lines += differences(before.models, after.models, "models")
    if before.table_sha256 != after.table_sha256:
        lines += _source_changes(before.table.arrow, after.table.arrow)
    if not lines and before.sources_per_shard != after.sources_per_shard:
        lines.append(
            f"sources a shard: {before.sources_per_shard} → {after.sources_per_shard} "
            "(the plan is of another version)"
        )
    return lines


def replace_config(folder: Path, config: CurationConfig) -> Plan:
    """Give the folder's plan other settings, its sources and shards staying as they are.

    Raises:
        PlanError: there is no plan, or the settings divide the sources otherwise.
    """
    before = load_plan(folder)
    if shard_size(before.num_sources, config) != before.sources_per_shard:
        raise PlanError(
            f"output.sources_per_shard={config.output.sources_per_shard} divides the sources of "
            f"{folder} otherwise than its {before.sources_per_shard} a shard: leave it as it was."
        )
    plan = replace(before, config=config, config_hash=config_hash(outcome(config)))
    _write_settings(folder, plan)
    return plan


def load_plan(folder: Path) -> Plan:
    """The plan of a folder. Raises PlanError where there is none or it is damaged."""
    path = folder / PLAN_FILE
    try:
        data = schema.decode_json(path.read_bytes(), str(path))
    except OSError:
        raise PlanError(f"{folder} holds no {PLAN_FILE}: it is no folder of a run.") from None
    except ValueError as error:
        raise PlanError(f"{path} cannot be read: {error}") from None
    if data.get("format") != PLAN_FORMAT:
        raise PlanError(
            f"{path} has format {data.get('format')!r}, expected {PLAN_FORMAT}: another version "
            "began it. Go on with that version, or curate into another --out folder."
        )
    try:
        table = PlanTable(path=(folder / TABLE_FILE).resolve())
        plan = Plan(**_settings_from(data), table=table)
        if table.arrow.num_rows != plan.num_sources or table.arrow.schema != SOURCE_SCHEMA:
            raise ValueError(f"it holds {table.arrow.num_rows} rows, not {plan.num_sources}")
        return plan
    except (OSError, ValueError, TypeError) as error:
        raise PlanError(f"the plan in {folder} is damaged ({TABLE_FILE}): {error}") from None


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What `plan.json` holds."""

    config: CurationConfig
    config_hash: str
    num_sources: int
    sources_per_shard: int
    table_sha256: str
    models: dict[str, str]
    format: int

    def __post_init__(self) -> None:
        if self.num_sources < 1 or self.sources_per_shard < 1:
            raise ValueError("expected at least one source, and one a shard")


def _settings_from(data: dict[str, Any]) -> dict[str, Any]:
    settings = from_dict(_Settings, data)
    return {name: getattr(settings, name) for name in _Settings.__dataclass_fields__}


def _write_settings(folder: Path, plan: Plan) -> None:
    data = {name: to_dict(getattr(plan, name)) for name in _Settings.__dataclass_fields__}
    write_atomic(folder / PLAN_FILE, schema.encode_json(data, digits=17))


def _write_table(path: Path, table: pa.Table) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as stream:
        with pa.ipc.new_file(stream, SOURCE_SCHEMA) as writer:
            writer.write_table(table, max_chunksize=_CHUNK_ROWS)
        stream.flush()
        os.fsync(stream.fileno())
    # `plan.json` is written next, with a flush of the folder: it is the commit of both.
    os.replace(temporary, path)


def _table_sha256(table: pa.Table) -> str:
    """SHA-256 (hex) of what the rows say, whatever their layout in memory."""
    digest = hashlib.sha256()
    for batch in table.to_batches(max_chunksize=_CHUNK_ROWS):
        # No field holds a control character, so these four keep rows and fields apart.
        lines = pc.binary_join_element_wise(
            *batch.columns, _ROW_END, _FIELD_END, null_handling="replace", null_replacement="\x00"
        )
        num_bytes = pc.sum(pc.binary_length(lines)).as_py()
        digest.update(memoryview(lines.buffers()[2])[:num_bytes])
    return digest.hexdigest()


def _refusal(folder: Path, before: Plan, after: Plan, changes: list[str]) -> str:
    listed = "\n  ".join(changes[:_MAX_LISTED])
    more = f"\n  and {len(changes) - _MAX_LISTED} more" if len(changes) > _MAX_LISTED else ""
    changed = _setting_changes(before, after)
    revise = ""
    if len(changed) == len(changes) and all(
        is_threshold(line.partition(":")[0]) for line in changed
    ):
        revise = f" Thresholds of a run can be changed with `animator curate revise {folder}`."
    return (
        f"{folder} was begun with other settings or sources:\n  {listed}{more}\n"
        f"Give the same ones to go on with it, or another --out folder.{revise}"
    )


def _setting_changes(before: Plan, after: Plan) -> list[str]:
    return differences(outcome(before.config), outcome(after.config))


def _source_changes(before: pa.Table, after: pa.Table) -> list[str]:
    """Which sources are gone, new, or described otherwise: counts and a few of each."""
    kept = pc.is_in(before["uri"], value_set=_values(after["uri"]))
    found = pc.is_in(after["uri"], value_set=_values(before["uri"]))
    lines = _examples("no longer there", before["uri"].filter(pc.invert(kept)))
    lines += _examples("new", after["uri"].filter(pc.invert(found)))
    # Both are sorted by a unique name, so what they share lies in the same order.
    before, after = before.filter(kept), after.filter(found)
    for name in SOURCE_COLUMNS[1:]:
        other = pc.not_equal(pc.fill_null(before[name], "\x00"), pc.fill_null(after[name], "\x00"))
        lines += _examples(f"with another {name}", before["uri"].filter(other))
    return lines or ["the order of the sources (the plan is damaged)"]


def _values(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks()
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def _examples(what: str, uris: pa.ChunkedArray) -> list[str]:
    if len(uris) == 0:
        return []
    shown = ", ".join(uris.slice(0, _MAX_EXAMPLES).to_pylist())
    more = ", …" if len(uris) > _MAX_EXAMPLES else ""
    count = "source" if len(uris) == 1 else "sources"
    return [f"{len(uris)} {count} {what}: {shown}{more}"]
