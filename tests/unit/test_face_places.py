"""Where faces are before they are made: from poses, the reference, and what was decoded so far."""

from typing import Any

import numpy as np
import pytest
from skimage.data import astronaut

from animator.keypoints import BODY, FACE, KEYPOINT_NAMES, NUM_KEYPOINTS, WHOLE_BODY
from inference.faces.places import FacePlaces, ReferenceFace, places_of_faces
from pipelines.faces import Face

SIZE = (400, 300)
# A head in pixels: joints of the pose and a detector's landmarks.
HEAD = {
    "nose": (150, 130),
    "right_eye": (130, 110),
    "left_eye": (170, 110),
    "right_ear": (110, 118),
    "left_ear": (190, 118),
}
LANDMARKS = np.array([(131, 111), (169, 111), (150, 132), (135, 155), (165, 155)], np.float32)
BOX = np.array([105, 70, 195, 180], np.float32)


def pose(**moved: tuple[float, float]) -> np.ndarray:
    """Keypoints `(18, 2)` in 0..1."""
    points = np.zeros((NUM_KEYPOINTS, 2), np.float32)
    for name, place in {**HEAD, **moved}.items():
        points[KEYPOINT_NAMES.index(name)] = place
    return points / np.array(SIZE[::-1], np.float32)


def seen(*missing: str) -> np.ndarray:
    return np.array([float(name in HEAD and name not in missing) for name in KEYPOINT_NAMES])


def reference(**changes: Any) -> ReferenceFace:
    given = {"landmarks": LANDMARKS / SIZE[::-1], "box": BOX / np.tile(SIZE[::-1], 2), **changes}
    return ReferenceFace.of(keypoints=pose(), score=seen(), **given)


def found(
    keypoints: np.ndarray, score: np.ndarray, own: ReferenceFace | None = None, **options: Any
) -> FacePlaces:
    own = own or reference()
    return places_of_faces(keypoints[None, None], score[None, None], 0.3, {0: own}, SIZE, **options)


def pixels(places: FacePlaces) -> np.ndarray:
    return places.landmarks[0, 0] * SIZE[::-1]


def test_landmarks_go_with_the_head():
    places = found(pose(), seen())
    assert places.visible.all()
    np.testing.assert_allclose(pixels(places), LANDMARKS, atol=0.01)
    np.testing.assert_allclose(places.boxes[0, 0] * np.tile(SIZE[::-1], 2), BOX, atol=0.01)
    # Twice as large, turned by a quarter of a right angle, and elsewhere.
    angle = np.deg2rad(22.5)
    turn = 1.5 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])

    def move(points: np.ndarray) -> np.ndarray:
        return (points - [150, 120]) @ turn.T + [140, 200]

    moved = {name: tuple(move(np.array(place))) for name, place in HEAD.items()}
    places = found(pose(**moved), seen())
    np.testing.assert_allclose(pixels(places), move(LANDMARKS), atol=0.1)
    assert float((places.boxes[0, 0, 2] - places.boxes[0, 0, 0]) * SIZE[1]) == pytest.approx(135)


def test_a_usual_face_is_put_on_eyes_and_nose():
    without = reference(landmarks=np.full((5, 2), np.nan))
    for own, missing in ((without, ()), (reference(), ("right_ear", "left_ear"))):
        places = found(pose(), seen(*missing), own)
        assert places.visible.all()
        assert np.abs(pixels(places) - LANDMARKS).max() < 9
    alone = ReferenceFace.of(LANDMARKS / SIZE[::-1], BOX, pose(), np.zeros(NUM_KEYPOINTS))
    np.testing.assert_allclose(pixels(found(pose(), seen(), alone))[:2, 1], 110, atol=3)


def test_a_whole_body_pose_brings_its_own_landmarks():
    keypoints, score = np.zeros((WHOLE_BODY, 2), np.float32), np.zeros(WHOLE_BODY)
    keypoints[BODY], score[BODY] = pose(), seen()
    face = np.zeros((68, 2), np.float32)
    face[36:42], face[42:48], face[30], face[48], face[54] = LANDMARKS + 3
    keypoints[FACE], score[FACE] = face / SIZE[::-1], 1
    np.testing.assert_allclose(pixels(found(keypoints, score)), LANDMARKS + 3, atol=0.01)
    score[FACE.start + 40] = 0  # an eye is not seen whole: those of the reference
    np.testing.assert_allclose(pixels(found(keypoints, score)), LANDMARKS, atol=0.01)


@pytest.mark.parametrize(
    ("keypoints", "score"),
    [
        pytest.param(pose(), seen("left_eye"), id="one eye"),
        pytest.param(pose(), seen("nose"), id="no nose"),
        pytest.param(pose(right_eye=(170, 110), left_eye=(130, 110)), seen(), id="from behind"),
        pytest.param(pose(right_eye=(146, 110), left_eye=(154, 110)), seen(), id="profile"),
        pytest.param(pose() * 0.2, seen(), id="too small"),
        pytest.param(pose() + np.array([0.65, 0]), seen(), id="outside"),
        pytest.param(pose() * np.nan, seen(), id="nowhere"),
    ],
)
def test_faces_that_do_not_show_are_not_visible(keypoints: np.ndarray, score: np.ndarray):
    places = found(keypoints, score, min_face=30)
    assert not places.visible.any()
    assert np.isnan(places.landmarks).all()
    assert not places.boxes.any()


def test_people_without_a_face_in_the_reference_are_not_visible():
    keypoints = np.stack([pose(), pose()])[None]
    score = np.stack([seen(), seen()])[None]
    places = places_of_faces(keypoints, score, 0.3, {1: reference()}, SIZE)
    assert places.visible.tolist() == [[False, True]]


class Sees:
    """A detector that finds these faces."""

    name = licence = reason = "here"
    embedding_dim = 0
    channel_order = "rgb"

    def __init__(self, *faces: Face):
        self.faces = list(faces)

    def detect(self, frame: np.ndarray) -> list[Face]:
        return self.faces

    def embed(self, frame: np.ndarray, face: Face) -> np.ndarray:
        return np.zeros(0)


def face(shift: float = 0.0, scale: float = 1.0, turned: bool = False) -> Face:
    centre = LANDMARKS.mean(0)
    points = (LANDMARKS - centre) * scale
    if turned:
        points = points[:, ::-1] * [1, -1]
    box = (BOX.reshape(2, 2) - centre) * scale + centre + shift
    return Face(
        box=(box / SIZE[::-1]).reshape(4).astype(np.float32),
        score=1.0,
        landmarks=((points + centre + shift) / SIZE[::-1]).astype(np.float32),
    )


def test_a_detected_face_corrects_its_place():
    places = found(pose(), seen())
    frames = astronaut()[None, :400, :300]
    assert places.correct(frames, [0], Sees(face(shift=10))) == 1
    np.testing.assert_allclose(pixels(places), LANDMARKS + 10, atol=0.01)


@pytest.mark.parametrize(
    "other", [face(shift=120), face(scale=2), face(scale=0.5), face(turned=True)]
)
def test_faces_that_cannot_be_the_one_are_ignored(other: Face):
    places = found(pose(), seen())
    other_box = Face(box=face().box, score=1.0)  # a cascade gives no landmarks
    frames = astronaut()[None, :400, :300]
    assert places.correct(frames, [0], Sees(other)) == 0
    assert places.correct(frames, [0], Sees(other_box)) == 0
    np.testing.assert_allclose(pixels(places), LANDMARKS, atol=0.01)


def test_two_faces_go_to_the_people_they_overlap_most():
    keypoints = np.stack([pose(), pose() + np.array([0.2, 0])])[None].astype(np.float32)
    score = np.stack([seen(), seen()])[None]
    places = places_of_faces(keypoints, score, 0.3, {0: reference(), 1: reference()}, SIZE)
    right = face(shift=4)
    right.landmarks = right.landmarks + np.array([0.2, 0])
    right.box = right.box + np.array([0.2, 0, 0.2, 0])
    assert places.correct(astronaut()[None, :400, :300], [0], Sees(right, face(shift=-4))) == 2
    np.testing.assert_allclose(places.landmarks[0, 0] * SIZE[::-1], LANDMARKS - 4, atol=0.01)
    moved = LANDMARKS + 4 + [60, 0]
    np.testing.assert_allclose(places.landmarks[0, 1] * SIZE[::-1], moved, atol=0.01)
