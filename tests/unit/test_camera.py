"""Camera motion over a textured background: moving, static, behind people, through nothing."""

import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from skimage.data import astronaut

from pipelines import camera
from pipelines.camera import CameraError, camera_motion, measure_camera, open_camera_backend
from pipelines.curation.config import CameraConfig
from pipelines.schema import encode_json
from pipelines.video import decode

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


def _view(x: float = 400, y: float = 300, zoom: float = 1.0, turn: float = 0.0) -> np.ndarray:
    """A view of 320 x 240 whose centre shows (x, y) of the scene."""
    matrix = cv2.getRotationMatrix2D((x, y), turn, zoom)
    matrix[:, 2] += (159.5 - x, 119.5 - y)
    return cv2.warpAffine(SCENE, matrix, (320, 240))


def test_zoom_roll_and_pan_are_told_apart():
    zoom = camera_motion([_view(zoom=1.02**i) for i in range(16)], FPS)
    assert zoom.kind == "zoom"
    assert zoom.zoom_percent_per_second == pytest.approx(100 * FPS * np.log(1.02), rel=0.05)
    assert zoom.pan_percent_per_second < 0.5
    assert zoom.roll_degrees_per_second < 0.3

    roll = camera_motion([_view(turn=1.5 * i) for i in range(16)], FPS)
    assert roll.kind == "roll"
    assert roll.roll_degrees_per_second == pytest.approx(1.5 * FPS, rel=0.05)
    assert roll.pan_percent_per_second < 0.5

    pan = camera_motion([_view(300 + 4 * i) for i in range(16)], FPS)
    assert pan.kind == "pan"
    assert pan.pan_percent_per_second == pytest.approx(4 * FPS / 320 * 100, rel=0.05)
    assert pan.shake_percent < 0.1
    assert pan.zoom_percent_per_second < 0.5


def test_shake_is_jitter_about_the_path_and_not_the_path():
    jitter = np.random.default_rng(0).normal(0, 4, (120, 2))
    shaken = camera_motion([_view(400 + x, 300 + y) for x, y in jitter], FPS)
    assert shaken.kind == "shake"
    rms = np.sqrt((jitter**2).sum(1).mean()) / 320 * 100
    assert shaken.shake_percent == pytest.approx(rms, rel=0.3)
    panned = camera_motion(
        [_view(250 + 2 * i + x / 4, 300 + y / 4) for i, (x, y) in enumerate(jitter)], FPS
    )
    assert panned.kind == "pan"
    assert panned.shake_percent == pytest.approx(rms / 4, rel=0.3)


def test_a_fixed_camera_is_static_and_nothing_to_see_is_unknown():
    assert camera_motion([_noisy(_view(), i) for i in range(16)], FPS).kind == "static"
    assert camera_motion([np.full((90, 120, 3), 9, np.uint8)] * 16, FPS).kind == "unknown"
    assert camera_motion([_view()], FPS).kind == "unknown"
    assert camera_motion([], FPS).kind == "unknown"


def test_pan_in_a_part_of_the_clip_is_seen_beside_the_median():
    still, pan = [_view()] * 30, [_view(400 + 5 * i) for i in range(15)]
    motion = camera_motion([*still, *pan], FPS)
    assert motion.percent_per_second < 0.1
    assert motion.peak_percent_per_second > 6
    assert motion.kind == "pan"
    # A single jump is no motion of the camera.
    jump = camera_motion([*still, *[_view(420)] * 30], FPS)
    assert jump.peak_percent_per_second < 3


def test_fast_pan_beside_a_person_who_fills_the_frame_is_seen():
    # In half a second, what the person leaves open has moved out of the picture.
    frames = [_view(12 * i) for i in range(24)]
    person = np.tile(np.array([0.2, 0.0, 0.8, 1.0], np.float32), (24, 1, 1))
    motion = camera_motion(frames, FPS, person)
    assert motion.tracked_share > 0.5
    assert motion.percent_per_second > 10


def test_pairs_that_cannot_be_followed_count_as_still_for_the_peak():
    noise = np.random.default_rng(1).integers(0, 255, (10, 240, 320, 3), np.uint8)
    frames = [*noise, *[_view(400 + 5 * i) for i in range(3)]]
    motion = camera_motion(frames, FPS)
    assert motion.percent_per_second > 6
    assert motion.tracked_share < 0.2
    assert motion.peak_percent_per_second < 1


def test_kind_follows_the_default_thresholds_of_curation():
    config = CameraConfig()
    assert camera.STILL_PERCENT == config.max_percent_per_second
    assert camera.STILL_PEAK_PERCENT == config.max_peak_percent_per_second
    assert camera.MIN_TRACKED_SHARE == config.min_tracked_share


def test_background_variance_is_of_what_changes_and_not_of_what_moves():
    def frames(views):
        return [_noisy(view, i) for i, view in enumerate(views)]

    still = camera_motion(frames([_view()] * 12), FPS).background_variance
    pan = camera_motion(frames(_view(360 + 4 * i) for i in range(12)), FPS).background_variance
    screen = np.random.default_rng(0).integers(0, 255, (12, 60, 80, 3), np.uint8)
    living = [_view() for _ in range(12)]
    for view, picture in zip(living, screen, strict=True):
        view[20:80, 20:100] = cv2.GaussianBlur(picture, (0, 0), 3) * 2
    changing = camera_motion(frames(living), FPS).background_variance
    assert still < 3
    assert pan < 15
    assert changing > 30
    people = np.tile(np.array([20 / 320, 20 / 240, 100 / 320, 80 / 240]), (12, 1, 1))
    assert camera_motion(frames(living), FPS, people).background_variance < 3


def test_background_is_looked_for_beside_the_head_of_who_fills_the_frame():
    frames = []
    for i in range(16):
        frame = _view(300 + 2 * i)
        sway = round(6 * np.sin(i))
        frame[10:, 75 + sway : 245 + sway] = SCENE[500:730, 300:470]
        frame[110:] = SCENE[400:530, 300 + sway : 620 + sway]
        frames.append(frame)
    everywhere = np.tile(np.array([0, 0, 1, 1], np.float32), (16, 1, 1))
    motion = camera_motion(frames, FPS, everywhere)
    assert motion.tracked_share > 0.9
    assert motion.percent_per_second == pytest.approx(2 * FPS / 320 * 100, rel=0.1)


def test_person_whom_the_detector_misses_in_a_frame_stays_masked():
    frames, boxes = zip(*(_with_person(i, _window(200, 100)) for i in range(16)), strict=True)
    people = np.stack(boxes)[:, None].copy()
    people[::3] = 0
    assert camera_motion(frames, FPS, people).peak_percent_per_second < 0.3


def test_scores_can_be_recorded_whatever_the_shot():
    backend = open_camera_backend("flow")
    moving = measure_camera([_view(300 + 4 * i) for i in range(9)], FPS, None, backend)
    empty = measure_camera([_view()], FPS, np.zeros((1, 0, 4)), backend)
    assert set(moving) == set(empty)
    assert moving["camera_kind"] == "pan"
    assert moving["camera_backend"] == "flow"
    assert encode_json(moving)
    assert encode_json(empty)
    again = measure_camera([_view(300 + 4 * i) for i in range(9)], FPS, None, backend)
    assert again == moving


def test_long_shots_are_sampled_and_cheap():
    pan = [_view(200 + 0.5 * i) for i in range(400)]
    start = time.process_time()
    motion = camera_motion(pan, FPS)
    # 40 pairs of frames; a generous bound for a busy machine.
    assert time.process_time() - start < 1.6
    assert motion.percent_per_second == pytest.approx(0.5 * FPS / 320 * 100, rel=0.1)
    assert motion.shake_percent < 0.1


def test_flow_needs_no_model_and_no_torch(no_models: Path):
    backend = open_camera_backend("auto")
    assert (backend.name, backend.needs_models, backend.licence) == ("flow", False, "Apache-2.0")
    assert "not present" in backend.reason
    code = (
        "import sys, numpy as np\n"
        "from pipelines.camera import measure_camera, open_camera_backend\n"
        "frames = list(np.random.default_rng(0).integers(0, 255, (8, 90, 120, 3), np.uint8))\n"
        "measure_camera(frames, 5.0, None, open_camera_backend('auto'))\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_unknown_or_missing_backend_says_how_to_mend_it(no_models: Path):
    with pytest.raises(CameraError, match="auto, flow or cotracker"):
        open_camera_backend("optical")
    with pytest.raises(CameraError, match=r"scaled_online\.pth as cotracker/.* ANIMATOR_MODELS"):
        open_camera_backend("cotracker")


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "moves"),
    [("sam2_05_default_juggle.mp4", False), ("dj_video3.mp4", False), ("cotracker_cat.mp4", True)],
)
def test_real_clips_measure_far_from_the_threshold(data_root: Path, name: str, moves: bool):
    frames = decode(data_root / "video" / name, fps=5, max_side=480, end=4.0)
    motion = camera_motion(list(frames), 5.0)
    assert (motion.percent_per_second > 4) if moves else (motion.percent_per_second < 0.5)
    assert (motion.kind == "static") != moves
