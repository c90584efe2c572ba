"""Camera motion over a textured background: moving, static, behind people, through nothing."""

import cv2
import numpy as np
import pytest
from skimage.data import astronaut

from pipelines.camera import camera_motion

SCENE = cv2.resize(astronaut(), (800, 800))
FPS = 8.0


def _window(x: float, y: float, zoom: float = 1.0) -> np.ndarray:
    """A view of 320 x 240 into the scene with its corner at (x, y)."""
    matrix = np.array([[zoom, 0, -x * zoom], [0, zoom, -y * zoom]], np.float32)
    return cv2.warpAffine(SCENE, matrix, (320, 240))


def _noisy(frame: np.ndarray, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 2, frame.shape)
    return np.clip(frame + noise, 0, 255).astype(np.uint8)


def test_static_camera_has_no_motion():
    motion = camera_motion([_noisy(_window(200, 100), i) for i in range(16)], FPS)
    assert motion.percent_per_second < 0.3
    assert motion.tracked_share == 1
    assert motion.num_tracks > 50


def test_pan_is_measured_in_percent_of_the_long_side_a_second():
    frames = [_noisy(_window(150 + 4 * i, 100), i) for i in range(16)]
    motion = camera_motion(frames, FPS)
    assert motion.percent_per_second == pytest.approx(4 * FPS / 320 * 100, rel=0.1)
    assert motion.residual_percent < 0.2


def test_slow_drift_is_seen():
    frames = [_noisy(_window(200 + 0.5 * i, 100), i) for i in range(16)]
    assert camera_motion(frames, FPS).percent_per_second == pytest.approx(1.25, rel=0.2)


def test_zoom_is_motion():
    frames = [_noisy(_window(200, 100, 1 + 0.01 * i), i) for i in range(16)]
    assert camera_motion(frames, FPS).percent_per_second > 2


def _with_person(index: int, background: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A person who covers most of the frame and sways in front of the background."""
    frame = background.copy()
    left = 60 + round(25 * np.sin(index))
    frame[10:, left : left + 180] = SCENE[500:730, 300:480]
    return frame, np.array([left / 320, 10 / 240, (left + 180) / 320, 1], np.float32)


def test_person_who_moves_is_not_the_camera():
    frames, boxes = zip(*(_with_person(i, _window(200, 100)) for i in range(16)), strict=True)
    motion = camera_motion(frames, FPS, np.stack(boxes)[:, None])
    assert motion.percent_per_second < 0.3


def test_camera_that_follows_a_person_moves():
    frames = []
    for i in range(16):
        frame = _window(150 + 4 * i, 100)
        frame[10:, 60:240] = SCENE[500:730, 300:480]
        frames.append(frame)
    boxes = np.tile(np.array([60 / 320, 10 / 240, 240 / 320, 1], np.float32), (16, 1, 1))
    assert camera_motion(frames, FPS, boxes).percent_per_second > 7


def test_cut_between_static_views_is_not_motion():
    frames = [_window(100, 50)] * 10 + [_window(450, 500)] * 10
    motion = camera_motion(frames, FPS)
    assert motion.percent_per_second < 0.3


def test_nothing_to_track_is_said():
    motion = camera_motion([np.full((90, 120, 3), 8 * i, np.uint8) for i in range(12)], FPS)
    assert motion.percent_per_second == 0
    assert motion.tracked_share == 0
    assert motion.num_tracks == 0


def test_one_frame_is_no_motion_and_wrong_boxes_are_an_error():
    assert camera_motion([_window(0, 0)], FPS).percent_per_second == 0
    with pytest.raises(ValueError, match="frames of boxes"):
        camera_motion([_window(0, 0)] * 3, FPS, np.zeros((2, 1, 4)))
