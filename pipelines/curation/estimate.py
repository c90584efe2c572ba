"""What a run would do and cost, before it is begun (`--dry-run`), and what of it is not known.

Times come from the folder's own `timings.jsonl` where it has one, else from a benchmark; lengths
from the headers of a few local files. What lies behind an address is not asked.
"""

# pyright: reportAttributeAccessIssue=false
# (the functions of pyarrow.compute are made when it is imported)

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.curation.ledger import DoneShards, scan_done
from pipelines.curation.plan import PLAN_FILE, Plan, PlanError, list_changes, load_plan
from pipelines.curation.source_rows import SCHEME
from pipelines.curation.timings import read_timings
from pipelines.video import VideoError, probe

# Of 39 clips of 400 s in all (docs/benchmarks/2026-11-23-curation.md): 2 workers took 600 s on a
# machine that was busy besides, so this is an upper bound; 37.5 MB were stored.
WORKER_SECONDS_PER_VIDEO_SECOND = 3.0
STORED_BYTES_PER_VIDEO_SECOND = 94_000
BENCHMARK = "docs/benchmarks/2026-11-23-curation.md"
# Fewer sources than this say little of the others.
MIN_TIMED = 20
_MAX_SAMPLE = 20
_MAX_PLACES = 10


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A run in numbers; None where something is not known, and `notes` say why.

    places: sources by where they lie: `files`, or scheme and host or bucket.
    sources_left: those in shards that are not done.
    video_hours, source_bytes: of all sources; cpu_hours, wall_hours: for those left.
    stage_seconds: mean of each stage a source, where the folder has measured them.
    disk_bytes: of the finished folder.
    """

    sources: int
    places: dict[str, int]
    shards: int
    sources_per_shard: int
    shards_done: int
    sources_left: int
    workers: int
    video_hours: float | None = None
    source_bytes: int | None = None
    cpu_hours: float | None = None
    wall_hours: float | None = None
    stage_seconds: dict[str, float] = field(default_factory=dict)
    disk_bytes: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Means over a few of the local files: bytes, and seconds of those that open."""

    asked: int = 0
    opened: int = 0
    mean_bytes: float | None = None
    mean_seconds: float | None = None


def estimate(
    plan: Plan,
    folder: Path,
    *,
    workers: int | None = None,
    decoders: int | None = None,
    retry_failed: bool = False,
    sample: int = _MAX_SAMPLE,
    seconds: float = 15.0,
) -> Estimate:
    """What curating a plan into a folder would do; nothing is written.

    Args:
        workers: processes; by default one a CPU of this machine.
        decoders: of each worker, a shard each at a time; by default one.
        retry_failed: count the sources that failed as left.
        sample: how many local files are looked at, at most 20, for at most `seconds`.
    """
    notes: list[str] = []
    workers = workers or os.cpu_count() or 1
    done = _done(plan, folder, notes)
    places, local = _places(plan.table.arrow["uri"])
    looked = sample_files(local, sample, seconds)
    only_local = len(local) == plan.num_sources
    if looked.opened < looked.asked:
        notes.append(f"{looked.asked - looked.opened} of {looked.asked} sampled files did not open")
    if not only_local:
        notes.append(
            f"sources that lie elsewhere: {plan.num_sources - len(local)}; their length and size "
            "are not known until they are fetched"
        )
    left = _sources_left(plan, done) + (done.totals.get("failed", 0) if retry_failed else 0)
    shards_left = plan.num_shards - len(done.names) + (len(done.failed) if retry_failed else 0)
    at_once = max(1, min(workers * (decoders or 1), shards_left))
    stage_seconds, each = _worker_seconds(folder, looked if only_local else Sample(), notes)
    stored = _stored_bytes(plan, done, looked if only_local else Sample(), notes)
    cpu_seconds = each * left if each is not None else None
    video_seconds = looked.mean_seconds if only_local else None
    mean_bytes = looked.mean_bytes if only_local else None
    return Estimate(
        sources=plan.num_sources,
        places=places,
        shards=plan.num_shards,
        sources_per_shard=plan.sources_per_shard,
        shards_done=len(done.names),
        sources_left=left,
        workers=workers,
        video_hours=_hours(video_seconds, plan.num_sources),
        source_bytes=round(mean_bytes * plan.num_sources) if mean_bytes is not None else None,
        cpu_hours=_hours(cpu_seconds),
        # A shard is the work of one decoder.
        wall_hours=_hours(cpu_seconds, 1 / at_once),
        stage_seconds=stage_seconds,
        disk_bytes=stored,
        notes=tuple(notes),
    )


def sample_files(uris: pa.ChunkedArray, count: int, seconds: float) -> Sample:
    """Look at the headers of a few files, the same ones each time.

    Strangers' files are opened in a process of their own, which may die or hang over them.
    """
    count = min(count, _MAX_SAMPLE, len(uris))
    chosen = sorted(random.Random(0).sample(range(len(uris)), max(0, count)))
    paths = [uris[index].as_py() for index in chosen]
    sizes = [os.path.getsize(path) for path in paths if os.path.isfile(path)]
    if not sizes:
        return Sample(asked=len(paths))
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.curation.estimate"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        output, _ = process.communicate(json.dumps(paths).encode(), timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
    complete = output[: output.rfind(b"\n") + 1]
    lengths = [float(line) for line in complete.splitlines()]
    return Sample(
        asked=len(paths),
        opened=len(lengths),
        mean_bytes=sum(sizes) / len(sizes),
        mean_seconds=sum(lengths) / len(lengths) if lengths else None,
    )


def _done(plan: Plan, folder: Path, notes: list[str]) -> DoneShards:
    """What of the plan the folder holds; nothing where it belongs to another."""
    if not (folder / PLAN_FILE).exists():
        return DoneShards()
    try:
        before = load_plan(folder)
    except PlanError as error:
        notes.append(f"this run would be refused: {error}")
        return DoneShards()
    # Which models there are is found when a run starts.
    plan = replace(plan, models=plan.models or before.models)
    changes = list_changes(before, plan)
    if changes:
        notes.append(f"this run would be refused, {folder} was begun with others: {changes[0]}")
        return DoneShards()
    return scan_done(folder, plan, keep_cache=False)


def _places(uris: pa.ChunkedArray) -> tuple[dict[str, int], pa.ChunkedArray]:
    """How many sources lie where, most first, and those that are files."""
    is_away = pc.match_substring_regex(uris, SCHEME)
    local, away = uris.filter(pc.invert(is_away)), uris.filter(is_away)
    hosts = pc.utf8_lower(pc.replace_substring_regex(away, r"^([^:]+://[^/:?#]*).*$", r"\1"))
    counts = {entry["values"]: entry["counts"] for entry in pc.value_counts(hosts).to_pylist()}
    if len(local):
        counts["files"] = len(local)
    ranked = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    places = dict(ranked[:_MAX_PLACES])
    if len(ranked) > _MAX_PLACES:
        places[f"{len(ranked) - _MAX_PLACES} others"] = sum(n for _, n in ranked[_MAX_PLACES:])
    return places, local


def _sources_left(plan: Plan, done: DoneShards) -> int:
    last = plan.shard(plan.num_shards - 1)
    finished = len(done.names) * plan.sources_per_shard
    if last.name in done.names:
        finished -= plan.num_shards * plan.sources_per_shard - plan.num_sources
    return plan.num_sources - finished


def _worker_seconds(
    folder: Path, looked: Sample, notes: list[str]
) -> tuple[dict[str, float], float | None]:
    """Mean seconds of one worker for a source: by stage where this folder knows, and whole."""
    timed = read_timings(folder)
    if timed["sources"] >= MIN_TIMED:
        count = timed["sources"]
        notes.append(f"times are the means of {count} sources that this folder has timed")
        stages = {row["stage"]: round(row["seconds"] / count, 4) for row in timed["stages"]}
        return stages, timed["seconds"] / count
    rate = f"{WORKER_SECONDS_PER_VIDEO_SECOND} hours of one worker for an hour of video"
    if looked.mean_seconds is None:
        notes.append(f"times are unknown; count on up to {rate} ({BENCHMARK})")
        return {}, None
    notes.append(
        f"times are an upper bound: {rate} ({BENCHMARK}), and lengths of {looked.opened} files"
    )
    return {}, looked.mean_seconds * WORKER_SECONDS_PER_VIDEO_SECOND


def _stored_bytes(plan: Plan, done: DoneShards, looked: Sample, notes: list[str]) -> int | None:
    """What the finished folder takes: as what is done does, else as the benchmark's did."""
    finished = sum(done.totals.get(verdict, 0) for verdict in ("kept", "rejected", "failed"))
    if finished >= MIN_TIMED:
        return round(done.totals["bytes"] / finished * plan.num_sources)
    if looked.mean_seconds is None:
        return None
    notes.append(
        f"disk space is for {STORED_BYTES_PER_VIDEO_SECOND / 1e6:.3f} MB for a second of video "
        f"({BENCHMARK}); it grows with the share that is kept"
    )
    return round(looked.mean_seconds * plan.num_sources * STORED_BYTES_PER_VIDEO_SECOND)


def _hours(seconds: float | None, times: float = 1.0) -> float | None:
    return None if seconds is None else round(seconds * times / 3600, 3)


def _probe_named_files() -> None:
    """The child of `sample_files`: paths as JSON come in, a line of seconds goes out for each."""
    for path in json.loads(sys.stdin.buffer.read()):
        try:
            print(probe(path).seconds, flush=True)
        except (VideoError, OSError):
            continue


if __name__ == "__main__":
    _probe_named_files()
