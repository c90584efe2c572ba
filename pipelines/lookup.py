"""Find what is known of a clip or a source in a folder of shards, kept or not, by its name."""

import difflib
from dataclasses import dataclass
from pathlib import Path, PurePath

from pipelines.schema import ClipRecord, SourceRecord
from pipelines.shards import iter_records

# Comparing names by letters is slow; beyond this many the nearest is not looked for.
_MAX_COMPARED = 200_000


class NotFoundError(ValueError):
    """No clip and no source of that name; the message says which names are near."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A source, and the clip of it that was asked for; None where the source was."""

    shard: str
    source: SourceRecord
    clip: ClipRecord | None = None


def find(folder: Path | str, name: str) -> Found:
    """What has the name: a clip's key, or a source's id, URI or file name; the first of several.

    The records are read one at a time.

    Raises:
        NotFoundError: there is none.
        ShardError: the folder holds no shards, or a record is damaged.
    """
    near: list[str] = []
    compared = 0
    for record in iter_records(Path(folder)):
        names: list[str] = []
        for source in record.sources:
            for clip in source.clips:
                if clip.key == name:
                    return Found(shard=record.name, source=source, clip=clip)
                names.append(clip.key)
            files = [PurePath(uri).name for uri in source.uris]
            if name in (source.id, *source.uris, *files):
                return Found(shard=record.name, source=source)
            names += [source.id, *files]
        if compared < _MAX_COMPARED:
            compared += len(names)
            near = difflib.get_close_matches(name, [*near, *names], n=3, cutoff=0.7)
    listed = f"the nearest are {', '.join(dict.fromkeys(near))}" if near else "none is near"
    raise NotFoundError(
        f"{folder} knows no clip or source {name!r}; {listed}. `animator shards show {folder}` "
        "lists its clips."
    )
