"""The models at work: what is seen in sampled frames of a shot, pose and faces of a kept clip.

T frames, P people. Coordinates are 0..1 of the frame; absent people are zeros.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from animator.keypoints import VISIBLE
from pipelines.camera import measure_camera, open_camera_backend
from pipelines.curation.config import CurationConfig
from pipelines.curation.face_scores import face_scores, main_faces
from pipelines.curation.filters import Series
from pipelines.curation.frames import FrameStream
from pipelines.curation.people import people_scores
from pipelines.curation.pose_parts import pose_scores
from pipelines.curation.tracks import FaceLinker, spread_keyframes, strongest
from pipelines.faces import Face, open_face_backend
from pipelines.pose import PoseTrack
from pipelines.pose_backends import open_pose_backend
from pipelines.schema import FaceTrack, Scores

# Whether a person stays the same needs so many looks at the main face, spread over the clip.
_EMBEDDED_FRAMES = 16


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the models found in T sampled frames.

    embeddings: (D,) of the main face of some frames, None for the others; all None where the face
        model knows no identity.
    """

    track: PoseTrack
    faces: list[list[Face]]
    embeddings: list[np.ndarray | None]


class Perception:
    """The face, pose and camera models of a run, opened once a process.

    Threads may share it: pose networks keep nothing between two calls, the others are called by one
    thread at a time. How long a thread has waited for its turn is counted (`waited`).
    """

    def __init__(self, config: CurationConfig) -> None:
        self.config = config
        # Workers fill the cores; one thread each also keeps sums in one order.
        self.face = open_face_backend(config.faces.backend, threads=1)
        self.pose = open_pose_backend(config.pose.backend, threads=1)
        self.camera = open_camera_backend(config.camera.backend)
        self._face_lock, self._camera_lock = threading.Lock(), threading.Lock()
        self._waits = threading.local()

    def names(self) -> dict[str, str]:
        """The name of each model, which every shard of a run must share."""
        return {
            "face": self.face.name,
            "pose": f"{self.pose.name} ({self.pose.reason})",
            "camera": self.camera.name,
        }

    def notes(self) -> tuple[str, ...]:
        """Which models were taken, and why, in words."""
        return (
            f"face model {self.face.name}: {self.face.reason}",
            f"pose model {self.pose.name}: {self.pose.reason}",
            f"camera measure {self.camera.name}: {self.camera.reason}",
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
            "camera": self.camera.describe(),
        }

    def see(
        self, frames: Sequence[np.ndarray], times: np.ndarray, source: Path, rate: float | None
    ) -> Seen:
        """People and faces in sampled RGB frames, at `times` seconds of the file `source`.

        Args:
            rate: of the source's frames, where it is known; the source is then not opened here.
        """
        track = self.pose.track(frames, source=source, times=times, rate=rate)
        faces = [self._detect(frame) for frame in frames]
        return Seen(track=track, faces=faces, embeddings=self._embeddings(frames, faces))

    def measure_camera(
        self, frames: Sequence[np.ndarray], fps: float, boxes: np.ndarray | None
    ) -> Scores:
        """How the camera moves, for backends that are networks; people's `boxes` (T, P, 4)."""
        with self._turn(self._camera_lock):
            return measure_camera(frames, fps, boxes, self.camera)

    def annotate(
        self,
        clip: Path,
        fps: float,
        num_frames: int,
        source: Path,
        start: float,
        rate: float | None,
    ) -> tuple[PoseTrack, FaceTrack]:
        """Pose and faces of every frame of a stored clip.

        Args:
            clip: the encoded file, so that the tracks belong to the very frames that are stored.
            source: the video it was cut from at `start` seconds, for keypoints beside it.
            rate: of the source's frames, as in `see`.

        Raises:
            VideoError: the clip does not decode.
        """
        every = self.config.pose.every
        keyframes = FrameStream(clip, fps, num_frames, every)
        times = start + np.array(keyframes.numbers) / fps
        track = strongest(
            self.pose.track(keyframes, source=source, times=times, rate=rate),
            self.config.pose.max_people,
        )
        pose = spread_keyframes(track, np.array(keyframes.numbers), num_frames)
        linker = FaceLinker(self.config.pose.max_people)
        sampled = FrameStream(clip, fps, num_frames, max(1, round(fps / self.config.samples.fps)))
        for number, frame in zip(sampled.numbers, sampled, strict=True):
            linker.add(number, self._stored_faces(frame))
        return pose, linker.track(num_frames, pose, self.face.name, self.face.channel_order)

    def waited(self) -> float:
        """Seconds that this thread has waited so far for others to be done with a model."""
        return getattr(self._waits, "seconds", 0.0)

    @contextmanager
    def _turn(self, lock: threading.Lock) -> Iterator[None]:
        began = time.monotonic()
        with lock:
            self._waits.seconds = self.waited() + time.monotonic() - began
            yield

    def _detect(self, frame: np.ndarray) -> list[Face]:
        with self._turn(self._face_lock):
            return self.face.detect(frame)

    def _embed(self, frame: np.ndarray, face: Face) -> np.ndarray:
        with self._turn(self._face_lock):
            return self.face.embed(frame, face)

    def _stored_faces(self, frame: np.ndarray) -> list[tuple[Face, np.ndarray | None]]:
        found = self._detect(frame)
        faces = [face for face in found if face.score >= self.config.faces.stored_min_score]
        if not self.config.faces.store_embeddings or not self.face.embedding_dim:
            return [(face, None) for face in faces]
        return [(face, self._embed(frame, face)) for face in faces]

    def _embeddings(
        self, frames: Sequence[np.ndarray], faces: Sequence[Sequence[Face]]
    ) -> list[np.ndarray | None]:
        embeddings: list[np.ndarray | None] = [None] * len(faces)
        if not self.face.embedding_dim:
            return embeddings
        shown = [
            (index, number) for index, number in enumerate(main_faces(faces)) if number is not None
        ]
        chosen = np.linspace(0, len(shown) - 1, min(_EMBEDDED_FRAMES, len(shown)))
        for position in chosen.round().astype(int):
            index, number = shown[position]
            face = faces[index][number]
            if np.isfinite(face.landmarks).all():
                embeddings[index] = self._embed(frames[index], face)
        return embeddings


def seen_scores(frames: Sequence[np.ndarray], seen: Seen) -> tuple[Scores, Series]:
    """Every score of the faces, the pose and the people in sampled frames."""
    scores, series = face_scores(frames, seen.faces, seen.embeddings)
    parts, missing = pose_scores(seen.track)
    scores |= parts | people_scores(seen.track, seen.faces)
    scores["pose_backend"] = seen.track.backend
    return scores, series | missing
