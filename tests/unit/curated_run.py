"""Folders of shards as a run leaves them, from made-up scores: what workers do, without videos."""

import hashlib
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines import schema, shards
from pipelines.curation.config import CurationConfig, outcome
from pipelines.curation.filters import judge
from pipelines.curation.finish import finish_run
from pipelines.curation.outcomes import copy_of, count_verdicts, is_wanted
from pipelines.curation.plan import SOURCE_SCHEMA, Plan, load_plan, make_plan, save_plan
from pipelines.overrides import apply_overrides, config_hash
from pipelines.schema import ClipRecord, ShardRecord, SourceRecord
from pipelines.video import encode

FRAMES, FPS, SIDE = 4, 8.0, 32


@dataclass(frozen=True)
class Video:
    """A made-up source: its bytes, and the scores, series and signature of each of its clips."""

    content: str
    clips: tuple[dict[str, Any], ...] = ()
    fails: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()


def clip(signature: str = "", series: Mapping[str, list[float]] | None = None, **scores: float):
    """The measurements of one clip."""
    usual = {"seconds": 2.0, "width": 640.0, "height": 480.0, "cuts": 0.0, "sharpness": 50.0}
    return {"signature": signature, "series": dict(series or {}), "scores": usual | scores}


def signature(seed: int, flips: int = 0, plain: Sequence[int] = ()) -> str:
    """A random signature, `flips` of whose bits are turned, with some frames that show nothing."""
    bits = np.random.default_rng(seed).integers(0, 2, 512, dtype=np.uint8)
    turned = np.random.default_rng(seed + 10**6 + flips).choice(512, flips, replace=False)
    bits[turned] ^= 1
    frames = bits.reshape(8, 64)
    frames[list(plain)] = 0
    return np.packbits(bits).tobytes().hex()


def settings(*assignments: str) -> CurationConfig:
    return apply_overrides(CurationConfig(), ["output.sources_per_shard=3", *assignments])


def run(folder: Path, videos: Mapping[str, Video], config: CurationConfig) -> Path:
    """The folder of a whole run over videos by name."""
    finish_run(unfinished(folder, videos, config), load_plan(folder))
    return folder


def unfinished(folder: Path, videos: Mapping[str, Video], config: CurationConfig) -> Path:
    """The same when all shards are committed, but nothing was decided over all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {name: [None] * len(videos) for name in SOURCE_SCHEMA.names} | {"uri": sorted(videos)}
    plan = save_plan(folder, make_plan(pa.table(rows, SOURCE_SCHEMA), config))
    for shard in plan.shards():
        work(folder, plan, shard.index, videos)
    return folder


def go_on(folder: Path, videos: Mapping[str, Video]) -> Path:
    """Work on what of the folder's plan is not done, as a next start does."""
    plan = load_plan(folder)
    for shard in plan.shards():
        previous = shards.committed(folder, shard.name)
        if previous is None or any(map(is_wanted, previous.sources)):
            work(folder, plan, shard.index, videos, previous)
    finish_run(folder, plan)
    return folder


def work(
    folder: Path,
    plan: Plan,
    index: int,
    videos: Mapping[str, Video],
    previous: ShardRecord | None = None,
) -> None:
    """Make one shard, taking over the sources of `previous` that are whole."""
    taken = {} if previous is None else {source.id: source for source in previous.sources}
    name = schema.shard_name(index)
    old = folder / f"{name}.tar"
    there = shards.index_tar(old) if previous else {}
    members: dict[str, bytes] = {}
    records: list[SourceRecord] = []
    for row in plan.shard_rows(index):
        known = taken.get(row.id)
        if known is not None and not is_wanted(known) and known.verdict != "failed":
            keys = {entry.key for entry in known.clips}
            for member, place in there.items():
                if schema.split_member(member)[0] in keys:
                    members[member] = shards.read_member(old, *place)
            records.append(known)
            continue
        record, files = source_record(row.id, row.uri, videos[row.uri], plan.config)
        first = next(
            (r for r in records if r.sha256 == record.sha256 and r.verdict != "failed"), None
        )
        if first is not None and record.verdict != "failed":
            record, files = copy_of(record, first.duplicate_of or first.id), {}
        members |= files
        records.append(record)
    tar = folder / f".{name}.staged"
    sizes = shards.write_tar(tar, members)
    record = ShardRecord(
        name=name,
        config_hash=plan.config_hash,
        tar_sha256=shards.sha256_file(tar),
        tar_bytes=tar.stat().st_size,
        members=sizes,
        counts=count_verdicts(records),
        sources=tuple(records),
    )
    shards.commit(folder, tar, record)


def source_record(
    source_id: str, uri: str, video: Video, config: CurationConfig
) -> tuple[SourceRecord, dict[str, bytes]]:
    """What a worker makes of a source: its record and the members of its kept clips."""
    record = SourceRecord(
        id=source_id,
        sha256=video.sha256,
        bytes=len(video.content),
        uris=(uri,),
        verdict="failed",
        reasons=("unreadable",),
        error="does not decode" if video.fails else None,
        provenance={"uri": uri},
    )
    if video.fails:
        return record, {}
    clips, members = [], {}
    for number, measured in enumerate(video.clips):
        reasons = judge(measured["scores"], measured["series"], config)
        entry = ClipRecord(
            key=f"{video.sha256[:16]}_{number:03d}",
            start=2.0 * number,
            end=2.0 * number + 2,
            verdict="rejected" if reasons else "kept",
            reasons=reasons,
            **measured,
        )
        if not reasons:
            entry = replace(entry, num_frames=FRAMES, fps=FPS, width=SIDE, height=SIDE)
            members |= clip_members(entry, config_hash(outcome(config)))
        clips.append(entry)
    kept = any(entry.verdict == "kept" for entry in clips)
    reasons = () if kept else tuple(dict.fromkeys(r for entry in clips for r in entry.reasons))
    record = replace(
        record,
        verdict="kept" if kept else "rejected",
        reasons=reasons,
        clips=tuple(clips),
        info={"seconds": 2.0 * len(clips)},
        scores={"seconds": 2.0 * len(clips)},
    )
    return record, members


def clip_members(entry: ClipRecord, hashed: str) -> dict[str, bytes]:
    """The four members of a clip."""
    nobody = np.zeros((FRAMES, 1, 4), np.float32)
    pose = {
        "keypoints": np.zeros((FRAMES, 1, 18, 2), np.float32),
        "score": np.zeros((FRAMES, 1, 18), np.float32),
        "boxes": nobody,
    }
    face = {
        "boxes": nobody,
        "landmarks": np.zeros((FRAMES, 1, 5, 2), np.float32),
        "score": np.zeros((FRAMES, 1), np.float32),
    }
    about = {
        "key": entry.key,
        "fps": entry.fps,
        "num_frames": entry.num_frames,
        "size": [entry.height, entry.width],
        "scores": entry.scores,
        "config_hash": hashed,
    }
    return {
        f"{entry.key}.mp4": _film(),
        f"{entry.key}.pose.npz": schema.pack_arrays(pose),
        f"{entry.key}.face.npz": schema.pack_arrays(face),
        f"{entry.key}.json": schema.encode_json(about),
    }


@cache
def _film() -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        frames = [np.full((SIDE, SIDE, 3), 40 * step, np.uint8) for step in range(FRAMES)]
        encode(path, frames, fps=FPS)
        return path.read_bytes()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its name, but for the lock and the cache of records."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", "commits.jsonl")
    }


def sources(folder: Path) -> dict[str, SourceRecord]:
    """The records of a folder's sources by name."""
    return {
        source.uris[0]: source
        for record in shards.iter_records(folder)
        for source in record.sources
    }


def dies_at(step: int, action: Callable[[], Any]) -> bool:
    """Do it in a process that is killed before its `step`-th change to the disk; whether it was."""
    child = os.fork()
    if child == 0:
        left = step

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return function(*args, **kwargs)

            return call

        # A flush counts as a step, but need not be waited for: only a power cut would show it.
        os.fsync = counted(lambda descriptor: None)
        for name in ("replace", "unlink", "mkdir", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0, "it failed"
    return False
