"""Whoever a detector finds twice in a frame is one person; two people near each other stay two."""

from pathlib import Path

import numpy as np
import pytest

from animator.keypoints import KEYPOINT_NAMES, NUM_KEYPOINTS, VISIBLE, WHOLE_BODY
from pipelines.pose import Person, box_overlap
from pipelines.pose_backends import open_pose_backend
from pipelines.pose_duplicates import COMPARED, SIGMAS, pose_similarity, without_duplicates
from pipelines.pose_onnx import NMS_OVERLAP, OnnxPoseBackend
from pipelines.video import decode

SIZE = (1280, 720)
HEAD = ("nose", "right_eye", "left_eye", "right_ear", "left_ear")
# A standing body that faces us, in shares of its height: x from its middle, y from its top.
STANDING = {
    "nose": (0.0, 0.08),
    "neck": (0.0, 0.18),
    "right_shoulder": (-0.11, 0.18),
    "right_elbow": (-0.14, 0.34),
    "right_wrist": (-0.15, 0.48),
    "left_shoulder": (0.11, 0.18),
    "left_elbow": (0.14, 0.34),
    "left_wrist": (0.15, 0.48),
    "right_hip": (-0.07, 0.5),
    "right_knee": (-0.07, 0.73),
    "right_ankle": (-0.07, 0.96),
    "left_hip": (0.07, 0.5),
    "left_knee": (0.07, 0.73),
    "left_ankle": (0.07, 0.96),
    "right_eye": (-0.02, 0.06),
    "left_eye": (0.02, 0.06),
    "right_ear": (-0.04, 0.07),
    "left_ear": (0.04, 0.07),
}


def standing(
    x: float = 640, y: float = 60, height: float = 600, *, score: float = 0.9, only: tuple = ()
) -> Person:
    """Somebody whose middle and top are at x, y pixels; where `only` some joints show, boxed so."""
    points = np.array([STANDING[name] for name in KEYPOINT_NAMES]) * height + [x, y]
    seen = np.array([not only or name in only for name in KEYPOINT_NAMES])
    margin = 0.05 * height
    corners = [points[seen].min(0) - margin, points[seen].max(0) + margin]
    return Person(
        keypoints=(points * seen[:, None] / SIZE).astype(np.float32),
        score=np.where(seen, score, 0).astype(np.float32),
        box=(np.concatenate(corners) / np.tile(SIZE, 2)).astype(np.float32),
    )


def test_head_that_was_found_again_beside_the_whole_person_goes():
    whole, head = standing(score=0.6), standing(643, 62, score=0.95, only=HEAD)
    assert box_overlap(whole.box, head.box) < NMS_OVERLAP / 2
    for people in ([whole, head], [head, whole]):
        (left,) = without_duplicates(people, SIZE)
        assert left is whole


def test_of_two_with_as_many_joints_the_surer_stays_and_of_equals_the_first():
    unsure, sure = standing(score=0.5), standing(642, score=0.8)
    assert without_duplicates([unsure, sure], SIZE) == [sure]
    twin = standing(642, score=0.5)
    assert without_duplicates([unsure, twin], SIZE) == [unsure]


def test_everybody_else_keeps_the_order_and_the_very_arrays():
    others = [standing(200, score=0.5), standing(900, 100, 300), standing(1100, 90, 400)]
    head = standing(201, 61, only=HEAD)
    left = without_duplicates([head, others[1], others[0], others[2]], SIZE)
    assert [id(person) for person in left] == [id(others[i]) for i in (1, 0, 2)]


@pytest.mark.parametrize("people", [[], [standing()], [standing(only=HEAD)]])
def test_nobody_and_somebody_alone_are_left_as_they_are(people: list[Person]):
    left = without_duplicates(people, SIZE)
    assert [id(person) for person in left] == [id(person) for person in people]


@pytest.mark.parametrize(
    ("x", "y", "height"),
    [(676, 60, 600), (640, 96, 564), (665, 80, 520), (600, 300, 360)],
    ids=["cheek to cheek", "head over head", "behind, farther off", "child before parent"],
)
def test_two_who_hug_stay_two(x: float, y: float, height: float):
    people = [standing(), standing(x, y, height)]
    assert without_duplicates(people, SIZE) == people
    heads = [standing(), standing(x, y, height, only=HEAD)]
    assert without_duplicates(heads, SIZE) == heads


def test_two_joints_at_the_same_places_are_too_few_to_say_that_it_is_the_same_person():
    arms = standing(only=("right_shoulder", "right_elbow"))
    assert len(without_duplicates([standing(), arms], SIZE)) == 2
    arm = standing(only=("right_shoulder", "right_elbow", "right_wrist"))
    assert len(without_duplicates([standing(), arm], SIZE)) == 1
    # The neck is no joint of its own: it lies where the shoulders say.
    shoulders = standing(only=("right_shoulder", "left_shoulder", "neck"))
    assert len(without_duplicates([standing(), shoulders], SIZE)) == 2


def test_joint_that_is_not_seen_is_not_compared():
    whole, head = standing(), standing(only=HEAD)
    head.keypoints[~np.isin(KEYPOINT_NAMES, HEAD)] = 0.01
    head.score[~np.isin(KEYPOINT_NAMES, HEAD)] = VISIBLE / 2
    assert without_duplicates([whole, head], SIZE) == [whole]


def test_hands_and_face_play_no_part():
    unseen = WHOLE_BODY - NUM_KEYPOINTS

    def with_parts(person: Person, score: float) -> Person:
        points = np.concatenate([person.keypoints, np.full((unseen, 2), score, np.float32)])
        scores = np.pad(person.score, (0, unseen), constant_values=score)
        return Person(keypoints=points, score=scores, box=person.box)

    whole, head = with_parts(standing(), 0.1), with_parts(standing(only=HEAD), 0.9)
    assert without_duplicates([head, whole], SIZE) == [whole]


def test_similarity_is_that_of_coco():
    one, other = standing(), standing()
    assert pose_similarity(one, other, SIZE) == 1
    # A joint that is off by s·k, the root of the area times twice its constant, counts e^(-1/2).
    area = np.prod((one.box[2:] - one.box[:2]) * SIZE)
    places = other.keypoints[:NUM_KEYPOINTS]
    places[COMPARED, 0] += 2 * SIGMAS * np.sqrt(area) / SIZE[0]
    assert pose_similarity(one, other, SIZE) == pytest.approx(np.exp(-0.5), abs=1e-3)
    # COCO's own order: nose, eyes, ears, shoulders, elbows, wrists, hips, knees, ankles.
    published = [26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89]
    assert sorted((1000 * SIGMAS).round().astype(int).tolist()) == sorted(published)


@pytest.mark.real_data
def test_woman_whose_head_has_a_box_of_its_own_is_one_person(data_root: Path, models_env: Path):
    backend = open_pose_backend("onnx")
    assert isinstance(backend, OnnxPoseBackend)
    first = list(decode(data_root / "video" / "dj_video3.mp4", max_side=960, end=1.5))
    # She sits alone; then a second woman has come in from the right.
    frames = [first[8], first[27]]
    assert [len(backend.detect(frame)[0]) for frame in frames] == [2, 3]
    alone, both = backend.people(frames)
    assert [len(alone), len(both)] == [1, 2]
    for people in (alone, both):
        (she,) = [person for person in people if person.box[0] < 0.2]
        np.testing.assert_allclose(she.keypoints[0], [0.29, 0.526], atol=0.02)
        assert (she.score >= VISIBLE).sum() >= 9
