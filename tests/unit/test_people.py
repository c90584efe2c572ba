"""People of a clip: believed bodies, faces without one, who is main and who walks in front."""

import csv
from pathlib import Path

import numpy as np
import pytest

from animator.keypoints import KEYPOINT_NAMES
from pipelines.curation.filters import people_class
from pipelines.curation.people import people_scores
from pipelines.faces import Face, open_face_backend
from pipelines.pose import PoseTrack
from pipelines.pose_backends import open_pose_backend
from pipelines.video import decode

Box = tuple[float, float, float, float]
LEGS = [KEYPOINT_NAMES.index(f"{side}_{joint}") for side in ("left", "right") for joint in
        ("knee", "ankle")]  # fmt: skip
NOBODY: Box = (0, 0, 0, 0)
MAIN: Box = (0.1, 0.1, 0.4, 0.9)
OTHER: Box = (0.5, 0.1, 0.8, 0.9)


def track(*people: list[Box], joints: list[int] | None = None) -> PoseTrack:
    """A track of the boxes of each person by frame, with all joints (or those named) seen."""
    boxes = np.array(people, np.float32).swapaxes(0, 1)
    score = np.zeros((*boxes.shape[:2], 18), np.float32)
    score[..., slice(None) if joints is None else joints] = 0.9
    score[boxes[..., 2] == 0] = 0
    return PoseTrack(
        keypoints=np.zeros((*score.shape, 2), np.float32), score=score, boxes=boxes, backend="test"
    )


def face(x: float, y: float = 0.1, size: float = 0.1, score: float = 0.9) -> Face:
    return Face(box=np.array([x, y, x + size, y + size], np.float32), score=score)


def test_people_together_are_counted_and_the_main_one_measured():
    scores = people_scores(track([MAIN] * 10, [OTHER] * 6 + [NOBODY] * 4), [[]] * 10)
    assert scores["people"] == 2
    assert scores["main_height"] == pytest.approx(0.8)
    assert scores["main_presence"] == 1
    assert scores["people_crossing"] == 0


def test_one_after_the_other_is_one():
    first, second = [MAIN] * 5 + [NOBODY] * 5, [NOBODY] * 5 + [OTHER] * 5
    assert people_scores(track(first, second), [[]] * 10)["people"] == 1


def test_people_who_are_lost_in_turns_are_still_together():
    first, second = [MAIN, NOBODY] * 5 + [MAIN], [NOBODY, OTHER] * 5 + [NOBODY]
    assert people_scores(track(first, second), [[]] * 11)["people"] == 2


def test_people_far_behind_the_main_one_are_not_counted():
    behind: Box = (0.6, 0.4, 0.65, 0.6)
    assert people_scores(track([MAIN] * 10, [behind] * 10), [[]] * 10)["people"] == 1
    assert people_scores(track([behind] * 10), [[]] * 10)["people"] == 1


def test_detection_that_never_shows_a_head_or_trunk_is_nobody():
    scores = people_scores(track([MAIN] * 10, joints=LEGS), [[]] * 10)
    assert scores == {
        "people": 0,
        "main_height": None,
        "main_presence": 0.0,
        "people_crossing": 0.0,
    }


def test_glimpse_of_a_few_joints_is_nobody():
    few = [KEYPOINT_NAMES.index(name) for name in ("nose", "neck", "left_eye")]
    assert people_scores(track([MAIN] * 2 + [NOBODY] * 8, joints=few), [[]] * 10)["people"] == 0


def test_body_without_a_head_is_a_person():
    body = [index for index, name in enumerate(KEYPOINT_NAMES) if index not in (0, 14, 15, 16, 17)]
    assert people_scores(track([MAIN] * 10, joints=body), [[]] * 10)["people"] == 1


def test_faces_without_bodies_are_people_and_those_of_bodies_are_not_counted_twice():
    nobody = PoseTrack.empty(10)
    large = people_scores(nobody, [[face(0.2, size=0.6)]] * 10)
    assert large["people"] == 1
    assert large["main_height"] == pytest.approx(0.9)
    own = face(0.2)
    assert people_scores(track([MAIN] * 10), [[own]] * 10)["people"] == 1
    assert people_scores(track([MAIN] * 10), [[own, face(0.7)]] * 10)["people"] == 2


def test_second_face_in_one_box_is_somebody_else():
    assert people_scores(track([MAIN] * 10), [[face(0.15), face(0.3)]] * 10)["people"] == 2


def test_unsure_or_passing_faces_are_nobody():
    nobody = PoseTrack.empty(10)
    assert people_scores(nobody, [[face(0.2, score=0.55)]] * 10)["people"] == 0
    assert people_scores(nobody, [[face(0.2)]] * 2 + [[]] * 8)["people"] == 0


def test_somebody_who_walks_in_front_crosses():
    steps = np.linspace(-0.3, 1.0, 14)
    walker: list[Box] = [(float(x), 0.1, float(x) + 0.3, 0.9) for x in steps]
    scores = people_scores(track([MAIN] * 14, walker), [[]] * 14)
    assert scores["people_crossing"] == pytest.approx(0.36, abs=0.1)


def test_clip_without_frames_has_nobody():
    assert people_scores(PoseTrack.empty(0), [])["people"] == 0


@pytest.mark.real_data
def test_real_clips_have_the_people_of_their_labels(data_root: Path, models_env: Path):
    pose, faces = open_pose_backend("onnx", threads=1), open_face_backend("auto", threads=1)
    names = (
        "cotracker_backpack.mp4",  # no head
        "cotracker_cat.mp4",
        "liveportrait_d0.mp4",  # head alone
        "mmaction2_demo_skeleton.mp4",
    )
    with (data_root / "video" / "labels.csv").open() as file:
        labels = {row["file"]: row["people"] for row in csv.DictReader(file)}
    for name in names:
        frames = list(decode(data_root / "video" / name, fps=1, max_side=640))[:4]
        found = [faces.detect(frame) for frame in frames]
        scores = people_scores(pose.track(frames), found)
        assert people_class(scores) == ("2+" if int(labels[name]) > 1 else labels[name]), name
