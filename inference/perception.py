"""What animating needs to see: the people of a picture, and of every frame of a video.

Shapes: T frames, P people, K keypoints (18 or 128).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from animator.keypoints import BODY, VISIBLE
from inference.people import HEAD
from inference.small_frames import SmallFrames
from pipelines.curation.config import ShotConfig
from pipelines.curation.shots import find_shots
from pipelines.faces import Face, FaceBackend, open_face_backend
from pipelines.pose import PoseTrack
from pipelines.pose_backends import open_pose_backend
from pipelines.pose_file import FilePoseBackend
from pipelines.video import VideoInfo, VideoLimits, probe

PERCEPTION_SIDE = 640  # pixels; people and faces are looked for at this size
MAX_FRAMES = 3000
_NAMED_CUTS = 5  # of the cuts that a warning tells of
_LIMITS = VideoLimits(max_frames=20 * MAX_FRAMES)


class AnimationError(ValueError):
    """A request that cannot be animated; the message is one sentence for its user."""


@dataclass(frozen=True)
class Pose:
    """Keypoints `(..., K, 2)` in 0..1 of a frame of `size` (height, width), and their score."""

    keypoints: np.ndarray
    score: np.ndarray
    size: tuple[int, int]
    threshold: float = VISIBLE
    backend: str = ""  # who found them


class Perception:
    """Faces and poses of a picture and a video.

    Args:
        face: face backend, `auto` by default.
        pose: pose backend, `auto` by default: a file of keypoints beside the picture or video
            where there is one, else the networks that `ANIMATOR_MODELS` holds.
        faces: a face backend that is open already, instead of `face`.

    Raises:
        ValueError: where a backend cannot be opened.
    """

    def __init__(self, face: str = "auto", pose: str = "auto", faces: FaceBackend | None = None):
        self.faces = faces or open_face_backend(face)
        self.poses = open_pose_backend(pose)

    @staticmethod
    def probe(path: Path) -> VideoInfo:
        """Size and rate of a video; VideoError where it is none."""
        return probe(path, _LIMITS)

    def face(self, path: Path, image: np.ndarray, chosen: int) -> Face | None:
        """The face that was asked for; None where the picture shows none and none was chosen.

        Raises:
            AnimationError: for a face that is not there.
        """
        faces = self.faces.detect(_shrink(image))
        if len(faces) >= chosen:
            return faces[chosen - 1]
        if chosen == 1:
            return None
        raise AnimationError(
            f"{path}: face {chosen} was asked for, but {len(faces)} "
            f"{'was' if len(faces) == 1 else 'were'} found ({self.faces.name}); they are counted "
            "from 1, the largest."
        )

    def faces_in(self, path: Path, image: np.ndarray) -> list[Face]:
        """All faces of a picture, largest first."""
        return self.faces.detect(_shrink(image))

    def reference(self, path: Path, image: np.ndarray, face: Face | None) -> Pose:
        """The people of the picture `(P, K, 2)`, the one with the face, or the largest, first.

        Raises:
            AnimationError: for a picture without people.
        """
        track = self.poses.track([_shrink(image)], source=path, times=np.zeros(1))
        if not _has_person(track, self.poses.threshold):
            raise AnimationError(
                f"{path}: no person found in the reference image ({self.poses.name}: "
                f"{self.poses.reason}); give a picture that shows the person, or keypoints beside "
                f"it as {path.stem}.pose.npz."
            )
        who = 0 if face is None else _owner(track, face)
        order = [who, *(i for i in range(track.score.shape[1]) if i != who)]
        keypoints, score = track.keypoints[0, order], track.score[0, order]
        return Pose(keypoints, score, image.shape[:2], self.poses.threshold, track.backend)

    def frames(self, path: Path, info: VideoInfo) -> Sequence[np.ndarray]:
        """Every frame at the clip's own rate, small, `(H, W, 3)`, decoded when it is asked for.

        Raises:
            AnimationError, VideoError: for a clip that is too long or cannot be read.
        """
        frames = SmallFrames(path, fps=info.fps, max_side=PERCEPTION_SIDE, limits=_LIMITS)
        if len(frames) > MAX_FRAMES:
            raise AnimationError(
                f"{path}: {len(frames)} frames, expected at most {MAX_FRAMES}; cut the clip."
            )
        return frames

    def cuts(self, path: Path, info: VideoInfo) -> tuple[float, ...]:
        """Seconds at which a new shot begins: after a cut, a fade or a dissolve.

        Raises:
            VideoError: for a clip that cannot be read.
        """
        scan = find_shots(path, info, ShotConfig(), _LIMITS)
        return tuple(round(cut.end, 3) for cut in scan.cuts)

    def driving(self, path: Path, info: VideoInfo, frames: Sequence[np.ndarray]) -> Pose:
        """The people of every frame `(T, P, K, 2)`, the main one first.

        Raises:
            AnimationError: for a clip without people.
        """
        times = np.arange(len(frames)) / info.fps
        track = self.poses.track(frames, source=path, times=times)
        if not _has_person(track, self.poses.threshold):
            raise AnimationError(
                f"{path}: no person found in the driving video ({self.poses.name}: "
                f"{self.poses.reason}); give a clip that shows the person moving, or keypoints "
                f"beside it as {path.stem}.pose.npz."
            )
        size = (info.height, info.width)
        return Pose(track.keypoints, track.score, size, self.poses.threshold, track.backend)

    def models(self, *poses: Pose) -> dict[str, dict[str, str | None]]:
        """Name and licence of what found the face and these poses, for the record."""
        found = {pose.backend or self.poses.name: self._licence(pose) for pose in poses}
        licences = dict.fromkeys(found.values())
        return {
            "face_detector": {"name": self.faces.name, "licence": self.faces.licence},
            "pose": {"name": ", ".join(found), "licence": "; ".join(licences)},
        }

    def _licence(self, pose: Pose) -> str:
        of_file = pose.backend.startswith(f"{FilePoseBackend.name}:")
        return FilePoseBackend.licence if of_file else self.poses.licence


def cut_warning(cuts: Sequence[float]) -> str:
    """What cuts of a driving clip mean; the first of them are named by their seconds."""
    where = ", ".join(f"{second:.2f}" for second in cuts[:_NAMED_CUTS])
    more = f" and {len(cuts) - _NAMED_CUTS} more" if len(cuts) > _NAMED_CUTS else ""
    return (
        f"the clip has {len(cuts)} cut{'s' if len(cuts) > 1 else ''} (at {where} s{more}): people "
        "are followed and frames blended across as if there were none"
    )


def check_inputs(reference: Path, driving: Path) -> None:
    """Raises AnimationError where there is no such picture or video."""
    for path, what in ((reference, "reference image"), (driving, "driving video")):
        if not path.is_file():
            raise AnimationError(f"{path}: no such {what}; check the path.")


def _shrink(image: np.ndarray) -> np.ndarray:
    scale = PERCEPTION_SIDE / max(image.shape[:2])
    if scale >= 1:
        return image
    return cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def _owner(track: PoseTrack, face: Face) -> int:
    """The person whose head a face is: the nearest nose, eyes and ears; else the largest person."""
    centre = (face.box[:2] + face.box[2:]) / 2
    reach = float((face.box[2:] - face.box[:2]).max())
    seen = track.score[0][:, HEAD] >= VISIBLE
    away = np.linalg.norm(track.keypoints[0][:, HEAD] - centre, axis=-1)
    distance = np.where(seen, away, np.inf).min(1)
    nearest = int(distance.argmin())
    return nearest if distance[nearest] <= reach else 0


def _has_person(track: PoseTrack, threshold: float) -> bool:
    return track.score.size > 0 and bool((track.score[:, 0, BODY] >= threshold).any())
