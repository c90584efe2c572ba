"""What a run will do, fixed before it starts: sources by content, shards as lists of sources.

`plan.json` in the output folder holds the configuration, the sources and the shards. A second run
into the folder must have the same plan; it then does what is left of it.
"""

import glob
import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines import schema
from pipelines.curation.config import CurationConfig
from pipelines.overrides import config_hash, differences, from_dict, to_dict
from pipelines.shards import sha256_file, write_atomic

PLAN_FILE = "plan.json"
VIDEO_SUFFIXES = frozenset(
    ".3gp .avi .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .webm .wmv".split()
)
POSE_SUFFIXES = (".pose.npz", ".dwpose.npz")
_MAX_LISTED = 12


class PlanError(ValueError):
    """A run that cannot start: no sources, or a folder that belongs to another plan."""


@dataclass(frozen=True, kw_only=True)
class PlannedSource:
    """One video by its content; the same bytes under several names are one source.

    `pose_sha256` is of the keypoint file beside it, if any. `error` says why it cannot be read.
    """

    id: str
    sha256: str
    bytes: int
    uris: tuple[str, ...]
    pose_sha256: str | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class PlannedShard:
    """A shard's name and the ids of its sources, in order."""

    name: str
    sources: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole run, before it starts."""

    config: CurationConfig
    config_hash: str
    sources: tuple[PlannedSource, ...]
    shards: tuple[PlannedShard, ...]
    models: dict[str, str] = field(default_factory=dict)
    format: int = schema.FORMAT

    def shard_sources(self, shard: PlannedShard) -> list[PlannedSource]:
        """The sources of a shard, in order."""
        by_id = {source.id: source for source in self.sources}
        return [by_id[source_id] for source_id in shard.sources]


def find_sources(patterns: Sequence[str | Path]) -> list[str]:
    """The files that folders, files and globs stand for, sorted, each once.

    Folders are searched through and through for files with a video's suffix; a file that is named
    itself counts whatever its suffix; a `.txt` file is a list of any of these, one a line.

    Raises:
        PlanError: a pattern matches nothing, or there is nothing at all.
    """
    found: set[str] = set()
    for pattern in map(str, patterns):
        path = Path(pattern)
        if path.is_dir():
            files = _videos_under(path)
            expected = f"videos ({' '.join(sorted(VIDEO_SUFFIXES))}) in it"
        elif path.suffix == ".txt" and path.is_file():
            files, expected = _listed(path), "one file, folder or glob a line"
        elif path.exists():
            files, expected = [pattern], ""
        else:
            matches = [Path(match) for match in glob.glob(pattern, recursive=True)]
            files = [str(match) for match in matches if match.is_file()]
            files += [name for match in matches if match.is_dir() for name in _videos_under(match)]
            expected = "an existing file, folder or glob such as 'videos/*.mp4'"
        if not files:
            raise PlanError(f"got source {pattern!r}, which holds no videos; expected {expected}.")
        found.update(files)
    if not found:
        raise PlanError("got no sources, expected at least one file, folder or glob.")
    return sorted(found)


def make_plan(
    uris: Iterable[str],
    config: CurationConfig,
    models: dict[str, str] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> Plan:
    """Hash every file and divide the sources into shards; the same inputs give the same plan."""
    names = sorted(set(uris))
    by_id: dict[str, PlannedSource] = {}
    with ThreadPoolExecutor(max_workers=4) as pool:
        for done, source in enumerate(pool.map(_read_source, names), 1):
            known = by_id.get(source.id)
            by_id[source.id] = source if known is None else _merge(known, source)
            if progress:
                progress(done)
    sources = tuple(by_id[source_id] for source_id in sorted(by_id))
    size = config.output.sources_per_shard or 8
    shards = tuple(
        PlannedShard(
            name=schema.shard_name(number),
            sources=tuple(source.id for source in sources[start : start + size]),
        )
        for number, start in enumerate(range(0, len(sources), size))
    )
    return Plan(
        config=config,
        config_hash=config_hash(config),
        sources=sources,
        shards=shards,
        models=models or {},
    )


def save_plan(folder: Path, plan: Plan) -> None:
    """Write the plan into the folder, or check that the folder's own plan is the same.

    Raises:
        PlanError: the folder holds shards of another plan; the message lists what differs.
    """
    path = folder / PLAN_FILE
    if path.exists():
        changes = _changes(load_plan(folder), plan)
        if changes:
            listed = "\n  ".join(changes[:_MAX_LISTED])
            more = (
                f"\n  and {len(changes) - _MAX_LISTED} more" if len(changes) > _MAX_LISTED else ""
            )
            raise PlanError(
                f"{folder} was begun with other settings or sources:\n  {listed}{more}\n"
                "Give the same ones to go on with it, or another --out folder."
            )
        return
    if any(folder.glob("shard-*")):
        raise PlanError(f"{folder} holds shards but no {PLAN_FILE}: give another --out folder.")
    write_atomic(path, schema.encode_json(plan, digits=17))


def load_plan(folder: Path) -> Plan:
    """The plan of a folder. Raises PlanError where there is none or it is damaged."""
    path = folder / PLAN_FILE
    try:
        return from_dict(Plan, schema.decode_json(path.read_bytes(), str(path)))
    except OSError:
        raise PlanError(f"{folder} holds no {PLAN_FILE}: it is no folder of a run.") from None
    except ValueError as error:
        raise PlanError(f"{path} cannot be read: {error}") from None


def pose_file(uri: str) -> Path | None:
    """The keypoint file beside a video, if there is one."""
    stem = Path(uri).with_suffix("")
    for suffix in POSE_SUFFIXES:
        path = stem.with_name(stem.name + suffix)
        if path.is_file():
            return path
    return None


def _read_source(uri: str) -> PlannedSource:
    path = Path(uri)
    try:
        if not path.is_file():
            raise OSError(0, "not a regular file")
        sha256, size = sha256_file(path), path.stat().st_size
        keypoints = pose_file(uri)
        pose_sha256 = sha256_file(keypoints) if keypoints else None
    except OSError as error:
        # Its content is unknown, so its name has to stand for it.
        name_hash = hashlib.sha256(f"unreadable:{uri}".encode()).hexdigest()
        return PlannedSource(
            id=name_hash[:16],
            sha256="",
            bytes=0,
            uris=(uri,),
            error=f"cannot be read: {error.strerror or error}",
        )
    return PlannedSource(
        id=sha256[:16], sha256=sha256, bytes=size, uris=(uri,), pose_sha256=pose_sha256
    )


def _merge(one: PlannedSource, other: PlannedSource) -> PlannedSource:
    """Two names of one content; a name with keypoints beside it comes first."""
    if one.sha256 != other.sha256:
        raise PlanError(f"{one.uris[0]} and {other.uris[0]} share the id {one.id}: remove one.")
    pairs = [(uri, source.pose_sha256) for source in (one, other) for uri in source.uris]
    pairs.sort(key=lambda pair: (pose_file(pair[0]) is None, pair[0]))
    return PlannedSource(
        id=one.id,
        sha256=one.sha256,
        bytes=one.bytes,
        uris=tuple(uri for uri, _ in pairs),
        pose_sha256=pairs[0][1],
    )


def _listed(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    entries = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return find_sources([entry for entry in entries if not entry.endswith(".txt")])


def _videos_under(folder: Path) -> list[str]:
    return [
        str(path)
        for path in folder.rglob("*")
        if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()
    ]


def _changes(before: Plan, after: Plan) -> list[str]:
    lines = differences(to_dict(before.config), to_dict(after.config))
    lines += differences(before.models, after.models, "models")
    old = {source.id: source for source in before.sources}
    new = {source.id: source for source in after.sources}
    lines += [
        f"source no longer there: {old[key].uris[0]}" for key in sorted(old.keys() - new.keys())
    ]
    lines += [f"source that is new: {new[key].uris[0]}" for key in sorted(new.keys() - old.keys())]
    for key in sorted(old.keys() & new.keys()):
        lines += differences(to_dict(old[key]), to_dict(new[key]), f"source {key}")
    if not lines and before != after:
        lines.append("the division into shards (the plan is of another version)")
    return lines
