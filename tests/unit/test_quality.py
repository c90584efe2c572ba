"""The picture: sharpness, light, bars of both kinds, and text that is laid over it."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from skimage.data import astronaut, chelsea

from pipelines.curation.quality import picture_scores
from pipelines.schema import Scores
from pipelines.video import decode


def panned(image: np.ndarray, width: int, height: int, count: int = 10) -> list[np.ndarray]:
    """Views of an image that move sideways, as from a camera."""
    views = [image[20 : 20 + height, 4 * i : 4 * i + width] for i in range(count)]
    return [np.ascontiguousarray(view) for view in views]


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    return panned(cv2.resize(astronaut(), (720, 720)), 640, 360)


def score(frames: list[np.ndarray], name: str) -> float:
    return number(picture_scores(frames)[0], name)


def number(scores: Scores, name: str) -> float:
    value = scores[name]
    assert isinstance(value, int | float)
    return value


def packed(frame: np.ndarray, quality: int) -> np.ndarray:
    image = cv2.imdecode(cv2.imencode(".jpg", frame, [1, quality])[1], 1)
    assert image is not None
    return image


def test_blur_lowers_sharpness_whatever_the_size(frames: list[np.ndarray]):
    sharp = score(frames, "sharpness")
    half = [
        cv2.resize(frame, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA) for frame in frames
    ]
    assert score(half, "sharpness") == pytest.approx(sharp, rel=0.35)
    blurred = [cv2.GaussianBlur(frame, (0, 0), 6) for frame in frames]
    assert score(blurred, "sharpness") < 0.05 * sharp


def test_light_is_measured(frames: list[np.ndarray]):
    assert score([frame // 20 for frame in frames], "luma") < 10
    burnt = [cv2.convertScaleAbs(frame, alpha=6, beta=60) for frame in frames]
    assert score(burnt, "clipped_share") > 0.4 > score(frames, "clipped_share")


def bordered(frames: list[np.ndarray], top: int, side: int) -> list[np.ndarray]:
    kind = cv2.BORDER_CONSTANT
    return [cv2.copyMakeBorder(frame, top, top, side, side, kind) for frame in frames]


@pytest.mark.parametrize(("top", "side"), [(60, 0), (0, 200), (40, 40)])
def test_black_bars_are_found_and_left_out_of_the_rest(
    frames: list[np.ndarray], top: int, side: int
):
    framed = bordered(frames, top, side)
    expected = 1 - 640 * 360 / (framed[0].shape[0] * framed[0].shape[1])
    scores, _ = picture_scores(framed)
    assert scores["black_bars"] == pytest.approx(expected, abs=0.02)
    assert scores["luma"] == pytest.approx(score(frames, "luma"), rel=0.03)


def test_noise_of_compression_leaves_bars_black(frames: list[np.ndarray]):
    noisy = [packed(frame, 40) for frame in bordered(frames, 60, 0)]
    assert score(noisy, "black_bars") > 0.2


def test_dark_pictures_and_plain_walls_are_no_bars(frames: list[np.ndarray]):
    assert score(frames, "black_bars") == 0
    assert score([frame // 30 for frame in frames], "black_bars") == 0
    studio = [np.full((360, 640, 3), 255, np.uint8) for _ in frames]
    for view, frame in zip(studio, frames, strict=True):
        view[:, 240:400] = frame[:, 240:400]
    assert score(studio, "black_bars") == 0


def test_blurred_copy_behind_the_picture_is_a_bar(frames: list[np.ndarray]):
    upright = [np.ascontiguousarray(frame[:, 200:400]) for frame in frames]
    shown = []
    for frame in upright:
        behind = cv2.resize(frame, (640, 1152))[396:756]
        behind = cv2.GaussianBlur(behind, (0, 0), 15)
        behind[:, 220:420] = frame
        shown.append(behind)
    assert score(shown, "black_bars") == pytest.approx(1 - 200 / 640, abs=0.03)
    turned = [np.ascontiguousarray(frame.transpose(1, 0, 2)) for frame in shown]
    assert score(turned, "black_bars") == pytest.approx(1 - 200 / 640, abs=0.03)


def test_background_out_of_focus_is_no_bar():
    sharp = panned(cv2.resize(chelsea(), (800, 500)), 640, 360)
    shown = []
    for frame, other in zip(sharp, panned(astronaut(), 640 - 200, 360), strict=True):
        behind = cv2.GaussianBlur(cv2.resize(other, (640, 360)), (0, 0), 12)
        behind[:, 220:420] = frame[:, 220:420]
        shown.append(behind)
    assert score(shown, "black_bars") == 0


def written(frame: np.ndarray, text: str, place: tuple[int, int]) -> np.ndarray:
    frame = frame.copy()
    cv2.putText(frame, text, place, cv2.FONT_HERSHEY_DUPLEX, 1, (0, 0, 0), 6, cv2.LINE_AA)
    return cv2.putText(
        frame, text, place, cv2.FONT_HERSHEY_DUPLEX, 1, (255, 255, 255), 2, cv2.LINE_AA
    )


def test_subtitles_over_a_moving_picture_are_found(frames: list[np.ndarray]):
    subtitled = [written(frame, "What is burnt in stays put", (90, 330)) for frame in frames]
    assert 0.02 < score(subtitled, "text_share") < 0.1
    assert score(frames, "text_share") < 0.005


def test_text_that_moves_with_the_scene_is_not_burnt_in(frames: list[np.ndarray]):
    signs = [
        written(frame, "On a sign in the scene", (140 - 12 * index, 200))
        for index, frame in enumerate(frames)
    ]
    assert score(signs, "text_share") < 0.005


def test_no_frames_have_no_scores_and_one_has_some(frames: list[np.ndarray]):
    assert picture_scores([]) == ({}, {})
    assert score(frames[:1], "sharpness") > 10
    tiny = [np.zeros((16, 2, 3), np.uint8)] * 3
    assert score(tiny, "luma") == 0


@pytest.mark.real_data
def test_subtitles_of_real_clips_are_told_from_patterned_clothes(data_root: Path):
    def share(name: str) -> float:
        video = data_root / "video" / name
        return score(list(decode(video, end=8, fps=4, max_side=640)), "text_share")

    assert min(share("dj_video3.mp4"), share("musepose_dance.mp4")) > 0.015
    assert max(share("animatex_ubc.mp4"), share("torchcodec_dog_eating.mp4")) < 0.005
