"""The videos that are named on the command line: folders, files, globs; nothing of them is read."""

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.curation.plan import SOURCE_SCHEMA, PlanError

VIDEO_SUFFIXES = frozenset(
    ".3gp .avi .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .webm .wmv".split()
)


def read_sources(
    patterns: Sequence[str],
    *,
    limit: int | None = None,
    progress: Callable[[int], Any] | None = None,
) -> pa.Table:
    """The videos that folders, files and globs stand for, sorted by URI, each once.

    Raises:
        PlanError: a pattern matches nothing, or there is nothing at all.
    """
    found: set[str] = set()
    for pattern in map(str, patterns):
        path = Path(pattern)
        if path.is_dir():
            files = list(_videos_under(pattern))
        elif path.exists():
            files = [pattern]
        else:
            files = [name for name in glob.glob(pattern, recursive=True) if Path(name).is_file()]
        if not files:
            raise PlanError(f"got source {pattern!r}, which holds no videos.")
        found.update(files)
    uris = sorted(found)[:limit]
    empty = [None] * len(uris)
    return pa.table([uris, *[empty] * 4], schema=SOURCE_SCHEMA)


def _videos_under(folder: str) -> Iterator[str]:
    for root, _, names in os.walk(folder):
        for name in names:
            if Path(name).suffix.lower() in VIDEO_SUFFIXES:
                yield os.path.join(root, name)
