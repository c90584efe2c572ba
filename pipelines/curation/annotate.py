"""The models at work: scores of a shot from sampled frames, pose and faces of a kept clip.

T frames, P people, N = 18 keypoints. Coordinates are 0..1 of the frame; absent people are zeros.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.camera import camera_motion
from pipelines.curation import filters
from pipelines.curation.config import CurationConfig
from pipelines.curation.tracks import FaceLinker, join_chunks, spread_keyframes
from pipelines.faces import Face, open_face_backend
from pipelines.pose import PoseTrack, open_pose_backend
from pipelines.schema import FaceTrack, Scores
from pipelines.video import VideoInfo, VideoLimits, decode, iter_frames

_CHUNK = 48


@dataclass(frozen=True, kw_only=True)
class ScoredShot:
    """A shot's scores, and its middle frame with what was seen in it, for the report."""

    scores: Scores
    frame: np.ndarray
    pose: PoseTrack
    faces: list[Face]


class Perception:
    """The face and pose models of a run, opened once a process."""

    def __init__(self, config: CurationConfig) -> None:
        self.config = config
        self.face = open_face_backend(config.faces.backend)
        self.pose = open_pose_backend(config.pose.backend)

    def names(self) -> dict[str, str]:
        """The name of each model, which every shard of a run must share."""
        return {"face": self.face.name, "pose": self.pose.name}

    def notes(self) -> tuple[str, ...]:
        """Which models were taken, and why, in words."""
        return (
            f"face model {self.face.name}: {self.face.reason}",
            f"pose model {self.pose.name}: {self.pose.reason}",
        )

    def describe(self) -> dict[str, dict[str, Any]]:
        """Name, licence and settings of each model, for the records."""
        return {
            "face": {
                "name": self.face.name,
                "licence": self.face.licence,
                "channel_order": self.face.channel_order,
            },
            "pose": {
                "name": self.pose.name,
                "licence": self.pose.licence,
                "threshold": float(self.pose.threshold),
            },
            "camera": {"name": "optical flow and robust homography", "licence": "Apache-2.0"},
        }

    def score(
        self, path: Path, info: VideoInfo, span: tuple[float, float], limits: VideoLimits
    ) -> ScoredShot:
        """Every score of one shot, whatever the rules will say.

        Raises:
            VideoError: the span does not decode.
        """
        start, end = span
        samples = self.config.samples
        fps = min(samples.fps, info.fps, samples.max_frames / (end - start))
        options = {"fps": fps, "max_side": samples.side, "limits": limits}
        frames = list(decode(path, start=start, end=end, **options))
        times = start + np.arange(len(frames)) / fps
        track = self.pose.track(frames, source=path, times=times)
        people = track.boxes if track.boxes.shape[1] else None
        motion = camera_motion(frames, fps, people)
        faces = [self.face.detect(frame) for frame in frames]
        scores: Scores = {
            "seconds": end - start,
            "width": info.width,
            "height": info.height,
            "fps": info.fps,
            "camera_percent_per_second": motion.percent_per_second,
            "camera_residual_percent": motion.residual_percent,
            "camera_tracks": motion.num_tracks,
            "camera_tracked_share": motion.tracked_share,
        }
        scores |= filters.face_scores(frames, faces)
        scores |= filters.pose_scores(track, self.pose.threshold, self.config.pose.max_missing)
        middle = len(frames) // 2
        return ScoredShot(
            scores=scores, frame=frames[middle], pose=_frame_of(track, middle), faces=faces[middle]
        )

    def annotate(
        self, clip: Path, fps: float, num_frames: int, source: Path, start: float
    ) -> tuple[PoseTrack, FaceTrack]:
        """Pose and faces of every frame of a stored clip.

        Args:
            clip: the encoded file, so that the tracks belong to the very frames that are stored.
            source: the video it was cut from at `start` seconds, for keypoints beside it.

        Raises:
            VideoError: the clip does not decode.
        """
        every = self.config.pose.every
        keyframes = np.unique([*range(0, num_frames, every), num_frames - 1])
        face_step = max(1, round(fps / self.config.samples.fps))
        sampled = np.unique([*range(0, num_frames, face_step), num_frames - 1])
        linker = FaceLinker(self.config.pose.max_people)
        chunks = []
        for first, frames in _overlapping_chunks(clip, fps, keyframes, sampled):
            for index in (i for i in sampled if i in frames and i not in linker.seen):
                linker.add(int(index), self._faces_of(frames[index]))
            chosen = [index for index in keyframes if index in frames]
            if not chosen or (chunks and chosen[-1] == first):
                continue
            times = start + np.array(chosen) / fps
            chunks.append(self.pose.track([frames[i] for i in chosen], source=source, times=times))
        joined = join_chunks(chunks, self.config.pose.max_people)
        pose = spread_keyframes(joined, keyframes, num_frames, self.pose.threshold)
        faces = linker.track(num_frames, pose, self.face.name, self.face.channel_order)
        return pose, faces

    def _faces_of(self, frame: np.ndarray) -> list[tuple[Face, np.ndarray | None]]:
        faces = self.face.detect(frame)[: self.config.pose.max_people]
        if not self.config.faces.store_embeddings or not self.face.embedding_dim:
            return [(face, None) for face in faces]
        return [(face, self.face.embed(frame, face)) for face in faces]


def _frame_of(track: PoseTrack, index: int) -> PoseTrack:
    kept = slice(index, index + 1)
    return PoseTrack(
        keypoints=track.keypoints[kept], score=track.score[kept], boxes=track.boxes[kept]
    )


def _overlapping_chunks(
    clip: Path, fps: float, keyframes: np.ndarray, sampled: np.ndarray
) -> Iterator[tuple[int, dict[int, np.ndarray]]]:
    """(number of the shared frame, wanted frames by number), a few dozen at a time.

    Each chunk begins with the last keyframe of the one before, by which people are matched.
    """
    wanted, keys = set(sampled.tolist()) | set(keyframes.tolist()), set(keyframes.tolist())
    chunk: dict[int, np.ndarray] = {}
    shared = 0
    for index, frame in enumerate(iter_frames(clip, fps=fps)):
        if index in wanted:
            chunk[index] = frame
        if len(chunk) >= _CHUNK and index in keys:
            yield shared, chunk
            shared, chunk = index, {index: frame}
    if chunk:
        yield shared, chunk
