"""One source video on its way: shots, scores, verdicts, and the members of its kept clips."""

import platform
from dataclasses import replace
from fractions import Fraction
from functools import cache
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import schema
from pipelines.curation.annotate import Perception, ScoredShot
from pipelines.curation.config import CurationConfig
from pipelines.curation.filters import judge
from pipelines.curation.ledger import THUMBS_FOLDER
from pipelines.curation.plan import Plan, PlannedSource
from pipelines.curation.shots import ShotScan, find_shots
from pipelines.curation.thumbnails import draw_thumbnail, encode_jpeg
from pipelines.schema import ClipRecord, Scores, SourceRecord
from pipelines.video import VideoInfo, VideoLimits, encode, iter_frames, probe

_PACKAGES = ("stableanimator-pp", "av", "numpy", "opencv-python", "onnxruntime", "scenedetect")

Members = dict[str, bytes | Path]


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


class SourceWork:
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
        self.record = replace(self.record, info=_video_info(info))
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
        arrays = {
            "keypoints": pose.keypoints.astype(np.float32),
            "score": pose.score.astype(np.float32),
            "boxes": pose.boxes.astype(np.float32),
            "track_ids": np.arange(people, dtype=np.int32),
            "model": np.array(pose.backend),
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
        image = draw_thumbnail(shot.frame, shot.pose, shot.faces)
        (self.staging / THUMBS_FOLDER / f"{self.source.id}.jpg").write_bytes(encode_jpeg(image))


def stored_rate(fps: float, max_fps: float) -> Fraction:
    """The source's rate, divided by a whole number where it is too high: motion stays even."""
    # A little over the limit is not twice the limit: 30.01 stays, 50 becomes 25.
    divisor = max(1, int(np.ceil(fps / max_fps - 0.02)))
    return Fraction(fps / divisor).limit_denominator(1001)


def _video_info(info: VideoInfo) -> dict[str, Any]:
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
        if isinstance(clips[0].scores[name], str):
            continue
        values = np.array([clip.scores[name] for clip in clips], np.float64)
        if name == "seconds":
            scores[name] = float(values.sum())
        elif name == "camera_percent_per_second":
            scores[name] = float(values.max())
        else:
            scores[name] = float(np.average(values, weights=weights))
    return scores
