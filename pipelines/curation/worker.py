"""From a planned shard to a committed one: every source scored, judged, and cut into clips."""

import errno
import faulthandler
import os
import platform
import sys
from dataclasses import replace
from fractions import Fraction
from functools import cache
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import schema, shards
from pipelines.curation.annotate import Perception, ScoredShot
from pipelines.curation.config import CurationConfig
from pipelines.curation.filters import judge
from pipelines.curation.ledger import MAX_DEATHS, THUMBS_FOLDER, Event, RunJournal
from pipelines.curation.plan import Plan, PlannedShard, PlannedSource
from pipelines.curation.shots import ShotScan, find_shots
from pipelines.curation.thumbnails import draw_thumbnail, encode_jpeg
from pipelines.schema import ClipRecord, Scores, ShardRecord, SourceRecord
from pipelines.video import VideoError, VideoInfo, VideoLimits, encode, iter_frames, probe

_PACKAGES = ("stableanimator-pp", "av", "numpy", "opencv-python", "onnxruntime", "scenedetect")
_ERROR_LENGTH = 300
# The machine's troubles, not the source's: the run must stop, not write sources off.
_MACHINE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE}

Members = dict[str, bytes | Path]


class SourceError(ValueError):
    """A source that cannot be worked on although its file decodes."""


def process_shard(
    folder: Path,
    plan: Plan,
    shard: PlannedShard,
    journal: RunJournal,
    perception: Perception,
    base: Path,
) -> ShardRecord:
    """Work through a shard's sources and commit it; a source that fails is recorded as failed.

    Args:
        base: the folder that relative names of sources start from.
    """
    with journal.attempt(shard) as staging:
        (staging / THUMBS_FOLDER).mkdir()
        members: Members = {}
        records = []
        for source in plan.shard_sources(shard):
            record, files = _process_safely(source, plan, perception, staging, journal, base)
            members |= files
            records.append(record)
        tar = staging / f"{shard.name}.tar"
        sizes = shards.write_tar(tar, members)
        record = ShardRecord(
            name=shard.name,
            config_hash=plan.config_hash,
            tar_sha256=shards.sha256_file(tar),
            tar_bytes=tar.stat().st_size,
            members=sizes,
            counts=_counts(records),
            sources=tuple(records),
            models=perception.describe(),
            versions=versions(),
        )
        for thumb in sorted((staging / THUMBS_FOLDER).iterdir()):
            os.replace(thumb, folder / THUMBS_FOLDER / thumb.name)
        shards.commit(folder, tar, record)
    return record


@cache
def versions() -> dict[str, str]:
    """Versions of the code and of the libraries that decide what is written."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _process_safely(
    source: PlannedSource,
    plan: Plan,
    perception: Perception,
    staging: Path,
    journal: RunJournal,
    base: Path,
) -> tuple[SourceRecord, Members]:
    """One source's record; whatever goes wrong in it stays in it."""
    deaths = journal.begin(source.id)
    blank = SourceRecord(
        id=source.id,
        sha256=source.sha256,
        bytes=source.bytes,
        uris=source.uris,
        verdict="failed",
        reasons=("unreadable",),
    )
    work = _SourceWork(source, blank, plan, perception, staging, base)
    members: Members = {}
    # A decoder that never returns cannot be interrupted, so the process ends and is begun anew.
    faulthandler.dump_traceback_later(
        plan.config.video.timeout_seconds, exit=True, file=sys.__stderr__
    )
    try:
        if deaths >= MAX_DEATHS:
            raise SourceError(f"ended its worker process {deaths} times (crash or time limit)")
        if source.error:
            raise SourceError(source.error)
        record, members = work.run()
    except Exception as error:
        if _is_of_machine(error):
            raise
        record = replace(work.record, verdict="failed", reasons=("unreadable",), clips=())
        record = replace(record, error=_sentence(error, work.path))
    finally:
        faulthandler.cancel_dump_traceback_later()
    clips = sum(clip.verdict == "kept" for clip in record.clips)
    journal.end(
        Event(source=source.id, verdict=record.verdict, reasons=record.reasons, clips=clips)
    )
    return record, members


class _SourceWork:
    """One source on its way; `record` holds what is known so far, should the rest fail."""

    def __init__(
        self,
        source: PlannedSource,
        record: SourceRecord,
        plan: Plan,
        perception: Perception,
        staging: Path,
        base: Path,
    ) -> None:
        self.source = source
        self.record = record
        self.plan = plan
        self.config: CurationConfig = plan.config
        self.perception = perception
        self.staging = staging
        self.path = base / source.uris[0]
        self.limits = VideoLimits(
            max_bytes=self.config.video.max_bytes,
            max_pixels=self.config.video.max_pixels,
            max_seconds=self.config.video.max_seconds,
        )

    def run(self) -> tuple[SourceRecord, Members]:
        """Shots, scores, verdicts, and the members of kept clips."""
        info = probe(self.path, self.limits)
        self.record = replace(self.record, info=schema_info(info))
        scan = find_shots(self.path, info, self.config.shots, self.limits)
        self.record = replace(self.record, info=self.record.info | _scan_info(scan))
        members: Members = {}
        clips, shown = [], None
        for number, span in enumerate(_spans(scan, self.config)):
            shot = self.perception.score(self.path, info, span, self.limits)
            scores = shot.scores | {"cuts": len(scan.cuts)}
            reasons = judge(scores, self.config)
            clip = ClipRecord(
                key=schema.check_key(f"{self.source.id}_{number:03d}"),
                start=span[0],
                end=span[1],
                verdict="rejected" if reasons else "kept",
                reasons=reasons,
                scores=scores,
            )
            if not reasons:
                clip, files = self._store(clip, info)
                members |= files
            clips.append(clip)
            shown = _better(shown, clip, shot)
        if shown is not None:
            self._save_thumbnail(shown[1])
        self.record = replace(
            self.record,
            verdict="kept" if any(clip.verdict == "kept" for clip in clips) else "rejected",
            reasons=_source_reasons(clips),
            scores=_source_scores(clips),
            clips=tuple(clips),
        )
        return self.record, members

    def _store(self, clip: ClipRecord, info: VideoInfo) -> tuple[ClipRecord, Members]:
        """Encode a clip and annotate the encoded frames."""
        output = self.config.output
        rate = stored_rate(info.fps, output.max_fps)
        path = self.staging / f"{clip.key}.mp4"
        frames = iter_frames(
            self.path,
            start=clip.start,
            end=clip.end,
            fps=rate,
            max_side=output.max_side,
            limits=self.limits,
        )
        written = encode(
            path, frames, fps=rate, crf=output.crf, gop=output.gop, preset=output.preset
        )
        clip = replace(
            clip,
            num_frames=written.num_frames,
            fps=float(rate),
            width=written.width,
            height=written.height,
        )
        pose, faces = self.perception.annotate(
            path, float(rate), written.num_frames, self.path, clip.start
        )
        people = pose.score.shape[1]
        threshold = self.perception.pose.threshold
        arrays = {
            "keypoints": pose.keypoints.astype(np.float32),
            "score": pose.score.astype(np.float32),
            "boxes": pose.boxes.astype(np.float32),
            "track_ids": np.arange(people, dtype=np.int32),
            "threshold": np.array(threshold, np.float32),
            "model": np.array(self.perception.pose.name),
        }
        schema.check_pose(arrays, written.num_frames, clip.key)
        face_arrays = {
            "boxes": faces.boxes,
            "landmarks": faces.landmarks,
            "score": faces.score,
            "embeddings": faces.embeddings,
            "model": np.array(faces.model),
            "channel_order": np.array(faces.channel_order),
        }
        schema.check_faces(face_arrays, written.num_frames, clip.key)
        return clip, {
            f"{clip.key}.mp4": path,
            f"{clip.key}.pose.npz": schema.pack_arrays(arrays),
            f"{clip.key}.face.npz": schema.pack_arrays(face_arrays),
            f"{clip.key}.json": schema.encode_json(self._clip_json(clip)),
        }

    def _clip_json(self, clip: ClipRecord) -> dict[str, Any]:
        return {
            "key": clip.key,
            "source": {
                "id": self.source.id,
                "sha256": self.source.sha256,
                "bytes": self.source.bytes,
                "info": self.record.info,
            },
            "span": [clip.start, clip.end],
            "fps": clip.fps,
            "num_frames": clip.num_frames,
            "size": [clip.height, clip.width],
            "scores": clip.scores,
            "provenance": {"uris": self.source.uris, "licence": "unknown", "uploader": None},
            "models": self.perception.describe(),
            "config_hash": self.plan.config_hash,
            "versions": versions(),
        }

    def _save_thumbnail(self, shot: ScoredShot) -> None:
        image = draw_thumbnail(shot.frame, shot.pose, shot.faces, self.perception.pose.threshold)
        (self.staging / THUMBS_FOLDER / f"{self.source.id}.jpg").write_bytes(encode_jpeg(image))


def stored_rate(fps: float, max_fps: float) -> Fraction:
    """The source's rate, divided by a whole number where it is too high: motion stays even."""
    # A little over the limit is not twice the limit: 30.01 stays, 50 becomes 25.
    divisor = max(1, int(np.ceil(fps / max_fps - 0.02)))
    return Fraction(fps / divisor).limit_denominator(1001)


def schema_info(info: VideoInfo) -> dict[str, Any]:
    """What `probe` found, for the record."""
    return {
        "width": info.width,
        "height": info.height,
        "fps": info.fps,
        "seconds": info.seconds,
        "codec": info.codec,
        "rotation": info.rotation,
        "pixel_aspect": info.pixel_aspect,
        "variable_rate": info.variable_rate,
        "has_audio": info.has_audio,
    }


def _scan_info(scan: ShotScan) -> dict[str, Any]:
    return {
        "decoded_seconds": scan.seconds,
        "cuts": [[cut.kind, cut.start, cut.end] for cut in scan.cuts],
        "shots": len(scan.shots),
    }


def _spans(scan: ShotScan, config: CurationConfig) -> list[tuple[float, float]]:
    """The spans to score: shots that are long enough, else the longest; long ones divided."""
    shots = [shot for shot in scan.shots if shot[1] - shot[0] >= config.output.min_seconds]
    if not shots:
        shots = [max(scan.shots, key=lambda shot: shot[1] - shot[0], default=(0.0, scan.seconds))]
    spans = []
    for start, end in shots:
        parts = max(1, int(np.ceil((end - start) / config.output.max_seconds)))
        edges = np.linspace(start, end, parts + 1)
        spans += [(float(low), float(high)) for low, high in pairwise(edges)]
    return spans


def _better(
    shown: tuple[tuple[bool, float], ScoredShot] | None, clip: ClipRecord, shot: ScoredShot
) -> tuple[tuple[bool, float], ScoredShot]:
    """The shot to show of a source: a kept one before others, then the longest."""
    rank = (clip.verdict == "kept", clip.end - clip.start)
    return (rank, shot) if shown is None or rank > shown[0] else shown


def _source_reasons(clips: list[ClipRecord]) -> tuple[str, ...]:
    """Why no clip was kept: the reasons of every clip, in the order of the rules; () if kept."""
    if any(clip.verdict == "kept" for clip in clips):
        return ()
    return tuple(dict.fromkeys(reason for clip in clips for reason in clip.reasons))


def _source_scores(clips: list[ClipRecord]) -> Scores:
    """Scores of a whole source: means weighted by the clips' length, of the camera the most."""
    if not clips:
        return {}
    weights = np.array([clip.end - clip.start for clip in clips])
    scores: Scores = {}
    for name in clips[0].scores:
        values = np.array([clip.scores[name] for clip in clips], np.float64)
        if name == "seconds":
            scores[name] = float(values.sum())
        elif name == "camera_percent_per_second":
            scores[name] = float(values.max())
        else:
            scores[name] = float(np.average(values, weights=weights))
    return scores


def _counts(records: list[SourceRecord]) -> dict[str, int]:
    clips = [clip for record in records for clip in record.clips]
    return {
        "sources": len(records),
        "kept": sum(record.verdict == "kept" for record in records),
        "rejected": sum(record.verdict == "rejected" for record in records),
        "failed": sum(record.verdict == "failed" for record in records),
        "clips_kept": sum(clip.verdict == "kept" for clip in clips),
        "clips_rejected": sum(clip.verdict == "rejected" for clip in clips),
    }


def _is_of_machine(error: BaseException | None) -> bool:
    while error is not None:
        if getattr(error, "errno", None) in _MACHINE_ERRORS:
            return True
        error = error.__cause__
    return False


def _sentence(error: Exception, path: Path) -> str:
    """An error as one line that says nothing of where the file lay, so that runs compare equal."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text.removeprefix(f"{path}: ").replace(str(path), path.name)
    if not isinstance(error, VideoError | SourceError):
        text = f"{type(error).__name__}: {text}"
    return text[:_ERROR_LENGTH]
