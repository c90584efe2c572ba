"""Faces of a clip: which is the main one, what it is like, and whether it stays the same person."""

import cv2
import numpy as np
import pytest

from pipelines.curation.face_scores import face_scores, main_faces
from pipelines.faces import Face

FRONTAL = np.array([[0.3, 0.4], [0.7, 0.4], [0.5, 0.5], [0.35, 0.7], [0.65, 0.7]], np.float32)


def face(x: float, size: float = 0.2, score: float = 0.9, landmarks=None) -> Face:
    box = np.array([x, 0.2, x + size, 0.2 + size], np.float32)
    if landmarks is None:
        return Face(box=box, score=score)
    return Face(box=box, score=score, landmarks=box[:2] + landmarks * size)


def noise(height: int = 200, width: int = 200) -> np.ndarray:
    return np.random.default_rng(0).integers(20, 240, (height, width, 3), dtype=np.uint8)


def scores_of(frames, faces, embeddings=None):
    return face_scores(frames, faces, embeddings or [None] * len(frames))


def score_of(name: str, frames, faces, embeddings=None) -> float:
    value = scores_of(frames, faces, embeddings)[0][name]
    assert isinstance(value, int | float)
    return value


def test_scores_are_of_the_main_face_and_the_series_of_the_best():
    frame = noise(200, 400)
    large = Face(box=np.array([0.1, 0.2, 0.3, 0.7], np.float32), score=0.7)
    small = Face(box=np.array([0.8, 0.1, 0.9, 0.2], np.float32), score=0.95)
    scores, series = scores_of([frame, frame], [[large, small], []])
    assert scores["face_detected"] == 0.5
    assert scores["face_score"] == pytest.approx(0.7)
    assert scores["face_size"] == pytest.approx(0.25)  # 100 of 400 pixels
    assert series["face_score"] == pytest.approx([0.95, 0.0])


def test_larger_face_that_passes_by_is_not_the_main_one():
    faces = [[face(0.1 + 0.01 * i)] for i in range(10)]
    faces[4].insert(0, face(0.6, size=0.3))
    assert main_faces(faces) == [0, 0, 0, 0, 1, 0, 0, 0, 0, 0]


def test_main_face_is_found_again_elsewhere_after_a_gap():
    faces = [[face(0.1)]] * 4 + [[]] * 3 + [[face(0.7)]] * 3
    assert main_faces(faces) == [0] * 4 + [None] * 3 + [0] * 3


def test_face_that_was_seen_beside_the_main_one_never_stands_in_for_it():
    both = [face(0.1), face(0.6, size=0.18)]
    faces = [both] * 12 + [[both[1]]]
    assert main_faces(faces) == [0] * 12 + [None]


def test_blurred_face_is_less_sharp():
    frame, found = noise(), [[face(0.2, size=0.6)]]
    sharp = score_of("face_sharpness", [frame], found)
    blurred = score_of("face_sharpness", [cv2.GaussianBlur(frame, (0, 0), 3)], found)
    assert blurred < 0.1 * sharp


def test_turned_head_is_less_frontal_and_a_profile_is_not_at_all():
    def frontality(nose: float) -> float:
        landmarks = FRONTAL.copy()
        landmarks[2, 0] = nose
        return score_of("face_frontality", [noise()], [[face(0.2, landmarks=landmarks)]])

    assert frontality(0.5) == pytest.approx(1, abs=1e-3)
    assert frontality(0.4) == pytest.approx(0.5, abs=1e-3)
    assert frontality(0.3) == pytest.approx(0, abs=1e-3)
    assert frontality(0.2) == 0


def test_burnt_out_half_of_a_face_is_badly_exposed():
    frame = noise()
    frame[:, 100:] = 255
    scores, _ = scores_of([frame], [[face(0.3, size=0.4)]])
    assert scores["face_exposure"] == pytest.approx(0.5, abs=0.02)


def embeddings(people: list[int], spread: float = 0.9) -> list[np.ndarray]:
    """Vectors of 64 numbers, near one direction a person."""
    generator = np.random.default_rng(1)
    directions = generator.normal(size=(10, 64))
    return [directions[who] + spread * generator.normal(size=64) for who in people]


def identity(people: list[int]) -> float:
    count = len(people)
    found = [[face(0.2)]] * count
    return score_of("face_identity", [noise(50, 50)] * count, found, embeddings(people))


def test_another_person_at_the_same_place_is_told_apart():
    assert identity([0] * 20) > 0.7
    assert identity([0] * 10 + [1] * 10) < 0.3
    assert identity([0] * 5 + [1] * 15) < 0.3


def test_single_odd_frames_are_no_change_of_person():
    assert identity([0] * 10 + [1] + [0] * 10) > 0.6


def test_without_landmarks_or_identity_nothing_is_claimed():
    scores, _ = scores_of([noise()] * 3, [[face(0.2)]] * 3)
    unknown = ("face_frontality", "face_identity", "face_identity_agreement")
    assert [scores[name] for name in unknown] == [None] * 3
    nobody, series = scores_of([noise()] * 3, [[], [], []])
    assert nobody["face_score"] is None
    assert nobody["face_detected"] == 0
    assert series == {"face_score": [0.0, 0.0, 0.0]}
