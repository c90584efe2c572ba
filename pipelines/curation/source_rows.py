"""The rules for one row of a list of videos, applied to whole columns at a time.

A list is what somebody else wrote, so every row is checked before it becomes a source: a row is a
path on this machine (only where the list is a file of this machine), an http(s) address, or an
object in a bucket (s3://, gs://); never another scheme, and never an address with a password.
"""

# pyright: reportAttributeAccessIssue=false
# (the functions of pyarrow.compute are made when it is imported)

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.curation.plan import SOURCE_COLUMNS, SOURCE_SCHEMA, PlanError

MAX_URI_BYTES = 4096
SCHEME = r"^[A-Za-z][A-Za-z0-9+.-]*:"
_MAX_TEXT = 1000
_MAX_SHOWN = 5
_SAMPLE = 20
_TEXT = pa.large_string()
_CONTROL = r"[\p{Cc}\p{Zl}\p{Zp}]"
_WEB = r"(?i:https?)://(?:\[[0-9A-Fa-f:.]+\]|[^/?#:@\\\[\]]+)(?::[0-9]+)?(?:[/?#]|$)"
_BUCKET = r"(?:s3|gs)://[^/]+/."
Numbers = Sequence[int] | np.ndarray
_EXPECTED = "a path, http(s)://…, s3://… or gs://…"


@dataclass(kw_only=True)
class RowProblems:
    """The rows of one manifest that are no sources: how many, and the first few."""

    what: str
    count: int = 0
    first: list[tuple[int, str]] = field(default_factory=list)

    def add(self, why: str, bad: pa.Array, uris: pa.Array, numbers: Numbers) -> None:
        """Note the rows where `bad` is true, by their numbers."""
        indices = pc.indices_nonzero(bad)
        self.count += len(indices)
        for index in indices.slice(0, _MAX_SHOWN).to_pylist():
            number = int(numbers[index])
            self.first.append((number, f"row {number} {why}: {shorten(uris[index].as_py())}"))
        self.first = sorted(self.first)[:_MAX_SHOWN]

    def check(self) -> None:
        """Raises PlanError if there are any."""
        if self.count:
            listed = "\n  ".join(text for _, text in self.first)
            more = self.count - len(self.first)
            raise PlanError(
                f"{self.what} names {self.count} {'source' if self.count == 1 else 'sources'} that "
                f"cannot be taken:\n  {listed}"
                + (f"\n  and {more} more" if more else "")
                + f"\nExpected {_EXPECTED} in each; mend or remove them."
            )


def clean_rows(
    columns: dict[str, pa.Array],
    numbers: Numbers,
    folder: str | None,
    problems: RowProblems,
) -> pa.RecordBatch:
    """Rows as a plan holds them; those that are no sources are noted in `problems`.

    Args:
        columns: `uri` and any others of SOURCE_COLUMNS, as text.
        numbers: of the rows, for messages.
        folder: where relative paths start; None where no path of this machine may be named.
    """
    uris = pc.utf8_trim_whitespace(pc.fill_null(columns["uri"], ""))
    check_uris(uris, numbers, problems, may_be_local=folder is not None)
    hashes = pc.ascii_lower(_text(columns, "sha256", len(uris)))
    problems.add("has a sha256 that is not 64 hex digits", _is_no_hash(hashes), uris, numbers)
    if folder is not None:
        uris = _placed(uris, folder)
    others = [_text(columns, name, len(uris)) for name in SOURCE_COLUMNS[1:-1]]
    return pa.RecordBatch.from_arrays([uris, *others, hashes], schema=SOURCE_SCHEMA)


def check_uris(
    uris: pa.Array, numbers: Numbers, problems: RowProblems, *, may_be_local: bool
) -> None:
    """Note in `problems` the names that are no sources; each is noted for one reason."""
    fine = pa.array(np.ones(len(uris), bool))
    for why, bad in _uri_problems(uris, may_be_local=may_be_local):
        problems.add(why, pc.and_(bad, fine), uris, numbers)
        fine = pc.and_not(fine, bad)


def as_path(path: str | Path) -> str:
    """A path of this machine, so written that it cannot be taken for an address."""
    text = str(Path(path))
    return f"./{text}" if re.match(SCHEME, text) else text


def check_some_exist(uris: pa.ChunkedArray, what: str) -> None:
    """Raises PlanError where none of a few local files of a list exists: the folder is wrong."""
    local = uris.filter(pc.invert(pc.match_substring_regex(uris, SCHEME)))
    step = max(1, len(local) // _SAMPLE)
    sample = [local[index].as_py() for index in range(0, len(local), step)][:_SAMPLE]
    if sample and not any(os.path.lexists(uri) for uri in sample):
        raise PlanError(
            f"{what} lists files that do not exist, such as {shorten(sample[0])}; expected paths "
            f"that are whole or start from the list's own folder ({Path(what).parent})."
        )


def _uri_problems(uris: pa.Array, *, may_be_local: bool) -> Iterator[tuple[str, pa.Array]]:
    """Each thing that can be wrong with a row's URI, and the rows in which it is."""

    def matches(pattern: str) -> pa.Array:
        return pc.match_substring_regex(uris, pattern)

    yield "is empty", pc.equal(uris, "")
    yield f"is longer than {MAX_URI_BYTES} bytes", pc.greater(pc.binary_length(uris), MAX_URI_BYTES)
    yield "holds control characters", matches(_CONTROL)
    yield "has a user or password in its address", matches(r"^(?i:https?)://[^/?#]*@")
    # fsspec reads `::` as one file system inside another.
    yield "has '::' in its address", matches(r"^(?:s3|gs)://.*::")
    known = matches(f"^(?:{_WEB}|{_BUCKET})")
    has_scheme = matches(SCHEME)
    yield (
        "is an address of a kind that is not fetched (a file whose name has a colon: ./NAME)",
        pc.and_not(has_scheme, known),
    )
    if not may_be_local:
        yield (
            "is a path of this machine, which only a manifest on this machine may name",
            pc.invert(has_scheme),
        )


def _is_no_hash(hashes: pa.Array) -> pa.Array:
    bad = pc.invert(pc.match_substring_regex(hashes, r"^[0-9a-f]{64}$"))
    return pc.fill_null(bad, False)


def _placed(uris: pa.Array, folder: str) -> pa.Array:
    """Relative paths moved from the manifest's folder to where this process is."""
    bare = pc.replace_substring_regex(uris, r"^(?:\./+)+", "")
    if folder == ".":
        # `./a:b.mp4` would become an address without its `./`.
        return pc.if_else(pc.match_substring_regex(bare, SCHEME), uris, bare)
    relative = pc.invert(pc.match_substring_regex(uris, rf"^/|{SCHEME}"))
    joined = pc.binary_join_element_wise(
        pa.scalar(folder.rstrip("/"), _TEXT), bare, pa.scalar("/", _TEXT)
    )
    return pc.if_else(relative, joined, uris)


def _text(columns: dict[str, pa.Array], name: str, length: int) -> pa.Array:
    """A column of what is known of a video, on one line each; an empty text is null."""
    if name not in columns:
        return pa.nulls(length, _TEXT)
    text = pc.replace_substring_regex(columns[name], rf"(?:{_CONTROL}|\s)+", " ")
    text = pc.utf8_slice_codeunits(pc.utf8_trim_whitespace(text), 0, _MAX_TEXT)
    return pc.if_else(pc.equal(text, ""), pa.scalar(None, _TEXT), text)


def shorten(text: str | None) -> str:
    """A text for a message: quoted, nothing in it acted on, and not too long."""
    text = repr(text)
    return text if len(text) <= 100 else f"{text[:96]}…{text[-1]}"
