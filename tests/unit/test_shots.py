"""Shot boundaries: cuts, fades and dissolves are found, motion and flashes are not."""

import cv2
import numpy as np
import pytest

from pipelines.curation.config import ShotConfig
from pipelines.curation.shots import ShotScan, scan_frames

FPS = 25.0
HEIGHT, WIDTH = 90, 160


def picture(seed: int) -> np.ndarray:
    """A textured colour picture twice the frame's size, unlike that of any other seed."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (12, 20, 3), dtype=np.uint8)
    fine = generator.integers(0, 80, (60, 100, 3), dtype=np.uint8)
    size = (2 * WIDTH, 2 * HEIGHT)
    smooth = cv2.resize(coarse, size, interpolation=cv2.INTER_CUBIC).astype(np.int16)
    return np.clip(smooth + cv2.resize(fine, size) - 40, 0, 255).astype(np.uint8)


def shot(seed: int, length: int, speed: float = 0.5) -> list[np.ndarray]:
    """A camera that pans over a picture by `speed` pixels a frame."""
    scene, frames = picture(seed), []
    for index in range(length):
        matrix = np.array([[1, 0, -speed * index], [0, 1, -0.3 * speed * index]], np.float32)
        frames.append(cv2.warpAffine(scene, matrix, (WIDTH, HEIGHT)))
    return frames


def still(seed: int, length: int) -> list[np.ndarray]:
    return shot(seed, length, speed=0.0)


def mixed(one: list[np.ndarray], other: list[np.ndarray]) -> list[np.ndarray]:
    """The first run of frames becoming the second."""
    weights = np.linspace(0, 1, len(one))
    return [
        (a * (1 - w) + b * w).astype(np.uint8) for a, b, w in zip(one, other, weights, strict=True)
    ]


def black(length: int) -> list[np.ndarray]:
    return [np.zeros((HEIGHT, WIDTH, 3), np.uint8)] * length


def scan(frames: list[np.ndarray]) -> ShotScan:
    return scan_frames(frames, FPS, ShotConfig())


def test_one_shot_is_one_shot():
    result = scan(shot(1, 60))
    assert result.cuts == ()
    assert result.shots == ((0.0, 60 / FPS),)


def test_hard_cuts_are_found_at_their_frame():
    result = scan(shot(1, 40) + shot(2, 30) + shot(3, 30))
    assert [(cut.kind, cut.start) for cut in result.cuts] == [("cut", 40 / FPS), ("cut", 70 / FPS)]
    assert result.shots == ((0.0, 1.6), (1.6, 2.8), (2.8, 4.0))


def test_cut_near_the_end_is_found():
    assert len(scan(shot(1, 40) + shot(2, 4)).cuts) == 1


def test_fade_through_black_ends_one_shot_and_begins_another():
    frames = still(1, 30) + mixed(still(1, 10), black(10)) + black(8)
    frames += mixed(black(10), still(2, 10)) + still(2, 30)
    result = scan(frames)
    assert [cut.kind for cut in result.cuts] == ["fade"]
    assert len(result.shots) == 2


def test_black_at_the_ends_is_no_shot_change():
    result = scan(black(12) + shot(1, 40) + black(12))
    assert result.cuts == ()
    assert result.shots == ((12 / FPS, 52 / FPS),)


@pytest.mark.parametrize("length", [12, 20, 28])
def test_dissolve_is_found(length):
    result = scan(still(1, 30) + mixed(still(1, length), still(2, length)) + still(2, 30))
    assert [cut.kind for cut in result.cuts] == ["dissolve"]
    assert 1.0 <= result.cuts[0].start <= result.cuts[0].end <= (60 + length) / FPS


@pytest.mark.parametrize("length", [1, 2, 3])
def test_flash_is_no_cut(length):
    frames = shot(1, 60)
    for index in range(30, 30 + length):
        frames[index] = np.full_like(frames[index], 250)
    assert scan(frames).cuts == ()


def test_bright_flash_over_the_picture_is_no_cut():
    frames = shot(1, 60)
    frames[30] = np.clip(frames[30].astype(np.int16) + 110, 0, 255).astype(np.uint8)
    assert scan(frames).cuts == ()


@pytest.mark.parametrize("speed", [3.0, 6.0])
def test_a_fast_pan_is_no_cut(speed):
    frames = shot(1, 30, 0.2)[:20] + shot(1, 16, speed)
    assert scan(frames).cuts == ()


def test_large_object_that_jumps_in_is_no_cut():
    frames = still(1, 60)
    for index in range(30, 60):
        frames[index] = frames[index].copy()
        frames[index][40:90, 60:120] = (230, 40, 40)
    assert scan(frames).cuts == ()


def test_empty_video_has_one_span():
    result = scan(black(25))
    assert result.cuts == ()
    assert result.shots == ((0.0, 1.0),)
