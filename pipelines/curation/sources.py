"""The videos that are named on the command line: folders, files, globs, lists, buckets, addresses.

Names are listed and nothing of a video is read, so that millions can be planned. Paths stay
relative to the folder that the command runs in where they were given so. Hidden files and folders
(`.name`) are left out, as by a shell's globs.
"""

# pyright: reportAttributeAccessIssue=false
# (the functions of pyarrow.compute are made when it is imported)

import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.curation import buckets, manifests
from pipelines.curation.plan import SOURCE_COLUMNS, SOURCE_SCHEMA, PlanError
from pipelines.curation.source_rows import (
    SCHEME,
    RowProblems,
    as_path,
    check_some_exist,
    check_uris,
    clean_rows,
    shorten,
)

VIDEO_SUFFIXES = frozenset(
    ".3gp .avi .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .webm .wmv".split()
)
_SUFFIXES = tuple(sorted(VIDEO_SUFFIXES))
# A line of a list that names one video, for which the disk or a bucket need not be asked.
_ONE_VIDEO = r"^(?i:https?)://|^[^*?\[]*(?i:" + "|".join(map(re.escape, _SUFFIXES)) + ")$"
_IS_LIST = "^[^*?]*(?i:" + "|".join(map(re.escape, manifests.MANIFEST_SUFFIXES)) + ")$"
_TOLD_EVERY = 10_000

Tell = Callable[[int], Any]


def read_sources(
    patterns: Sequence[str],
    *,
    limit: int | None = None,
    progress: Tell | None = None,
) -> pa.Table:
    """The videos that patterns stand for, sorted by URI, each once.

    Args:
        patterns: folders (searched through and through for VIDEO_SUFFIXES), files, globs; `.txt`
            lists of any of these, one a line; `.csv`, `.tsv`, `.jsonl` and `.parquet` manifests
            with a video a row; http(s) addresses; the same in `s3://` and `gs://` buckets.
            Relative paths in a list start from the list's folder.
        limit: take only the first so many, after sorting.
        progress: called now and then with how many were found in a pattern so far.

    Returns:
        a table of SOURCE_SCHEMA: uri, and where known licence, uploader, title, and the sha256
        that the video's bytes should have; of rows with one URI the first that knows counts.

    Raises:
        PlanError: a pattern matches nothing, a row is no source, or there is nothing at all.
    """
    if limit is not None and limit < 1:
        raise PlanError(f"got a limit of {limit} sources, expected at least 1.")
    if not patterns:
        raise PlanError("got no sources, expected at least one file, folder, glob or address.")
    tell = progress or (lambda count: None)
    merged = _merge(pa.concat_tables([_expand(str(pattern), tell) for pattern in patterns]))
    return merged if limit is None else merged.slice(0, limit)


def _expand(pattern: str, tell: Tell) -> pa.Table:
    """The sources that one pattern of the command line stands for."""
    is_list = re.match(_IS_LIST, pattern) is not None
    if re.match(SCHEME, pattern) and not os.path.lexists(pattern):
        scheme = pattern.partition(":")[0].lower()
        if is_list and scheme in buckets.SCHEMES:
            with buckets.fetched(pattern, manifests.MAX_MANIFEST_BYTES) as path:
                return _read_list(path, pattern, tell, local=False)
        if is_list and scheme in ("http", "https"):
            raise PlanError(f"got the list {shorten(pattern)}: download it, and give the file.")
        return _table(_found(pattern, tell), "the command line")
    if is_list and os.path.isfile(pattern):
        return _read_list(Path(pattern), pattern, tell, local=True)
    return _table(_found(pattern, tell), f"source {shorten(pattern)}")


def _read_list(path: Path, what: str, tell: Tell, *, local: bool) -> pa.Table:
    if not what.lower().endswith(".txt"):
        return manifests.read_table(path, what, local=local, progress=tell)
    folder = as_path(Path(what).parent) if local else None
    problems = RowProblems(what=what)
    tables: list[pa.Table] = []
    patterns: list[str] = []
    count = 0
    for first, lines in manifests.read_lines(path, what):
        lines = pc.utf8_trim_whitespace(lines)
        idle = pc.or_(pc.equal(lines, ""), pc.starts_with(lines, "#"))
        named = pc.invert(idle)
        numbers = np.flatnonzero(named.to_numpy(zero_copy_only=False)) + first
        rows = clean_rows({"uri": lines.filter(named)}, numbers, folder, problems)
        is_web = pc.match_substring_regex(rows["uri"], "^(?i:https?)://")
        is_list = pc.and_not(pc.match_substring_regex(rows["uri"], _IS_LIST), is_web)
        problems.add("is a list itself", is_list, rows["uri"], numbers)
        is_plain = pc.match_substring_regex(rows["uri"], _ONE_VIDEO)
        tables.append(pa.Table.from_batches([rows.filter(is_plain)]))
        patterns += rows["uri"].filter(pc.invert(is_plain)).to_pylist()
        count += len(rows)
        tell(count)
    problems.check()
    if count == 0:
        raise PlanError(f"{what} holds no videos; expected one file, folder or glob a line.")
    if local:
        check_some_exist(pa.concat_tables(tables)["uri"], what)
    names = [name for pattern in patterns for name in _found(pattern, tell)]
    return pa.concat_tables([*tables, _table(names, what)])


def _found(pattern: str, tell: Tell) -> list[str]:
    """The names that an address, a folder, a file or a glob stands for; never none."""
    exists = os.path.lexists(pattern)
    expected = "an existing file, folder or glob such as 'videos/*.mp4'"
    if os.path.isdir(pattern):
        names = _told(_videos_under(pattern), tell)
        expected = f"videos ({' '.join(_SUFFIXES)}) in it"
    elif exists:
        names = [as_path(pattern)]
    elif pattern.startswith(tuple(f"{scheme}://" for scheme in buckets.SCHEMES)):
        names = buckets.find(pattern, _SUFFIXES)
        expected = f"an existing object, folder or glob of videos ({' '.join(_SUFFIXES)})"
    elif re.match(SCHEME, pattern):
        names = [pattern]
    else:
        names = []
        for match in glob.iglob(pattern, recursive=True):
            if os.path.isdir(match):
                names += _told(_videos_under(match), tell)
            elif os.path.isfile(match):
                names.append(as_path(match))
    if not names:
        raise PlanError(
            f"got source {shorten(pattern)}, which holds no videos; expected {expected}."
        )
    return names


def _videos_under(folder: str) -> Iterator[str]:
    path = as_path(folder)
    left = ["" if path == "." else path.rstrip("/") + "/"]
    while left:
        start = left.pop()
        try:
            with os.scandir(start or ".") as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    # A link to a folder could lead in a circle.
                    if entry.is_dir(follow_symlinks=False):
                        left.append(f"{start}{entry.name}/")
                    elif entry.name.lower().endswith(_SUFFIXES) and entry.is_file():
                        yield as_path(start + entry.name) if not start else start + entry.name
        except OSError as error:
            raise PlanError(
                f"the folder {shorten(start)} cannot be listed ({error.strerror}): "
                "mend its rights, or name the folders beside it."
            ) from None


def _told(names: Iterator[str], tell: Tell) -> list[str]:
    found = []
    for name in names:
        found.append(name)
        if len(found) % _TOLD_EVERY == 0:
            tell(len(found))
    tell(len(found))
    return found


def _table(names: list[str], what: str) -> pa.Table:
    """Names as rows of which nothing else is known."""
    try:
        uris = pa.array(names, SOURCE_SCHEMA.field("uri").type)
    except UnicodeEncodeError:
        bad = [name for name in names if not name.isprintable() and _is_no_text(name)]
        raise PlanError(
            f"{what} holds {len(bad)} names that are not UTF-8, such as {shorten(bad[0])}: "
            "rename the files."
        ) from None
    problems = RowProblems(what=what)
    check_uris(uris, range(1, len(uris) + 1), problems, may_be_local=True)
    problems.check()
    unknown = pa.nulls(len(uris), pa.large_string())
    return pa.table([uris, *[unknown] * (len(SOURCE_COLUMNS) - 1)], schema=SOURCE_SCHEMA)


def _is_no_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return True
    return False


def _merge(table: pa.Table) -> pa.Table:
    """The rows sorted by URI, each URI once."""
    # The sort is stable: of rows with one URI, the one that was named first comes first.
    table = table.take(pc.sort_indices(table["uri"]))
    uris = table["uri"].combine_chunks()
    if isinstance(uris, pa.ChunkedArray):
        uris = uris.combine_chunks()
    again = pc.equal(uris.slice(1), uris.slice(0, len(uris) - 1))
    if not pc.any(again).as_py():
        return table
    repeated = pc.is_in(uris, value_set=pc.unique(uris.slice(1).filter(again)))
    merged = (
        table.filter(repeated)
        .group_by("uri", use_threads=False)
        .aggregate([(name, "first") for name in SOURCE_COLUMNS[1:]])
    )
    merged = merged.rename_columns(list(SOURCE_COLUMNS)).cast(SOURCE_SCHEMA)
    single = table.filter(pc.invert(repeated))
    both = pa.concat_tables([single, merged])
    return both.take(pc.sort_indices(both["uri"]))
