"""Seams and drift: what is measured of a video while it is written."""

import numpy as np
import pytest

from inference.seams import SeamMeter, pose_motion, seams_of

WINDOWS = [range(0, 12), range(8, 20), range(16, 28), range(24, 36)]
FRAMES = 36


def moving(frames: int = FRAMES, cuts: tuple[int, ...] = (), step: float = 2.0) -> np.ndarray:
    """A texture that brightens evenly, and by 30 levels more at each cut."""
    texture = np.random.default_rng(0).uniform(0, 60, (16, 12, 3))
    light = step * np.arange(frames)
    for cut in cuts:
        light[cut:] += 30
    return (texture + light[:, None, None, None]).astype(np.uint8)


def measured(frames: np.ndarray, windows=WINDOWS, **options) -> SeamMeter:
    meter = SeamMeter(windows, **options)
    for frame in frames:
        assert meter.add(frame) is frame
    return meter


def test_even_motion_scores_one_and_is_no_reason_to_warn():
    meter = measured(moving(step=0.5))
    record = meter.record()
    assert record["sampling"]["score"] == pytest.approx(1, abs=0.05)
    assert record["windows"] == 4
    assert record["colour_drift"] > 10
    assert not meter.warnings()


def test_a_hard_cut_between_windows_is_a_bad_score_and_is_said():
    apart = [range(0, 12), range(12, 24), range(24, 36)]
    meter = measured(moving(cuts=(12, 24), step=1.0), apart)
    record = meter.record()
    assert record["sampling"]["at_seams"] == pytest.approx(31, abs=1)
    assert record["sampling"]["inside"] == pytest.approx(1, abs=0.1)
    assert record["sampling"]["score"] > 20
    assert any("windows of sampling meet" in text for text in meter.warnings())
    assert any("colours drift" in text for text in meter.warnings())


def test_a_cut_within_a_window_is_no_seam():
    assert measured(moving(cuts=(6, 14, 22), step=1.0)).record()["sampling"]["score"] < 0.3


def test_the_whole_overlap_of_two_windows_is_a_seam():
    seams, inside = seams_of(FRAMES, WINDOWS)
    assert inside == [*range(0, 7), *range(12, 15), *range(20, 23), *range(28, 35)]
    assert sorted(seams + inside) == list(range(FRAMES - 1))
    assert seams_of(12, [range(0, 8), range(2, 10), range(4, 12)])[0] != []
    assert seams_of(4, [range(0, 4), range(0, 4)]) == ([], [])


def test_windows_of_the_decoder_have_a_score_of_their_own():
    meter = measured(moving(cuts=(18,), step=0.5), decoded=[(0, 20), (16, 36)])
    record = meter.record()
    assert record["sampling"]["score"] != record["decoding"]["score"] > 5
    assert any("windows of decoding" in text for text in meter.warnings())
    assert "decoding" not in measured(moving(), decoded=[(0, 36)]).record()


def test_a_quick_movement_where_windows_meet_is_no_seam():
    seams, _ = seams_of(FRAMES, WINDOWS)
    points = np.zeros((FRAMES, 1, 18, 2))
    for pair in seams:
        points[pair + 1 :] += 0.01
    points[:, :, 0] = np.arange(FRAMES).reshape(-1, 1, 1)  # a joint that is not seen
    score = np.ones((FRAMES, 1, 18))
    score[:, :, 0] = 0
    motion = pose_motion(points, score, 0.3)
    assert np.flatnonzero(motion > 1e-6).tolist() == seams
    motion += 0.0005
    jumps = moving(cuts=tuple(pair + 1 for pair in seams[:4]), step=0.5)
    assert measured(jumps).warnings()
    meter = measured(jumps, motion=motion)
    assert meter.record()["sampling"]["motion"] > meter.record()["sampling"]["score"] > 1.1
    assert not any("meet" in text for text in meter.warnings())


def test_a_video_of_one_window_has_no_seams():
    meter = measured(moving(8), [range(8)])
    assert meter.record() == {}
    assert not meter.warnings()
