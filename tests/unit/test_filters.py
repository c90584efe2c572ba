"""The rules: each rejects for its own reason, from what a record keeps and nothing else."""

import pytest

from pipelines.curation.config import CurationConfig, is_threshold
from pipelines.curation.filters import (
    REASONS,
    RULES,
    camera_moves,
    judge,
    lacks_face,
    measures,
    people_class,
)
from pipelines.overrides import apply_overrides, to_dict

GOOD = {
    "cuts": 0,
    "seconds": 5.0,
    "width": 512,
    "height": 512,
    "camera_percent_per_second": 0.5,
    "camera_peak_percent_per_second": 0.5,
    "camera_tracked_share": 1.0,
    "sharpness": 300.0,
    "luma": 120.0,
    "clipped_share": 0.05,
    "black_bars": 0.0,
    "text_share": 0.0,
    "face_score": 0.8,
    "face_size": 0.1,
    "face_sharpness": 200.0,
    "face_frontality": 0.7,
    "face_exposure": 0.9,
    "face_identity": 0.8,
    "hands_missing": 0.5,
    "face_points_missing": 0.5,
    "people": 1,
    "main_height": 0.8,
    "people_crossing": 0.0,
}
GOOD_SERIES = {"face_score": [0.8, 0.7, 0.0, 0.9], "pose_missing": [0.0, 0.1, 0.2, 0.1]}
# Rules that let everything through unless asked.
STRICT = (
    "faces.min_frontality=0.3",
    "pose.max_missing_hands=0.6",
    "pose.max_missing_face=0.6",
    "people.min_people=1",
    "people.max_people=1",
    "people.min_height=0.3",
    "people.max_crossing=0.2",
)


def config(*settings: str) -> CurationConfig:
    return apply_overrides(CurationConfig(), list(settings))


def test_good_clip_is_kept_even_by_strict_rules():
    assert judge(GOOD, GOOD_SERIES, config()) == ()
    assert judge(GOOD, GOOD_SERIES, config(*STRICT)) == ()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cuts": 1}, "cut"),
        ({"seconds": 0.5}, "too_short"),
        ({"height": 100}, "too_small"),
        ({"width": 100}, "too_small"),
        ({"camera_percent_per_second": 50.0}, "moving_camera"),
        ({"camera_peak_percent_per_second": 50.0}, "moving_camera"),
        ({"luma": 3.0}, "dark_or_bright"),
        ({"luma": 254.0}, "dark_or_bright"),
        ({"clipped_share": 0.99}, "dark_or_bright"),
        ({"sharpness": 2.0}, "blurred"),
        ({"black_bars": 0.7}, "black_bars"),
        ({"text_share": 0.3}, "burnt_in_text"),
        ({"face_score": 0.3}, "low_face_quality"),
        ({"face_size": 0.005}, "low_face_quality"),
        ({"face_sharpness": 1.0}, "low_face_quality"),
        ({"face_frontality": 0.1}, "low_face_quality"),
        ({"face_exposure": 0.1}, "low_face_quality"),
        ({"face_identity": 0.1}, "person_changes"),
        ({"hands_missing": 0.9}, "missing_hands"),
        ({"face_points_missing": 0.9}, "missing_face_points"),
        ({"people": 0}, "wrong_people_count"),
        ({"people": 2}, "wrong_people_count"),
        ({"main_height": 0.1}, "small_person"),
        ({"people_crossing": 0.5}, "people_cross"),
    ],
)
def test_each_rule_rejects_for_its_own_reason(change, reason):
    assert judge(GOOD | change, GOOD_SERIES, config(*STRICT)) == (reason,)


def test_the_cases_above_and_below_break_every_rule_of_the_table():
    broken = {"no_face": {"face_score": [0.0]}, "missing_keypoints": {"pose_missing": [1.0]}}
    for rule in RULES:
        value = -1e9 if rule.direction == "min" else 1e9
        settings = config(*STRICT, "pose.reading=frames")
        if rule.score == "pose_missing":
            settings = config(*STRICT)
        measured = {rule.score: value}
        assert rule.breaks(measured, settings), rule
        if rule.reason in broken:
            assert rule.reason in judge({}, broken[rule.reason], settings)
    assert {rule.reason for rule in RULES} == set(REASONS) - {
        "unreadable",
        "duplicate",
        "not_stored",
    }


def test_rules_name_settings_that_exist_and_most_can_be_revised():
    groups = to_dict(CurationConfig())
    for rule in RULES:
        group, name = rule.setting.split(".")
        assert name in groups[group]
        assert is_threshold(rule.setting) or rule.reason == "too_short"


def test_face_in_too_few_frames_is_no_face_and_the_threshold_can_be_revised():
    series = {"face_score": [0.55] * 9 + [0.9], "pose_missing": [0.0]}
    assert judge(GOOD, series, config()) == ("no_face",)
    assert judge(GOOD, series, config("faces.min_score=0.5")) == ()
    assert judge(GOOD, series, config("faces.min_share=0.05")) == ()
    assert lacks_face(series, config())


def test_seventy_percent_missing_is_still_kept():
    series = GOOD_SERIES | {"pose_missing": [0.4, 1.0]}
    assert judge(GOOD, series, config()) == ()
    series = GOOD_SERIES | {"pose_missing": [0.45, 1.0]}
    assert judge(GOOD, series, config()) == ("missing_keypoints",)


def test_both_readings_of_the_papers_rule_come_from_the_same_series():
    lost_half_the_time = GOOD_SERIES | {"pose_missing": [1.0] * 6 + [0.0] * 4}
    assert judge(GOOD, lost_half_the_time, config()) == ()
    frames = config("pose.reading=frames")
    assert judge(GOOD, lost_half_the_time, frames) == ("missing_keypoints",)
    poor_all_the_time = GOOD_SERIES | {"pose_missing": [0.75, 0.7, 0.7, 0.7]}
    assert judge(GOOD, poor_all_the_time, config()) == ("missing_keypoints",)
    assert judge(GOOD, poor_all_the_time, frames) == ()


def test_all_broken_rules_are_named_in_order():
    scores = GOOD | {"cuts": 2, "camera_percent_per_second": 90.0}
    series = {"pose_missing": [1.0], "face_score": [0.0]}
    expected = ("cut", "moving_camera", "no_face", "missing_keypoints")
    assert judge(scores, series, config()) == expected


def test_camera_that_could_not_be_followed_is_not_judged():
    scores = GOOD | {"camera_percent_per_second": 50.0, "camera_tracked_share": 0.1}
    assert judge(scores, GOOD_SERIES, config()) == ()
    assert not camera_moves(scores, config())
    assert camera_moves(scores | {"camera_tracked_share": 0.9}, config())


def test_what_was_not_measured_or_has_no_meaning_breaks_no_rule():
    assert judge({}, {}, config(*STRICT)) == ()
    unknown = dict.fromkeys(GOOD, None)
    assert judge(unknown, {}, config(*STRICT)) == ()


def test_any_number_of_people_passes_unless_limited():
    assert judge(GOOD | {"people": 9}, GOOD_SERIES, config()) == ()
    assert judge(GOOD | {"people": 0}, GOOD_SERIES, config()) == ()


def test_split_takes_sources_with_cuts():
    assert judge(GOOD | {"cuts": 3}, GOOD_SERIES, config("shots.on_cut=split")) == ()


def test_measures_are_the_numbers_that_rules_compare():
    measured = measures(GOOD, GOOD_SERIES, config())
    assert measured["short_side"] == 512
    assert measured["face_share"] == 0.75
    assert measured["pose_missing"] == pytest.approx(0.1)
    assert measured["pose_bad_frames"] == 0
    assert all(rule.score in measured for rule in RULES)


def test_people_are_classed_as_they_are_labelled():
    found = [people_class({"people": count}) for count in (0, 1, 2, 7)]
    assert found == ["0", "1", "2+", "2+"]
    assert people_class({}) is None


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
        config(setting)
