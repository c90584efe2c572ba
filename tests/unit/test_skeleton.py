"""Pose images: colours, confidence, hidden joints."""

import numpy as np

from animator.keypoints import KEYPOINT_NAMES, LIMBS
from animator.skeleton import COLOURS, draw_pose

SIZE = (128, 96)


def standing() -> tuple[np.ndarray, np.ndarray]:
    points = {
        "nose": (0.5, 0.15), "neck": (0.5, 0.25),
        "right_shoulder": (0.4, 0.25), "right_elbow": (0.35, 0.4), "right_wrist": (0.33, 0.52),
        "left_shoulder": (0.6, 0.25), "left_elbow": (0.65, 0.4), "left_wrist": (0.67, 0.52),
        "right_hip": (0.44, 0.52), "right_knee": (0.43, 0.72), "right_ankle": (0.43, 0.92),
        "left_hip": (0.56, 0.52), "left_knee": (0.57, 0.72), "left_ankle": (0.57, 0.92),
        "right_eye": (0.48, 0.13), "left_eye": (0.52, 0.13),
        "right_ear": (0.45, 0.14), "left_ear": (0.55, 0.14),
    }  # fmt: skip
    keypoints = np.array([points[name] for name in KEYPOINT_NAMES], np.float32)
    return keypoints, np.ones(18, np.float32)


def test_first_limb_is_red_in_rgb():
    keypoints, score = standing()
    image = draw_pose(keypoints, score, 512, 384)
    neck, shoulder = keypoints[1], keypoints[2]
    x, y = (neck + shoulder) / 2 * [384, 512]
    red, green, blue = image[int(y), int(x)].astype(int)
    assert red > 100
    assert green == blue == 0
    assert LIMBS[0] == (1, 2)


def test_hidden_joints_take_their_limbs_with_them():
    keypoints, score = standing()
    score[4] = 0.1
    image = draw_pose(keypoints, score, *SIZE)
    x, y = (keypoints[4] * SIZE[::-1]).astype(int)
    assert image[y - 3 : y + 4, x - 3 : x + 4].max() == 0
    assert draw_pose(keypoints, score * 0, *SIZE).max() == 0


def test_colours_fade_with_confidence():
    keypoints, score = standing()
    full, faint = draw_pose(keypoints, score, *SIZE), draw_pose(keypoints, score * 0.5, *SIZE)
    assert 0 < faint.max() < full.max()
    assert len(np.unique(COLOURS, axis=0)) == 18


def test_points_far_outside_do_not_break_drawing():
    keypoints, score = standing()
    keypoints[4] = (1e9, -1e9)
    keypoints[7] = np.nan
    assert draw_pose(keypoints, score, *SIZE).shape == (*SIZE, 3)


def test_several_people_are_drawn():
    keypoints, score = standing()
    both = draw_pose(
        np.stack([keypoints * 0.4, keypoints * 0.4 + 0.5]), np.stack([score] * 2), *SIZE
    )
    assert both[:64, :48].max() > 0
    assert both[64:, 48:].max() > 0
