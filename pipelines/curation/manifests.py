"""Lists of videos in files: .txt, .csv, .tsv, .jsonl and .parquet, read column by column.

A relative path in a list starts from the list's own folder.
"""

# pyright: reportAttributeAccessIssue=false
# (the functions of pyarrow.compute are made when it is imported)

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from pipelines.curation.plan import SOURCE_SCHEMA, PlanError
from pipelines.curation.source_rows import (
    RowProblems,
    as_path,
    check_some_exist,
    clean_rows,
    shorten,
)

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
MANIFEST_SUFFIXES = (".txt", *TABLE_SUFFIXES)
MAX_MANIFEST_BYTES = 16 << 30
MAX_ROWS = 50_000_000
# A manifest's names for the columns of SOURCE_COLUMNS, in any case; the first that is there counts.
COLUMN_NAMES = {
    "uri": (
        "uri url path file video video_url video_uri video_path filename file_name file_path "
        "filepath webpage_url link source"
    ).split(),
    "licence": ["licence", "license"],
    "uploader": ["uploader", "author", "creator", "channel", "user"],
    "title": ["title"],
    "sha256": ["sha256", "sha_256", "content_sha256", "expected_sha256"],
}
_HEAD_BYTES = 1 << 20
_BLOCK_BYTES = 8 << 20
_SAMPLE = 20
_TEXT = pa.large_string()

Columns = dict[str, pa.Array]


def read_table(
    path: Path, what: str, *, local: bool, progress: Callable[[int], Any] | None = None
) -> pa.Table:
    """The sources that a .csv, .tsv, .jsonl or .parquet manifest lists, in its order.

    Args:
        path: the file; what: its name for messages.
        local: whether it is a file of this machine, and so may name others.

    Raises:
        PlanError: no column of sources, a damaged or huge file, rows that are no sources.
    """
    _check_size(path.stat().st_size, what)
    suffix = Path(what).suffix.lower()
    folder = as_path(Path(what).parent) if local else None
    problems = RowProblems(what=what)
    done: list[pa.RecordBatch] = []
    row = 1
    try:
        for columns in _READERS[suffix](path, what):
            numbers = range(row, row + len(columns["uri"]))
            done.append(clean_rows(columns, numbers, folder, problems))
            row = numbers.stop
            if row > MAX_ROWS:
                raise PlanError(f"{what} has more than {MAX_ROWS} rows: divide it.")
            if progress:
                progress(row - 1)
    except (pa.ArrowException, OSError, UnicodeError, csv.Error) as error:
        text = " ".join(str(error).split())[:300]
        if "straddl" in text:
            text = f"a row, or text between quotes, has over {_BLOCK_BYTES} bytes"
        raise PlanError(f"{what} cannot be read: {text}") from None
    problems.check()
    table = pa.Table.from_batches(done, SOURCE_SCHEMA)
    if table.num_rows == 0:
        raise PlanError(f"{what} has no rows, expected a video in each.")
    if local:
        check_some_exist(table["uri"], what)
    return table


def read_lines(path: Path, what: str) -> Iterator[tuple[int, pa.Array]]:
    """The lines of a .txt list in blocks: (number of the first line, lines), as they stand.

    Raises:
        PlanError: huge, or no text.
    """
    _check_size(path.stat().st_size, what)
    number, rest = 1, b""
    try:
        with path.open("rb") as stream:
            rest = stream.read(len(codecs.BOM_UTF8)).removeprefix(codecs.BOM_UTF8)
            while block := stream.read(_BLOCK_BYTES):
                complete, newline, rest = (rest + block).rpartition(b"\n")
                if len(rest) > _BLOCK_BYTES:
                    raise PlanError(f"{what} has a line of megabytes: it is no list of videos.")
                if not newline:
                    continue
                lines = _split(complete)
                yield number, lines
                number += len(lines)
        yield number, _split(rest)
    except (OSError, UnicodeError) as error:
        raise PlanError(f"{what} cannot be read as UTF-8 text: {error}") from None


def _read_csv(path: Path, what: str) -> Iterator[Columns]:
    delimiter = "\t" if Path(what).suffix.lower() == ".tsv" else ","
    with path.open("rb") as stream:
        head = stream.read(_HEAD_BYTES)
    text = io.StringIO(head.decode("utf-8-sig", errors="replace"), newline="")
    names = next(csv.reader(text, delimiter=delimiter), [])
    chosen = _choose_columns(names, what)
    reader = pyarrow.csv.open_csv(
        path,
        read_options=pyarrow.csv.ReadOptions(block_size=_BLOCK_BYTES),
        parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            include_columns=list(chosen.values()),
            column_types=dict.fromkeys(chosen.values(), _TEXT),
            strings_can_be_null=False,
        ),
    )
    return _renamed(reader, chosen)


def _read_jsonl(path: Path, what: str) -> Iterator[Columns]:
    with path.open("rb") as stream:
        head = stream.read(_HEAD_BYTES)
    names: dict[str, None] = {}
    for line in head.splitlines()[:100]:
        try:
            row = json.loads(line)
        # The last line may be cut; others are complained of where they are read.
        except (ValueError, RecursionError):
            continue
        names.update(dict.fromkeys(row if isinstance(row, dict) else []))
    chosen = _choose_columns(list(names), what)
    reader = pyarrow.json.open_json(
        path,
        read_options=pyarrow.json.ReadOptions(block_size=_BLOCK_BYTES),
        parse_options=pyarrow.json.ParseOptions(
            explicit_schema=pa.schema([(name, _TEXT) for name in chosen.values()]),
            unexpected_field_behavior="ignore",
        ),
    )
    return _renamed(reader, chosen)


def _read_parquet(path: Path, what: str) -> Iterator[Columns]:
    file = pyarrow.parquet.ParquetFile(path, thrift_string_size_limit=1 << 26)
    chosen = _choose_columns(file.schema_arrow.names, what)
    for name in chosen.values():
        kind = file.schema_arrow.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.null()):
            raise PlanError(f"{what} has {kind} in its column {name!r}, expected text.")
    groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
    _check_size(sum(group.total_byte_size for group in groups), what)
    return _renamed(file.iter_batches(columns=list(chosen.values())), chosen)


def _renamed(batches: Iterable[pa.RecordBatch], chosen: dict[str, str]) -> Iterator[Columns]:
    for batch in batches:
        yield {ours: batch.column(theirs).cast(_TEXT) for ours, theirs in chosen.items()}


_READERS: dict[str, Callable[[Path, str], Iterator[Columns]]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
}


def _choose_columns(names: list[str], what: str) -> dict[str, str]:
    """Which of a manifest's columns is which of ours: {ours: theirs}."""
    by_lower: dict[str, str] = {}
    for name in names:
        by_lower.setdefault(name.strip().lower(), name)
    chosen = {}
    for ours, accepted in COLUMN_NAMES.items():
        theirs = next((by_lower[name] for name in accepted if name in by_lower), None)
        if theirs is not None and names.count(theirs) > 1:
            raise PlanError(f"{what} has two columns named {theirs!r}, expected one.")
        if theirs is not None:
            chosen[ours] = theirs
    if "uri" not in chosen:
        listed = ", ".join(shorten(name) for name in names[:_SAMPLE])
        raise PlanError(
            f"{what} has {f'the columns {listed}' if names else 'no columns'}; expected one of "
            f"{', '.join(COLUMN_NAMES['uri'])}."
        )
    return chosen


def _check_size(num_bytes: int, what: str) -> None:
    if num_bytes > MAX_MANIFEST_BYTES:
        raise PlanError(
            f"{what} has {num_bytes} bytes, expected at most {MAX_MANIFEST_BYTES}: divide it."
        )


def _split(block: bytes) -> pa.Array:
    lines = pc.split_pattern(pa.array([block.decode()], _TEXT), "\n")
    return pc.list_flatten(lines)
