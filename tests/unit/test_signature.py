"""Signatures: copies are known again, other clips are not, and plain frames say nothing."""

import cv2
import numpy as np
import pytest
from skimage.data import astronaut, chelsea, coffee

from pipelines.curation.signature import HASH_DIGITS, PLAIN, clip_signature, distance


def clip(image: np.ndarray, count: int = 40) -> list[np.ndarray]:
    """A slow move over an image."""
    image = cv2.resize(image, (480, 400))
    return [np.ascontiguousarray(image[i : i + 270, 2 * i : 2 * i + 360]) for i in range(count)]


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    return clip(astronaut())


def test_signature_is_eight_hashes_of_sixteen_digits(frames: list[np.ndarray]):
    signature = clip_signature(frames)
    assert len(signature) == 8 * HASH_DIGITS
    assert int(signature, 16) > 0
    assert len(clip_signature(frames[:1])) == 8 * HASH_DIGITS
    assert clip_signature([]) == ""


@pytest.mark.parametrize(
    "copy",
    [
        lambda frame: cv2.imdecode(cv2.imencode(".jpg", frame, [1, 25])[1], 1),
        lambda frame: cv2.resize(frame, (192, 144), interpolation=cv2.INTER_AREA),
        lambda frame: cv2.convertScaleAbs(frame, alpha=1.15, beta=12),
        lambda frame: frame[4:-4, 5:-5],
        lambda frame: cv2.copyMakeBorder(frame, 40, 40, 0, 0, cv2.BORDER_CONSTANT),
    ],
    ids=["packed", "smaller", "brighter", "cropped", "letterboxed"],
)
def test_copies_are_near(frames: list[np.ndarray], copy):
    copied = [np.ascontiguousarray(copy(frame)) for frame in frames]
    assert distance(clip_signature(frames), clip_signature(copied)) <= 6


def test_another_frame_rate_and_a_trimmed_edge_are_near(frames: list[np.ndarray]):
    signature = clip_signature(frames)
    assert distance(signature, clip_signature(frames[::2])) <= 6
    assert distance(signature, clip_signature(frames[1:])) <= 6


def test_other_clips_are_far(frames: list[np.ndarray]):
    for other in (chelsea(), coffee()):
        assert distance(clip_signature(frames), clip_signature(clip(other))) > 18
    mirrored = [np.ascontiguousarray(frame[:, ::-1]) for frame in frames]
    assert distance(clip_signature(frames), clip_signature(mirrored)) > 18


def test_plain_frames_make_nothing_equal(frames: list[np.ndarray]):
    generator = np.random.default_rng(0)
    noisy = [generator.integers(100, 104, (90, 120, 3), dtype=np.uint8) for _ in range(16)]
    black = [np.zeros((90, 120, 3), np.uint8)] * 16
    assert clip_signature(noisy) == clip_signature(black) == PLAIN * 8
    assert distance(clip_signature(noisy), clip_signature(black)) == 64
    one = [black[0]] * 20 + frames[:20]
    other = [black[0]] * 20 + clip(chelsea())[:20]
    assert distance(clip_signature(one), clip_signature(other)) > 18
    assert distance(clip_signature(one), clip_signature(one)) == 0


def test_distance_is_the_mean_over_frames_that_both_show():
    a = "0123456789abcdef" * 8
    assert distance(a, a) == 0
    one_bit = a[:-1] + "e"
    assert distance(a, one_bit) == pytest.approx(1 / 8)
    assert distance(PLAIN * 4 + a[64:], a) == 0
    assert distance(PLAIN * 5 + a[80:], a) == 64
    assert distance("", a) == 64
