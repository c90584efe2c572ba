"""The models at work: scores of a shot from sampled frames, pose and faces of a kept clip.

T frames, P people. Coordinates are 0..1 of the frame; absent people are zeros.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from animator.keypoints import VISIBLE
from pipelines.camera import camera_motion
from pipelines.curation import filters
from pipelines.curation.config import CurationConfig
from pipelines.curation.frames import FrameStream
from pipelines.curation.tracks import FaceLinker, spread_keyframes, strongest
from pipelines.faces import Face, open_face_backend
from pipelines.pose import PoseTrack
from pipelines.pose_backends import open_pose_backend
from pipelines.schema import FaceTrack, Scores
from pipelines.video import VideoInfo, VideoLimits, decode


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
        # Workers fill the cores; one thread each also keeps sums in one order.
        self.face = open_face_backend(config.faces.backend, threads=1)
        self.pose = open_pose_backend(config.pose.backend, threads=1)

    def names(self) -> dict[str, str]:
        """The name of each model, which every shard of a run must share."""
        return {"face": self.face.name, "pose": f"{self.pose.name} ({self.pose.reason})"}

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
                "visible_from": VISIBLE,
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
        scores |= filters.face_scores(frames, faces, self.config.faces.min_score)
        scores |= filters.pose_scores(track, self.config.pose.max_missing)
        scores["pose_backend"] = track.backend
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
        keyframes = FrameStream(clip, fps, num_frames, every)
        times = start + np.array(keyframes.numbers) / fps
        track = strongest(
            self.pose.track(keyframes, source=source, times=times), self.config.pose.max_people
        )
        pose = spread_keyframes(track, np.array(keyframes.numbers), num_frames)
        linker = FaceLinker(self.config.pose.max_people)
        sampled = FrameStream(clip, fps, num_frames, max(1, round(fps / self.config.samples.fps)))
        for number, frame in zip(sampled.numbers, sampled, strict=True):
            linker.add(number, self._faces_of(frame))
        return pose, linker.track(num_frames, pose, self.face.name, self.face.channel_order)

    def _faces_of(self, frame: np.ndarray) -> list[tuple[Face, np.ndarray | None]]:
        found = self.face.detect(frame)
        faces = [face for face in found if face.score >= self.config.faces.min_score]
        if not self.config.faces.store_embeddings or not self.face.embedding_dim:
            return [(face, None) for face in faces]
        return [(face, self.face.embed(frame, face)) for face in faces]


def _frame_of(track: PoseTrack, index: int) -> PoseTrack:
    kept = slice(index, index + 1)
    return replace(
        track, keypoints=track.keypoints[kept], score=track.score[kept], boxes=track.boxes[kept]
    )
