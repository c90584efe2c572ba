"""Identity: how alike each frame's face is to the reference's, and whether it drifts away."""

import numpy as np
import pytest

from inference.identity import MOST_FRAMES, IdentityMeter

OWN, OTHER = np.array([1.0, 0.0]), np.array([0.0, 1.0])
WINDOWS = [range(0, 4), range(2, 6), range(4, 8)]


def turned(share: float) -> np.ndarray:
    """A face that is the reference's at 0 and another's at 1."""
    return np.array([np.cos(share * np.pi / 2), np.sin(share * np.pi / 2)])


def measured(
    faces: list[np.ndarray | None], windows=WINDOWS, *, recognises: bool = True
) -> IdentityMeter:
    waiting = iter([] if face is None else [face] for face in faces)
    meter = IdentityMeter(
        len(faces),
        windows,
        lambda frame: next(waiting),
        OWN,
        measured_by="two numbers",
        recognises=recognises,
    )
    for _ in faces:
        meter.add(np.zeros((4, 4, 3), np.uint8))
    return meter


def test_every_frame_has_its_similarity_and_none_where_no_face_is_found():
    meter = measured([OWN, None, 2 * OWN, turned(0.5), OWN, OWN, OWN, OWN])
    record = meter.record()
    assert record["similarity"] == [1.0, None, 1.0, 0.7071, 1.0, 1.0, 1.0, 1.0]
    assert record["lowest"] == 0.7071
    assert record["mean"] == pytest.approx((6 + 0.7071) / 7, abs=1e-4)
    assert record["every"] == 1
    assert not meter.warnings()


def test_a_face_that_turns_into_another_is_said():
    meter = measured([turned(frame / 10) for frame in range(8)])
    windows = meter.record()["windows"]
    assert windows["first"] > windows["last"] == windows["lowest"]
    (said,) = meter.warnings()
    assert "the face drifts from the reference" in said


def test_a_video_of_one_window_has_similarities_and_no_drift():
    meter = measured([OWN, OTHER], [range(0, 2)])
    assert meter.record()["measured_by"] == "two numbers"
    assert meter.record()["similarity"] == [1.0, 0.0]
    assert "windows" not in meter.record()
    assert not meter.warnings()


def test_of_several_faces_the_most_alike_counts_however_long_its_embedding():
    meter = IdentityMeter(
        1,
        [range(1)],
        lambda frame: [9 * turned(0.6), turned(0.4)],
        OWN,
        measured_by="two numbers",
        recognises=True,
    )
    meter.add(np.zeros((4, 4, 3), np.uint8))
    assert meter.record()["similarity"] == [round(float(np.cos(0.2 * np.pi)), 4)]


def test_a_face_that_is_somebody_elses_throughout_is_said_by_what_knows_people():
    (said,) = measured([OTHER] * 8).warnings()
    assert "hardly the reference's: mean similarity 0.00 by two numbers" in said
    assert not measured([OTHER] * 8, recognises=False).warnings()


def test_a_video_without_a_face_has_no_similarity_and_a_warning():
    meter = measured([None] * 8)
    record = meter.record()
    assert (record["mean"], record["lowest"]) == (None, None)
    assert "windows" not in record
    (said,) = meter.warnings()
    assert "no face was found in the 8 frames" in said


def test_a_long_video_is_looked_at_evenly():
    frames = 3 * MOST_FRAMES - 10
    record = measured([OWN] * frames, [range(frames)]).record()
    assert record["every"] == 3
    assert len(record["similarity"]) == -(-frames // 3)
