"""The rules: what a clip must be like to be kept, judged from the scores that its record keeps.

Measuring and judging are apart: scores are recorded whatever the verdict, and none of them depends
on a threshold, so thresholds can be revised without a second pass over the videos. `RULES` says
each rule once; the judge and the report read the same table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipelines.curation.config import CurationConfig
from pipelines.schema import Scores

REASONS = {
    "unreadable": "cannot be read or decoded",
    "cut": "holds a shot change",
    "too_short": "too short",
    "too_small": "too few pixels",
    "moving_camera": "the camera moves",
    "dark_or_bright": "too dark, too bright or burnt out",
    "blurred": "blurred",
    "black_bars": "bars take too much of the picture",
    "burnt_in_text": "text is burnt into the picture",
    "no_face": "no face in enough frames",
    "low_face_quality": "faces unsure, small, blurred, turned away or badly lit",
    "person_changes": "the main person changes",
    "missing_keypoints": "too many keypoints missing",
    "missing_hands": "too many points of the hands missing",
    "missing_face_points": "too many points of the face missing",
    "wrong_people_count": "too few or too many people",
    "small_person": "the main person is too small",
    "people_cross": "another person covers the main one",
    "duplicate": "shows what an earlier clip shows",
    "not_stored": "would be kept, but was never stored",
}

Series = dict[str, list[float]]
"""A value a sampled frame, by name: `face_score` and `pose_missing`."""


@dataclass(frozen=True)
class Rule:
    """One comparison of a score with a setting.

    score: a name in `measures`.
    setting: the threshold's name in the configuration, `group.name`.
    direction: `min` rejects scores below the threshold, `max` those above it.
    title: what the score is, with its unit, for an axis.
    """

    reason: str
    score: str
    setting: str
    direction: Literal["min", "max"]
    title: str

    def limit(self, config: CurationConfig) -> float | None:
        """The threshold, or None where the configuration has this rule switched off."""
        if self.reason == "cut":
            return 0.0 if config.shots.on_cut == "reject" else None
        if self.setting == "people.max_people" and config.people.max_people == 0:
            return None
        other_reading = "frames" if self.score == "pose_missing" else "mean"
        if self.reason == "missing_keypoints" and config.pose.reading == other_reading:
            return None
        group, _, name = self.setting.partition(".")
        return float(getattr(getattr(config, group), name))

    def breaks(self, measured: Mapping[str, float | None], config: CurationConfig) -> bool:
        """Whether the score is on the wrong side; what was not measured breaks no rule."""
        value, limit = measured.get(self.score), self.limit(config)
        if value is None or limit is None:
            return False
        return value < limit if self.direction == "min" else value > limit


RULES = (
    Rule("cut", "cuts", "shots.on_cut", "max", "shot changes"),
    Rule("too_short", "seconds", "output.min_seconds", "min", "length, s"),
    Rule("too_small", "short_side", "output.min_side", "min", "shorter side, pixels"),
    Rule(
        "moving_camera",
        "camera_percent_per_second",
        "camera.max_percent_per_second",
        "max",
        "camera motion, % a second",
    ),
    Rule(
        "moving_camera",
        "camera_peak_percent_per_second",
        "camera.max_peak_percent_per_second",
        "max",
        "fastest fifth of the camera motion, % a second",
    ),
    Rule("dark_or_bright", "luma", "quality.min_luma", "min", "brightness, 0..255"),
    Rule("dark_or_bright", "luma", "quality.max_luma", "max", "brightness, 0..255"),
    Rule(
        "dark_or_bright",
        "clipped_share",
        "quality.max_clipped",
        "max",
        "share burnt out or drowned",
    ),
    Rule("blurred", "sharpness", "quality.min_sharpness", "min", "sharpness of the picture"),
    Rule("black_bars", "black_bars", "quality.max_black_bars", "max", "share in bars"),
    Rule("burnt_in_text", "text_share", "quality.max_text", "max", "share in text"),
    Rule("no_face", "face_share", "faces.min_share", "min", "frames with a sure face"),
    Rule("low_face_quality", "face_score", "faces.min_score", "min", "detection score"),
    Rule("low_face_quality", "face_size", "faces.min_size", "min", "height of the face"),
    Rule(
        "low_face_quality", "face_sharpness", "faces.min_sharpness", "min", "sharpness of the face"
    ),
    Rule(
        "low_face_quality", "face_frontality", "faces.min_frontality", "min", "turned to the camera"
    ),
    Rule(
        "low_face_quality",
        "face_exposure",
        "faces.min_exposure",
        "min",
        "share of the face well lit",
    ),
    Rule(
        "person_changes",
        "face_identity",
        "faces.min_identity",
        "min",
        "agreement with itself, cosine",
    ),
    Rule("missing_keypoints", "pose_missing", "pose.max_missing", "max", "share missing"),
    Rule(
        "missing_keypoints",
        "pose_bad_frames",
        "pose.max_bad_frames",
        "max",
        "frames that miss too many",
    ),
    Rule("missing_hands", "hands_missing", "pose.max_missing_hands", "max", "share missing"),
    Rule(
        "missing_face_points",
        "face_points_missing",
        "pose.max_missing_face",
        "max",
        "share missing",
    ),
    Rule("wrong_people_count", "people", "people.min_people", "min", "people"),
    Rule("wrong_people_count", "people", "people.max_people", "max", "people"),
    Rule("small_person", "main_height", "people.min_height", "min", "share of the frame's height"),
    Rule(
        "people_cross",
        "people_crossing",
        "people.max_crossing",
        "max",
        "frames in which others cover",
    ),
)


def judge(
    scores: Scores, series: Mapping[str, Sequence[float]], config: CurationConfig
) -> tuple[str, ...]:
    """The reasons to reject a clip, in the order of `REASONS`; none means keep.

    A function of what the record keeps alone. A score that is not there or None, because it was
    not measured or has no meaning for this clip, breaks no rule.
    """
    measured = measures(scores, series, config)
    broken = {rule.reason for rule in RULES if rule.breaks(measured, config)}
    return tuple(reason for reason in REASONS if reason in broken)


def measures(
    scores: Scores, series: Mapping[str, Sequence[float]], config: CurationConfig
) -> dict[str, float | None]:
    """Every number the rules compare: the scores, and what thresholds make of them.

    short_side: pixels.
    camera_percent_per_second, camera_peak_percent_per_second: None where too little of the clip
        could be followed to know.
    face_share: share of frames with a face scored at least `faces.min_score`.
    pose_missing: share of the main person's joints missing, the mean over frames.
    pose_bad_frames: share of frames in which more than `pose.max_missing` of them are.
    """
    measured: dict[str, float | None] = {
        name: float(value) if isinstance(value, int | float) else None
        for name, value in scores.items()
    }
    sides = measured.get("width"), measured.get("height")
    if sides[0] is not None and sides[1] is not None:
        measured["short_side"] = min(sides[0], sides[1])
    followed = measured.get("camera_tracked_share")
    if followed is not None and followed < config.camera.min_tracked_share:
        measured["camera_percent_per_second"] = None
        measured["camera_peak_percent_per_second"] = None
    if len(faces := series.get("face_score", ())):
        measured["face_share"] = float(np.mean(np.asarray(faces) >= config.faces.min_score))
    if len(missing := series.get("pose_missing", ())):
        measured["pose_missing"] = float(np.mean(missing))
        bad = np.asarray(missing) > config.pose.max_missing
        measured["pose_bad_frames"] = float(np.mean(bad))
    return measured


def camera_moves(scores: Scores, config: CurationConfig) -> bool:
    """Whether the camera moves; where hardly a pair of frames could be followed, nobody knows."""
    return "moving_camera" in judge(scores, {}, config)


def lacks_face(series: Mapping[str, Sequence[float]], config: CurationConfig) -> bool:
    """Whether too few of the sampled frames show a face that the detector is sure of."""
    return "no_face" in judge({}, series, config)


def people_class(scores: Scores) -> Literal["0", "1", "2+"] | None:
    """The number of people as it is labelled; None where it was not measured."""
    people = scores.get("people")
    if not isinstance(people, int | float):
        return None
    return "0" if people < 1 else "1" if people < 2 else "2+"
