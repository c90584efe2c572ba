"""Missing keypoints of the main person, by parts."""

import numpy as np
import pytest

from animator.keypoints import FACE, LEFT_HAND
from pipelines.curation.pose_parts import pose_scores
from pipelines.pose import PoseTrack


def track(score: np.ndarray) -> PoseTrack:
    return PoseTrack(
        keypoints=np.zeros((*score.shape, 2), np.float32),
        score=score.astype(np.float32),
        boxes=np.zeros((*score.shape[:2], 4), np.float32),
    )


def test_missing_joints_are_of_the_main_person_frame_by_frame():
    score = np.zeros((3, 2, 18))
    score[0, 0] = 0.9
    score[1, 0, :9] = 0.9
    score[:, 1] = 0.9
    scores, series = pose_scores(track(score))
    assert series == {"pose_missing": [0.0, 0.5, 1.0]}
    assert scores == {"hands_missing": None, "face_points_missing": None}


def test_hands_and_face_are_parts_of_their_own():
    score = np.full((4, 1, 128), 0.9)
    score[:, :, LEFT_HAND] = 0
    score[:2, :, FACE] = 0
    scores, series = pose_scores(track(score))
    assert scores["hands_missing"] == pytest.approx(0.5)
    assert scores["face_points_missing"] == pytest.approx(0.5)
    assert series["pose_missing"] == [0.0] * 4


def test_nobody_means_everything_is_missing():
    assert pose_scores(PoseTrack.empty(3))[1] == {"pose_missing": [1.0, 1.0, 1.0]}
