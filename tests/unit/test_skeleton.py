"""Pose images: colours, confidence, hidden joints, hands and faces, in both styles."""

import cv2
import numpy as np
import pytest

from animator.keypoints import (
    BODY,
    FACE,
    HAND_EDGES,
    KEYPOINT_NAMES,
    LEFT_HAND,
    LIMBS,
    NUM_KEYPOINTS,
    RIGHT_HAND,
    WHOLE_BODY,
)
from animator.skeleton import draw_pose
from animator.skeleton_colours import COLOURS

SIZE = (128, 96)
CANVAS = (2160, 2880)  # of the published drawing; at this size nothing is scaled
STYLES = ("bold", "published")


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


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("style", STYLES)
def test_points_far_outside_or_not_finite_do_not_break_drawing(style):
    keypoints, score = whole()
    for part in (BODY, LEFT_HAND, FACE):
        far = [(1e9, -1e9), (-3e38, 3e38), (np.nan, 0.5), (np.inf, -np.inf), (-0.5, 1.5)]
        keypoints[part][3:8] = far
    score[20], score[70], score[5], score[100] = np.nan, np.inf, 7, -1
    image = draw_pose(keypoints, score, *SIZE, style=style)
    assert image.shape == (*SIZE, 3)
    assert image.max() > 0
    nothing = draw_pose(np.full_like(keypoints, np.nan), score, *SIZE, 0.0, style=style)
    assert nothing.max() == 0


def test_several_people_are_drawn():
    keypoints, score = standing()
    both = draw_pose(
        np.stack([keypoints * 0.4, keypoints * 0.4 + 0.5]), np.stack([score] * 2), *SIZE
    )
    assert both[:64, :48].max() > 0
    assert both[64:, 48:].max() > 0


def whole() -> tuple[np.ndarray, np.ndarray]:
    """Standing, with hands below the wrists and a face around the nose."""
    body, _ = standing()
    turn = np.linspace(0, 2 * np.pi, 68, endpoint=False)
    face = body[0] + np.stack([0.06 * np.cos(turn), 0.06 * np.sin(turn)], -1)
    fingers = np.array(
        [(0.0, 0.02)] + [(0.012 * f, 0.01 * b) for f in range(-2, 3) for b in (3, 4, 5, 6)]
    )
    keypoints = np.concatenate([body, body[7] + fingers, body[4] + fingers, face])
    return keypoints.astype(np.float32), np.ones(WHOLE_BODY, np.float32)


def canvas_pixel(image: np.ndarray, point: np.ndarray) -> list[int]:
    x, y = (point * np.array(CANVAS[::-1], np.float32)).astype(int)
    return image[y, x].tolist()


def test_parts_of_a_whole_body_follow_each_other():
    parts = (BODY, LEFT_HAND, RIGHT_HAND, FACE)
    assert [part.stop - part.start for part in parts] == [18, 21, 21, 68]
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert WHOLE_BODY == 128
    fingers = [HAND_EDGES[first : first + 4] for first in range(0, 20, 4)]
    assert fingers[1] == ((0, 5), (5, 6), (6, 7), (7, 8))
    assert [finger[-1][1] for finger in fingers] == [4, 8, 12, 16, 20]


@pytest.mark.parametrize("style", STYLES)
def test_missing_hands_and_face_leave_the_body_as_it_is(style):
    keypoints, score = whole()
    score[NUM_KEYPOINTS:] = 0
    keypoints[NUM_KEYPOINTS:] = 0
    alone = draw_pose(keypoints[BODY], score[BODY], *SIZE, style=style)
    assert np.array_equal(draw_pose(keypoints, score, *SIZE, style=style), alone)


def test_small_bold_hands_and_faces_show_beside_the_limbs_and_never_on_them():
    keypoints, score = whole()
    image = draw_pose(keypoints, score, *SIZE).astype(int)
    alone = draw_pose(keypoints[BODY], score[BODY], *SIZE).astype(int)
    for a, b in LIMBS:
        x, y = ((keypoints[a] + keypoints[b]) / 2 * SIZE[::-1]).astype(int)
        assert np.abs(image[y, x] - alone[y, x]).max() <= 40, (a, b)
    added = (image - alone).max(-1)
    for part in (LEFT_HAND, RIGHT_HAND, FACE):
        low, high = (keypoints[part].min(0), keypoints[part].max(0)) * np.array(SIZE[::-1])
        (left, top), (right, bottom) = low.astype(int), high.astype(int) + 1
        assert (added[top:bottom, left:right] > 80).sum() >= 8


def test_bold_leaves_out_points_of_hands_and_face_below_the_threshold():
    keypoints, score = whole()
    alone = draw_pose(keypoints[BODY], score[BODY], *SIZE)
    score[NUM_KEYPOINTS:] = 0.2
    assert np.array_equal(draw_pose(keypoints, score, *SIZE), alone)
    assert not np.array_equal(draw_pose(keypoints, score, *SIZE, 0.1), alone)


def test_published_limbs_and_joints_have_their_width_and_truncated_colours():
    keypoints, score = standing()
    score[1], score[2], score[4] = 0.9, 0.8, 0.29
    image = draw_pose(keypoints, score, *CANVAS, style="published")
    half = (keypoints[1] + keypoints[2]) / 2
    assert canvas_pixel(image, half) == [int(int(255 * 0.9 * 0.8) * 0.6), 0, 0]
    assert canvas_pixel(image, keypoints[2]) == [int(255 * 0.8), int(170 * 0.8), 0]
    x, y = (half * CANVAS[::-1]).astype(int)
    assert (image[y - 10 : y + 11, x, 0] > 0).sum() == 2 * 4 + 1
    assert canvas_pixel(image, keypoints[4]) == [0, 0, 0]


def test_published_joints_lie_over_the_limbs_of_all_people():
    keypoints, score = standing()
    other = keypoints.copy()
    other[[1, 2]] = keypoints[7] + [[-0.1, 0], [0.1, 0]]  # a limb over the first one's wrist
    image = draw_pose(
        np.stack([keypoints, other]), np.stack([score] * 2), *CANVAS, style="published"
    )
    assert canvas_pixel(image, keypoints[7]) == COLOURS[7].tolist()


def test_published_hands_and_faces_are_drawn_however_unsure():
    keypoints, score = whole()
    hand, face = keypoints[RIGHT_HAND], keypoints[FACE]
    score[RIGHT_HAND], score[FACE] = 0.2, 0.1
    score[RIGHT_HAND.start + 8] = 1
    score[FACE.start] = 0
    image = draw_pose(keypoints, score, *CANVAS, style="published")
    assert canvas_pixel(image, hand[20]) == [0, 0, 51]
    assert canvas_pixel(image, hand[8]) == [0, 0, 255]
    # The eighth of 20 bones: hue 7/20, a green with a tenth of blue.
    assert canvas_pixel(image, (hand[7] + hand[8]) / 2) == [0, 51, int(25.5 * 0.2)]
    assert canvas_pixel(image, face[20]) == [25, 25, 25]
    assert canvas_pixel(image, face[0]) == [0, 0, 0]


def test_published_points_on_the_frame_s_edge_are_missing():
    keypoints, score = whole()
    keypoints[LEFT_HAND] = 0
    keypoints[LEFT_HAND.start + 1] = (-0.1, 0.5)
    image = draw_pose(keypoints, score, *CANVAS, style="published")
    assert image[:40, :40].max() == 0


@pytest.mark.parametrize("size", [(288, 384), (720, 960)])
def test_published_is_drawn_large_and_scaled_down_without_averaging(size):
    keypoints, score = whole()
    large = draw_pose(keypoints, score, *CANVAS, style="published")
    small = draw_pose(keypoints, score, *size, style="published")
    assert np.array_equal(small, cv2.resize(large, size[::-1]))


def test_other_layouts_are_refused():
    with pytest.raises(ValueError, match=r"Got 133 keypoints .* 18 .* 128"):
        draw_pose(np.zeros((133, 2)), np.zeros(133), *SIZE)
