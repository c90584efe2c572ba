"""One source video in the process that decodes: shots, scores, verdicts, and its kept clips.

The models are elsewhere (`Models`); what they find comes back as numbers.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipelines import schema
from pipelines.camera import FlowBackend, measure_camera
from pipelines.curation.config import CurationConfig
from pipelines.curation.filters import Series, judge
from pipelines.curation.frames import FrameSpool
from pipelines.curation.machine import MACHINE_ERRORS, own_files
from pipelines.curation.quality import picture_scores
from pipelines.curation.scan import SampledFrames, SourceScan, scan_source
from pipelines.curation.shots import ShotScan
from pipelines.curation.signature import clip_signature
from pipelines.overrides import from_dict, to_dict
from pipelines.schema import ClipRecord, Scores
from pipelines.video import VideoError, VideoInfo, VideoLimits, encode, iter_frames, probe


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the decoder is told of a source.

    path: the file; staging: the folder for encoded clips.
    camera: the name of the camera backend; all but `flow` run where the models are.
    """

    id: str
    sha256: str
    path: str
    staging: str
    config: CurationConfig
    camera: str = "flow"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the decoder says of a source when it is done with it.

    middles: the slot of the middle sampled frame of each clip; `shape` is the frames' height and
        width.
    seconds: of wall time by stage.
    """

    info: dict[str, Any]
    clips: tuple[ClipRecord, ...]
    middles: tuple[int, ...]
    shape: tuple[int, int]
    seconds: dict[str, float] = field(default_factory=dict)


class Models(Protocol):
    """Whoever has the models; `pipelines.curation.service` says what may be asked."""

    def ask(self, kind: str, data: Any) -> Any:
        """The answer, as plain values."""
        ...


def parse_job(data: Any) -> Job:
    """The job in plain values."""
    return from_dict(Job, data)


class Clock:
    """Seconds of wall time by stage; a stage within another counts for itself alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the body."""
        began, outer, self._inner = time.perf_counter(), self._inner, 0.0
        try:
            yield
        finally:
            whole = time.perf_counter() - began
            self.seconds[name] = self.seconds.get(name, 0.0) + whole - self._inner
            self._inner = outer + whole


class SourceWork:
    """One source on its way.

    Args:
        frames: the descriptor of an open, empty file for sampled frames.
    """

    def __init__(self, job: Job, models: Models, frames: int) -> None:
        self.job = job
        self.config = job.config
        self.models = models
        self.frames = frames
        self.path = Path(job.path)
        self.clock = Clock()
        self.limits = VideoLimits(
            max_bytes=self.config.video.max_bytes,
            max_pixels=self.config.video.max_pixels,
            max_seconds=self.config.video.max_seconds,
        )

    def run(self) -> dict[str, Any]:
        """Shots, scores, verdicts, kept clips; a `Report` as plain values.

        Raises:
            VideoError: the file does not decode.
        """
        with self.clock.stage("probe"):
            video = probe(self.path, self.limits)
        info = _video_info(video)
        # Should the rest fail, this much is known.
        self.models.ask("known", info)
        scan = self.scan(video)
        info |= _scan_info(scan.shots)
        clips, middles = [], []
        for number, span in enumerate(clip_spans(scan.shots, self.config)):
            sampled = scan.samples.of(*span)
            clips.append(self._clip(number, span, sampled, scan, video))
            middles.append(sampled.frames.slots[len(sampled.frames) // 2])
        shape = scan.samples.spool.shape
        report = Report(
            info=info,
            clips=tuple(clips),
            middles=tuple(middles),
            shape=(shape[0], shape[1]),
            seconds={name: round(value, 6) for name, value in self.clock.seconds.items()},
        )
        return recorded(report)

    def scan(self, video: VideoInfo) -> SourceScan:
        """The one pass over the file."""
        with self.clock.stage("scan"):
            return scan_source(
                self.path,
                video,
                self.config,
                lambda shape: FrameSpool(self.frames, shape),
                self.limits,
            )

    def cheap_scores(
        self, sampled: SampledFrames, span: tuple[float, float], cuts: int, video: VideoInfo
    ) -> Scores:
        """What needs no model and no knowledge of people."""
        scores: Scores = {
            "seconds": span[1] - span[0],
            "width": video.width,
            "height": video.height,
            "fps": video.fps,
            "cuts": cuts,
        }
        with self.clock.stage("quality"):
            return scores | picture_scores(sampled.frames)[0]

    def camera_scores(
        self, sampled: SampledFrames, boxes: np.ndarray | None, number: int = 0
    ) -> Scores:
        """How the camera moves, people (T, P, 4) left out."""
        with self.clock.stage("camera"):
            if self.job.camera == FlowBackend.name:
                return measure_camera(sampled.frames, sampled.fps, boxes, FlowBackend())
            request = _request(number, sampled) | {"fps": sampled.fps}
            return self.models.ask("camera", request | {"masked": boxes is not None})

    def _clip(
        self,
        number: int,
        span: tuple[float, float],
        sampled: SampledFrames,
        scan: SourceScan,
        video: VideoInfo,
    ) -> ClipRecord:
        scores, series = self._score(number, span, sampled, len(scan.shots.cuts), video)
        reasons = judge(scores, series, self.config)
        with self.clock.stage("quality"):
            signature = clip_signature(sampled.frames)
        clip = ClipRecord(
            key=clip_key(self.job.sha256, number),
            start=span[0],
            end=span[1],
            verdict="rejected" if reasons else "kept",
            reasons=reasons,
            scores=scores,
            series=series,
            signature=signature,
        )
        return clip if reasons else self._store(clip, video)

    def _score(
        self,
        number: int,
        span: tuple[float, float],
        sampled: SampledFrames,
        cuts: int,
        video: VideoInfo,
    ) -> tuple[Scores, Series]:
        """Scores as a record keeps them, the cheap ones first."""
        scores = recorded_scores(self.cheap_scores(sampled, span, cuts, video))
        if self.config.stages.stop_early:
            if judge(scores, {}, self.config):
                return scores, {}
            scores |= recorded_scores(self.camera_scores(sampled, None, number))
            if judge(scores, {}, self.config):
                return scores, {}
        with self.clock.stage("models"):
            request = _request(number, sampled) | {"times": sampled.times.tolist()}
            seen = self.models.ask("see", request)
        boxes = np.array(seen["boxes"], np.float32).reshape(len(sampled.frames), -1, 4)
        people = boxes if boxes.shape[1] else None
        scores |= recorded_scores(self.camera_scores(sampled, people, number))
        return scores | seen["scores"], seen["series"]

    def _store(self, clip: ClipRecord, video: VideoInfo) -> ClipRecord:
        """Encode a clip and have it annotated."""
        output = self.config.output
        rate = stored_rate(video.fps, output.max_fps)
        path = Path(self.job.staging) / f"{clip.key}.mp4"
        with self.clock.stage("encode"):
            frames = iter_frames(
                self.path,
                start=clip.start,
                end=clip.end,
                fps=rate,
                max_side=output.max_side,
                limits=self.limits,
            )
            with own_files():
                written = encode(
                    path,
                    _readable(self.path, frames),
                    fps=rate,
                    crf=output.crf,
                    gop=output.gop,
                    preset=output.preset,
                )
        with self.clock.stage("annotate"):
            self.models.ask(
                "annotate",
                {
                    "key": clip.key,
                    "start": clip.start,
                    "fps": float(rate),
                    "num_frames": written.num_frames,
                },
            )
        return ClipRecord(
            **{name: getattr(clip, name) for name in _JUDGED},
            num_frames=written.num_frames,
            fps=float(rate),
            width=written.width,
            height=written.height,
        )


_JUDGED = ("key", "start", "end", "verdict", "reasons", "scores", "series", "signature")


def _readable(path: Path, frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The frames of a source; that it cannot be read is then not taken for a fault of writing."""
    try:
        yield from frames
    except OSError as error:
        if error.errno in MACHINE_ERRORS:
            raise
        # Its context says to `describe_failure` what it was.
        raise VideoError(f"{path}: cannot be read ({error.strerror})") from None


def clip_key(sha256: str, number: int) -> str:
    """The key of a source's clip of that number: of the content, whatever its name."""
    return schema.check_key(f"{sha256[:16]}_{number:03d}")


def recorded(data: Any) -> Any:
    """Dataclasses and values as a record keeps them: rounded, plain."""
    return schema.decode_json(schema.encode_json(data), "a record")


def recorded_scores(scores: Mapping[str, Any]) -> Scores:
    """Scores as a record keeps them, so that they are judged alike now and whenever it is read."""
    return {
        name: float(value) if isinstance(value, int | float) else value
        for name, value in recorded(scores).items()
    }


def stored_rate(fps: float, max_fps: float) -> Fraction:
    """The source's rate, divided by a whole number where it is too high: motion stays even."""
    # A little over the limit is not twice the limit: 30.01 stays, 50 becomes 25.
    divisor = max(1, int(np.ceil(fps / max_fps - 0.02)))
    return Fraction(fps / divisor).limit_denominator(1001)


def _request(number: int, sampled: SampledFrames) -> dict[str, Any]:
    """Which frames a question is about."""
    frames = sampled.frames
    return {"number": number, "slots": frames.slots, "shape": list(frames.spool.shape[:2])}


def _video_info(info: VideoInfo) -> dict[str, Any]:
    """What `probe` found, for the record."""
    found = to_dict(info)
    del found["num_frames"]
    return found


def _scan_info(scan: ShotScan) -> dict[str, Any]:
    return {
        "decoded_seconds": scan.seconds,
        "cuts": [[cut.kind, cut.start, cut.end] for cut in scan.cuts],
        "shots": len(scan.shots),
    }


def clip_spans(scan: ShotScan, config: CurationConfig) -> list[tuple[float, float]]:
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
