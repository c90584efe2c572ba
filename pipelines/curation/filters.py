"""Scores of a clip and the rules that judge them.

Measuring and judging are apart: every score is recorded whatever the verdict, so thresholds can be
revised without a second pass over the videos.

T sampled frames, P people
"""

from collections.abc import Sequence

import cv2
import numpy as np

from animator.keypoints import BODY, VISIBLE
from pipelines.curation.config import CurationConfig
from pipelines.faces import Face
from pipelines.pose import PoseTrack
from pipelines.schema import Scores

REASONS = {
    "unreadable": "cannot be read or decoded",
    "cut": "holds a shot change",
    "too_short": "too short",
    "too_small": "too few pixels",
    "moving_camera": "the camera moves",
    "no_face": "no face in enough frames",
    "low_face_quality": "faces unsure, small or blurred",
    "missing_keypoints": "too many keypoints missing",
}
_FACE_SIDE = 48


def judge(scores: Scores, config: CurationConfig) -> tuple[str, ...]:
    """The reasons to reject a clip, in the order of `REASONS`; none means keep."""
    faces, shortest = config.faces, min(_number(scores, "width"), _number(scores, "height"))
    broken = {
        "cut": config.shots.on_cut == "reject" and _number(scores, "cuts") > 0,
        "too_short": _number(scores, "seconds") < config.output.min_seconds,
        "too_small": shortest < config.output.min_side,
        "moving_camera": camera_moves(scores, config),
        "no_face": lacks_face(scores, config),
        "low_face_quality": _number(scores, "face_detected") > 0
        and (
            _number(scores, "face_score") < faces.min_score
            or _number(scores, "face_size") < faces.min_size
            or _number(scores, "face_sharpness") < faces.min_sharpness
        ),
        "missing_keypoints": _number(scores, "pose_missing") > config.pose.max_missing,
    }
    return tuple(reason for reason in REASONS if broken.get(reason))


def camera_moves(scores: Scores, config: CurationConfig) -> bool:
    """Whether the camera moves; where hardly a pair of frames could be followed, nobody knows."""
    camera = config.camera
    return (
        _number(scores, "camera_percent_per_second") > camera.max_percent_per_second
        and _number(scores, "camera_tracked_share") >= camera.min_tracked_share
    )


def lacks_face(scores: Scores, config: CurationConfig) -> bool:
    """Whether too few of the sampled frames show a face that the detector is sure of."""
    return _number(scores, "face_share") < config.faces.min_share


def face_scores(
    frames: Sequence[np.ndarray], faces: Sequence[Sequence[Face]], min_score: float
) -> Scores:
    """What the largest face of each frame is like.

    face_share: share of frames whose largest face is detected with at least `min_score`.
    face_detected: share of frames with any detection at all.
    face_score, face_size, face_sharpness: means over the frames with any.
    """
    found = [(frame, people[0]) for frame, people in zip(frames, faces, strict=True) if people]
    count = max(1, len(frames))
    scores: Scores = {
        "face_share": sum(face.score >= min_score for _, face in found) / count,
        "face_detected": len(found) / count,
    }
    if not found:
        return scores | {"face_score": 0.0, "face_size": 0.0, "face_sharpness": 0.0}
    return scores | {
        "face_score": float(np.mean([face.score for _, face in found])),
        "face_size": float(np.mean([_face_size(frame, face.box) for frame, face in found])),
        "face_sharpness": float(np.mean([_sharpness(frame, face.box) for frame, face in found])),
    }


def pose_scores(track: PoseTrack, max_missing: float) -> Scores:
    """Missing keypoints of the main person's body and the number of people.

    pose_missing: share of all T x 18 joints scored under the track's threshold; 1 for nobody.
    pose_bad_frames: share of frames in which more than `max_missing` of the 18 are missing.
    people: most people seen in at least a tenth of the frames.
    """
    num_frames, num_people = track.score.shape[:2]
    if num_frames == 0 or num_people == 0:
        return {"pose_missing": 1.0, "pose_bad_frames": 1.0, "people": 0}
    score = track.score[..., BODY]
    missing = (score[:, 0] < VISIBLE).mean(axis=1)
    present = (score >= VISIBLE).any(axis=2).sum(axis=1)
    crowds = [count for count in range(num_people + 1) if (present >= count).mean() >= 0.1]
    return {
        "pose_missing": float(missing.mean()),
        "pose_bad_frames": float((missing > max_missing).mean()),
        "people": max(crowds),
    }


def _number(scores: Scores, name: str) -> float:
    """A score as a number; what could not be measured counts as 0."""
    value = scores.get(name)
    return float(value) if isinstance(value, int | float) else 0.0


def _face_size(frame: np.ndarray, box: np.ndarray) -> float:
    height, width = frame.shape[:2]
    return float((box[3] - box[1]) * height / max(height, width))


def _sharpness(frame: np.ndarray, box: np.ndarray) -> float:
    """Variance of the Laplacian of the face at 48 x 48, grey levels 0..255.

    A small common size, so that it measures focus and not how near the camera is.
    """
    height, width = frame.shape[:2]
    left, top, right, bottom = np.clip(box, 0, 1) * (width, height, width, height)
    crop = frame[int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))]
    if min(crop.shape[:2], default=0) < 2:
        return 0.0
    grey = cv2.cvtColor(np.ascontiguousarray(crop), cv2.COLOR_RGB2GRAY)
    shrinking = min(crop.shape[:2]) > _FACE_SIDE
    quality = cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC
    scaled = cv2.resize(grey, (_FACE_SIDE, _FACE_SIDE), interpolation=quality)
    return float(cv2.Laplacian(scaled, cv2.CV_64F).var())
