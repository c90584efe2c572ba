"""What the process with the models does for the one that decodes, for one source.

All that is asked was said by a process that a hostile video may have taken over: every value is
checked, and no path is ever taken from it.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import schema
from pipelines.curation.annotate import Perception, Seen, seen_scores
from pipelines.curation.frames import FrameSpool, SpooledFrames
from pipelines.curation.source import Report, clip_key, recorded, recorded_scores
from pipelines.curation.thumbnails import draw_thumbnail, encode_jpeg
from pipelines.curation.wire import WireError
from pipelines.faces import Face
from pipelines.overrides import ConfigError, from_dict
from pipelines.pose import PoseTrack
from pipelines.schema import FaceTrack

_MAX_SIDE = 1 << 14
_MAX_FRAMES = 200_000
# Of what is said of a source, as JSON: one must not fill its shard's record.
_MAX_INFO_BYTES = 64 << 10
_MAX_REPORT_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """What was seen in the middle frame of a shot."""

    pose: PoseTrack
    faces: list[Face]


class SourceService:
    """Answers the questions about one source.

    Args:
        source: the file, for keypoints beside it.
        staging: the folder in which the decoder puts clips, and this their annotations.
        frames: the descriptor of the file with the sampled frames.
    """

    def __init__(
        self, perception: Perception, source: Path, sha256: str, staging: Path, frames: int
    ) -> None:
        self.perception = perception
        self.source = source
        self.sha256 = sha256
        self.staging = staging
        self.frames = frames
        self.info: dict[str, Any] = {}
        self._seen: dict[int, Seen] = {}
        self._shown: dict[int, _Shown] = {}
        self._waited = perception.waited()

    def __call__(self, kind: str, data: Any) -> Any:
        """The answer to a question. Raises WireError for one that nobody asks."""
        answers = {
            "known": self._known,
            "see": self._see,
            "camera": self._camera,
            "annotate": self._annotate,
        }
        if kind not in answers or not isinstance(data, dict):
            raise WireError(f"a question of the kind {kind[:40]!r}")
        return answers[kind](data)

    def allowance(self) -> float:
        """Seconds that the source may take beyond `video.timeout_seconds`.

        For its length, which is not believed beyond what is allowed, and for what it waited.
        """
        video, length = self.perception.config.video, self.info.get("seconds")
        seconds = 0.0
        if isinstance(length, int | float) and length > 0:
            seconds = min(float(length), video.max_seconds)
        waited = self.perception.waited() - self._waited
        return video.seconds_per_video_second * seconds + waited

    def parse(self, data: Any) -> Report:
        """The decoder's report. Raises WireError unless all of it is what it should be."""
        _check_size(data, _MAX_REPORT_BYTES, "a report")
        try:
            report = from_dict(Report, data)
        except ConfigError as error:
            raise WireError(f"a report that is none ({error})") from None
        keys = [clip.key for clip in report.clips]
        if keys != [clip_key(self.sha256, number) for number in range(len(keys))]:
            raise WireError("clips with names of their own")
        if len(report.middles) != len(keys) or not keys:
            raise WireError("a report without clips")
        for clip in report.clips:
            if clip.verdict not in ("kept", "rejected") or (clip.verdict == "kept") != (
                not clip.reasons
            ):
                raise WireError("a clip without a verdict")
            missing = (not self._is_there(f"{clip.key}.{name}") for name in schema.CLIP_MEMBERS[:3])
            if clip.verdict == "kept" and any(missing):
                raise WireError("a clip that is not there")
        return report

    def thumbnail(self, report: Report) -> bytes:
        """A JPEG of the clip to show: a kept one before others, then the longest."""
        number = max(
            range(len(report.clips)),
            key=lambda n: (
                report.clips[n].verdict == "kept",
                report.clips[n].end - report.clips[n].start,
                -n,
            ),
        )
        spool = FrameSpool(self.frames, _shape(report.shape))
        frame = spool.get(_whole(report.middles[number], 0, _MAX_FRAMES))
        shown = self._shown.get(number) or _Shown(pose=PoseTrack.empty(1), faces=[])
        return encode_jpeg(draw_thumbnail(frame, shown.pose, shown.faces))

    def _is_there(self, name: str) -> bool:
        path = self.staging / name
        return path.is_file() and not path.is_symlink()

    def _known(self, data: dict[str, Any]) -> None:
        _check_size(data, _MAX_INFO_BYTES, "a description")
        self.info = data

    def _see(self, data: dict[str, Any]) -> dict[str, Any]:
        number, frames = self._frames(data)
        times = np.array(_numbers(data.get("times"), len(frames)))
        seen = self.perception.see(frames, times, self.source, self._rate())
        scores, series = seen_scores(frames, seen)
        # The boxes of one shot are all that is asked for again.
        self._seen = {number: seen}
        middle = len(frames) // 2
        self._shown[number] = _Shown(
            pose=_frame_of(seen.track, middle), faces=list(seen.faces[middle])
        )
        return {
            "scores": recorded_scores(scores),
            "series": recorded(series),
            "boxes": np.nan_to_num(seen.track.boxes).tolist(),
        }

    def _camera(self, data: dict[str, Any]) -> dict[str, Any]:
        number, frames = self._frames(data)
        (fps,) = _numbers([data.get("fps")], 1)
        boxes = None
        if data.get("masked") and number in self._seen:
            found = self._seen[number].track.boxes
            boxes = found if len(found) == len(frames) else None
        if not 0 < fps < 1000:
            raise WireError(f"a rate of {fps}")
        return recorded_scores(self.perception.measure_camera(frames, fps, boxes))

    def _annotate(self, data: dict[str, Any]) -> None:
        start, fps = _numbers([data.get("start"), data.get("fps")], 2)
        num_frames = _whole(data.get("num_frames"), 1, _MAX_FRAMES)
        key = str(data.get("key"))
        if key[:17] != f"{self.sha256[:16]}_" or not key[17:].isdecimal():
            raise WireError(f"a clip with the name {key[:40]!r}")
        if not self._is_there(f"{key}.mp4") or not 0 < fps < 1000 or start < 0:
            raise WireError("a clip that is not there")
        pose, faces = self.perception.annotate(
            self.staging / f"{key}.mp4", fps, num_frames, self.source, start, self._rate()
        )
        members = {
            "pose.npz": pack_pose(pose, num_frames, key),
            "face.npz": pack_faces(faces, num_frames, key),
        }
        for suffix, content in members.items():
            (self.staging / f"{key}.{suffix}").write_bytes(content)

    def _rate(self) -> float | None:
        """Frames a second of the source, as its decoder found; it is not to be opened here."""
        rate = self.info.get("fps")
        return float(rate) if isinstance(rate, int | float) and 0 < rate <= 1000 else None

    def _frames(self, data: dict[str, Any]) -> tuple[int, SpooledFrames]:
        """The number of the shot, and its frames."""
        slots = data.get("slots")
        if not isinstance(slots, list) or not 0 < len(slots) <= _MAX_FRAMES:
            raise WireError("a question about no frames")
        spool = FrameSpool(self.frames, _shape(data.get("shape")))
        frames = SpooledFrames(spool, [_whole(slot, 0, _MAX_FRAMES) for slot in slots])
        return _whole(data.get("number"), 0, _MAX_FRAMES), frames


def pack_pose(pose: PoseTrack, num_frames: int, key: str) -> bytes:
    """The member KEY.pose.npz."""
    arrays = {
        "keypoints": pose.keypoints.astype(np.float32),
        "score": pose.score.astype(np.float32),
        "boxes": pose.boxes.astype(np.float32),
        "track_ids": np.arange(pose.score.shape[1], dtype=np.int32),
        "model": np.array(pose.backend),
    }
    schema.check_pose(arrays, num_frames, key)
    return schema.pack_arrays(arrays)


def pack_faces(faces: FaceTrack, num_frames: int, key: str) -> bytes:
    """The member KEY.face.npz."""
    arrays = {
        "boxes": faces.boxes,
        "landmarks": faces.landmarks,
        "score": faces.score,
        "embeddings": faces.embeddings,
        "model": np.array(faces.model),
        "channel_order": np.array(faces.channel_order),
    }
    schema.check_faces(arrays, num_frames, key)
    return schema.pack_arrays(arrays)


def _frame_of(track: PoseTrack, index: int) -> PoseTrack:
    kept = slice(index, index + 1)
    return replace(
        track, keypoints=track.keypoints[kept], score=track.score[kept], boxes=track.boxes[kept]
    )


def _check_size(data: Any, most: int, what: str) -> None:
    size = len(json.dumps(data, separators=(",", ":")))
    if size > most:
        raise WireError(f"{what} of {size} bytes, expected at most {most}")


def _whole(value: Any, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise WireError(f"{str(value)[:40]}, expected a number from {low} to {high}")
    return value


def _shape(value: Any) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise WireError("frames without a size")
    return _whole(value[0], 1, _MAX_SIDE), _whole(value[1], 1, _MAX_SIDE)


def _numbers(values: Any, length: int) -> list[float]:
    if not isinstance(values, list) or len(values) != length:
        raise WireError(f"expected {length} numbers")
    for value in values:
        if not isinstance(value, int | float) or not np.isfinite(value):
            raise WireError(f"{str(value)[:40]}, expected a number")
    return [float(value) for value in values]
