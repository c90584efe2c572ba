"""The demonstration's figure, motion and recordings."""

from pathlib import Path

import numpy as np
import pytest
import skimage.data
from skimage.feature import Cascade

from infra.demo.clips import TAKES, Misalignment, film, misalign
from infra.demo.figure import draw_figure
from infra.demo.motion import MOTIONS, Body, perform
from infra.demo.report import strip
from infra.demo.stage import paint_stage
from infra.demo.stages import Stages
from training.curve import running_mean

SIZE = (256, 192)


def pose(motion: str = "wave", index: int = 5) -> np.ndarray:
    return perform(motion, 12, fps=12, aspect=SIZE[1] / SIZE[0])[index]


def faces(image: np.ndarray) -> list[dict[str, int]]:
    cascade = Cascade(skimage.data.lbp_frontal_face_cascade_filename())
    return cascade.detect_multi_scale(
        img=image, scale_factor=1.1, step_ratio=1, min_size=(24, 24), max_size=(80, 80)
    )


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_motion_is_smooth_stays_in_the_picture_and_keeps_the_body(motion: str) -> None:
    points = perform(motion, 48, fps=12, aspect=0.75, seed=3)
    assert points.shape == (48, 18, 2)
    assert points.dtype == np.float32
    assert ((points > 0) & (points < 1)).all()
    assert np.abs(np.diff(points, axis=0)).max() < 0.12
    assert np.ptp(points, axis=0).max() > 0.05, "nothing moves"
    arm = (points[:, 2] - points[:, 3]) * (0.75, 1)
    assert np.allclose(np.linalg.norm(arm, axis=-1), Body().upper_arm * 0.78, atol=1e-4)


def test_the_figure_faces_the_viewer_with_its_right_on_the_left() -> None:
    points = perform("sway", 1, fps=12, aspect=0.75)[0]
    assert points[2, 0] < points[5, 0]
    assert points[8, 0] < points[11, 0]
    assert points[0, 1] < points[1, 1] < points[8, 1] < points[9, 1] < points[10, 1]


def test_the_seed_chooses_the_motion_and_repeats_it() -> None:
    first, again, other = (perform("dance", 24, fps=12, aspect=0.75, seed=s) for s in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.allclose(first, other, atol=0.01)


def test_an_unknown_motion_names_those_there_are() -> None:
    with pytest.raises(ValueError, match="wave"):
        perform("fly", 2, fps=12, aspect=1)


def test_the_face_is_found_where_the_keypoints_say_and_not_under_a_helmet() -> None:
    stage = paint_stage(*SIZE)
    front = draw_figure(pose(), stage).image
    (found,) = faces(front)
    nose = pose()[0] * SIZE[::-1]
    assert found["c"] < nose[0] < found["c"] + found["width"]
    assert found["r"] < nose[1] < found["r"] + found["height"]
    assert not faces(draw_figure(pose(), stage, helmet=True).image)


def test_the_figure_covers_its_joints_and_its_box() -> None:
    stage = np.full((*SIZE, 3), 255, np.uint8)
    drawn = draw_figure(pose(), stage)
    changed = np.abs(drawn.image.astype(int) - 255).max(axis=-1) > 60
    for x, y in (pose() * SIZE[::-1]).round().astype(int):
        assert changed[y - 2 : y + 3, x - 2 : x + 3].any()
    left, top, right, bottom = drawn.box * (SIZE[1], SIZE[0], SIZE[1], SIZE[0])
    assert 0 <= left < right <= SIZE[1]
    assert bottom - top == pytest.approx(0.8 * SIZE[0], rel=0.1)


def test_a_pose_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="18"):
        draw_figure(np.zeros((17, 2)), paint_stage(32, 24))


def test_each_bad_take_is_bad_in_the_way_it_says() -> None:
    takes = {take.name: take for take in TAKES}
    _, points, _ = film(takes["closeup"], size=SIZE, fps=12, num_frames=6)
    missing = ~((points >= 0) & (points <= 1)).all(axis=-1)
    assert missing.mean() > 0.7
    frames, _, _ = film(takes["pan"], size=SIZE, fps=12, num_frames=6)
    assert not np.array_equal(frames[0][:20], frames[-1][:20])
    assert sum(take.rejected_for is None for take in TAKES) >= 4


def test_misalignment_is_a_similarity_in_pixels() -> None:
    points = pose()
    how = Misalignment(degrees=20, scale=0.5, shift=(0.1, 0.0))
    moved = misalign(points, SIZE, how)
    pixels, moved_pixels = points * SIZE[::-1], moved * SIZE[::-1]
    before = np.linalg.norm(pixels[:, None] - pixels[None], axis=-1)
    after = np.linalg.norm(moved_pixels[:, None] - moved_pixels[None], axis=-1)
    assert np.allclose(after, 0.5 * before, atol=1e-3)


def test_a_finished_stage_is_not_run_again(tmp_path: Path) -> None:
    runs = []

    def work() -> dict[str, int]:
        runs.append(1)
        return {"value": 7}

    for _ in range(2):
        stages = Stages(tmp_path, settings={"quick": True}, total=1)
        assert stages.run("one", "One", work) == {"value": 7}
    assert len(runs) == 1
    with pytest.raises(ValueError, match="choose another --out"):
        Stages(tmp_path, settings={"quick": False}, total=1)


def test_report_pieces() -> None:
    frames = np.arange(4)[:, None, None, None] * np.ones((1, 6, 5, 3))
    assert strip(frames.astype(np.uint8), columns=4, gap=2).shape == (6, 4 * 5 + 3 * 2, 3)
    assert np.allclose(running_mean(np.ones(50)), 1.0)
