"""Seams and drift: what is measured of a video while it is written."""

import numpy as np
import pytest

from inference.seams import SeamMeter, layouts_of, seams_of
from inference.windows import WindowConfig, plan_windows

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
    meter = SeamMeter(len(frames), {"sampling": windows}, **options)
    for frame in frames:
        assert meter.add(frame) is frame
    return meter


def test_even_motion_scores_one_and_is_no_reason_to_warn():
    meter = measured(moving(step=0.5))
    record = meter.record()
    assert record["score"] == pytest.approx(1, abs=0.05)
    assert record["windows"] == 4
    assert record["colour_drift"] > 10
    assert not meter.warnings()


def test_a_hard_cut_between_windows_is_a_bad_score_and_is_said():
    apart = [range(0, 12), range(12, 24), range(24, 36)]
    meter = measured(moving(cuts=(12, 24), step=1.0), apart)
    record = meter.record()
    assert record["at_seams"] == pytest.approx(31, abs=1)
    assert record["inside"] == pytest.approx(1, abs=0.1)
    assert record["score"] > 20
    assert any("where windows meet" in text for text in meter.warnings())
    assert any("colours drift" in text for text in meter.warnings())


def test_a_cut_within_a_window_is_no_seam():
    assert measured(moving(cuts=(6, 14, 22), step=1.0)).record()["score"] < 0.3


def test_the_whole_overlap_of_two_windows_is_a_seam():
    seams, inside = seams_of(FRAMES, WINDOWS)
    assert inside == [*range(0, 7), *range(12, 15), *range(20, 23), *range(28, 35)]
    assert sorted(seams + inside) == list(range(FRAMES - 1))
    assert seams_of(12, [range(0, 8), range(2, 10), range(4, 12)])[0] != []
    assert seams_of(4, [range(0, 4), range(0, 4)]) == ([], [])


def test_windows_that_are_shifted_and_those_of_the_decoder_are_scored_too():
    config = WindowConfig(overlap=4, shift="golden")

    def plan(step: int):
        return plan_windows(100, 16, config, step)

    layouts = layouts_of(plan, 4, [(0, 60), (50, 100)])
    assert [*layouts] == [
        "sampling", "sampling, step 1", "sampling, step 2", "sampling, step 3", "decoding"
    ]  # fmt: skip
    meter = SeamMeter(100, layouts)
    for frame in moving(100, cuts=(55,), step=0.5):
        meter.add(frame)
    record = meter.record()
    assert record["worst"] > record["score"]
    still = WindowConfig(overlap=4)
    assert len(layouts_of(lambda step: plan_windows(100, 16, still, step), 9, [(0, 100)])) == 1


def test_a_face_that_turns_into_another_is_said():
    own, other = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    asked = []

    def identify(frame: np.ndarray) -> np.ndarray | None:
        asked.append(int(frame.mean()))
        share = len(asked) / 6
        return None if len(asked) == 2 else (1 - share) * own + share * other

    meter = measured(moving(step=0.5), identify=identify, reference=own)
    identity = meter.record()["identity"]
    assert len(asked) == len(WINDOWS)  # once a window
    assert identity["windows"] == 3  # one showed no face
    assert identity["first"] > identity["last"] == identity["lowest"]
    assert any("face drifts" in text for text in meter.warnings())


def test_a_video_of_one_window_has_no_seams():
    meter = measured(moving(8), [range(8)])
    assert meter.record() == {}
    assert not meter.warnings()
