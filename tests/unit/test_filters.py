"""The rules: each rejects for its own reason, and scores say what was measured."""

import cv2
import numpy as np
import pytest

from pipelines.curation.config import CurationConfig
from pipelines.curation.filters import face_scores, judge, pose_scores
from pipelines.faces import Face
from pipelines.overrides import apply_overrides
from pipelines.pose import PoseTrack

GOOD = {
    "cuts": 0,
    "seconds": 5.0,
    "width": 512,
    "height": 512,
    "camera_percent_per_second": 0.5,
    "camera_tracked_share": 1.0,
    "face_share": 1.0,
    "face_detected": 1.0,
    "face_score": 0.8,
    "face_size": 0.1,
    "face_sharpness": 200.0,
    "pose_missing": 0.1,
}


def test_good_clip_is_kept():
    assert judge(dict(GOOD), CurationConfig()) == ()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cuts": 1}, "cut"),
        ({"seconds": 0.5}, "too_short"),
        ({"height": 100}, "too_small"),
        ({"camera_percent_per_second": 50.0}, "moving_camera"),
        ({"face_share": 0.1}, "no_face"),
        ({"face_score": 0.3}, "low_face_quality"),
        ({"face_size": 0.005}, "low_face_quality"),
        ({"face_sharpness": 1.0}, "low_face_quality"),
        ({"pose_missing": 0.75}, "missing_keypoints"),
    ],
)
def test_each_rule_rejects_for_its_own_reason(change, reason):
    assert judge(GOOD | change, CurationConfig()) == (reason,)


def test_all_broken_rules_are_named():
    scores = GOOD | {"cuts": 2, "camera_percent_per_second": 90.0, "pose_missing": 1.0}
    assert judge(scores, CurationConfig()) == ("cut", "moving_camera", "missing_keypoints")


def test_camera_that_could_not_be_followed_is_not_judged():
    scores = GOOD | {"camera_percent_per_second": 50.0, "camera_tracked_share": 0.1}
    assert judge(scores, CurationConfig()) == ()


def test_seventy_percent_missing_is_still_kept():
    assert judge(GOOD | {"pose_missing": 0.7}, CurationConfig()) == ()


def test_split_takes_sources_with_cuts():
    config = apply_overrides(CurationConfig(), ["shots.on_cut=split"])
    assert judge(GOOD | {"cuts": 3}, config) == ()


def test_face_scores_are_of_the_largest_face_where_there_is_one():
    frame = np.zeros((200, 400, 3), np.uint8)
    cv2.randu(frame, 0, 255)
    large = Face(box=np.array([0.1, 0.2, 0.3, 0.7], np.float32), score=0.9)
    small = Face(box=np.array([0.8, 0.1, 0.9, 0.2], np.float32), score=0.5)
    scores = face_scores([frame, frame], [[large, small], []], 0.6)
    assert scores["face_share"] == 0.5
    assert scores["face_score"] == pytest.approx(0.9)
    assert scores["face_size"] == pytest.approx(0.25)  # 100 of 400 pixels


def test_detections_that_are_not_sure_are_no_faces():
    frame = np.zeros((64, 64, 3), np.uint8)
    box = np.array([0.1, 0.1, 0.5, 0.5], np.float32)
    scores = face_scores([frame] * 2, [[Face(box=box, score=0.7)], [Face(box=box, score=0.5)]], 0.6)
    assert (scores["face_share"], scores["face_detected"]) == (0.5, 1.0)


def test_blurred_face_is_less_sharp():
    generator = np.random.default_rng(0)
    frame = generator.integers(0, 255, (200, 200, 3), dtype=np.uint8)
    face = Face(box=np.array([0.2, 0.2, 0.8, 0.8], np.float32), score=1.0)
    sharp = face_scores([frame], [[face]], 0.6)["face_sharpness"]
    blurred = face_scores([cv2.GaussianBlur(frame, (0, 0), 3)], [[face]], 0.6)["face_sharpness"]
    assert blurred < 0.1 * sharp


def track(score: np.ndarray) -> PoseTrack:
    return PoseTrack(
        keypoints=np.zeros((*score.shape, 2), np.float32),
        score=score.astype(np.float32),
        boxes=np.zeros((*score.shape[:2], 4), np.float32),
    )


def test_missing_keypoints_are_of_the_main_person():
    score = np.zeros((4, 2, 18))
    score[:2, 0] = 0.9
    score[2:, 0, :9] = 0.9
    score[:1, 1] = 0.9
    scores = pose_scores(track(score), max_missing=0.4)
    assert scores["pose_missing"] == pytest.approx(0.25)
    assert scores["pose_bad_frames"] == pytest.approx(0.5)
    assert scores["people"] == 2


def test_nobody_means_everything_is_missing():
    scores = pose_scores(track(np.zeros((5, 0, 18))), max_missing=0.7)
    assert scores == {"pose_missing": 1.0, "pose_bad_frames": 1.0, "people": 0}


@pytest.mark.parametrize(
    "setting",
    [
        "pose.max_missing=1.5",
        "output.crf=60",
        "output.max_seconds=1",
        "samples.fps=0",
        "shots.same_share=-1",
    ],
)
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(ValueError, match=setting.split("=")[0]):
        apply_overrides(CurationConfig(), [setting])
