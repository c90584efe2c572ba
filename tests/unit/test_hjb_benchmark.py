"""The benchmark of face optimisation: its clip, a small run, and what it refuses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inference.faces.benchmark import HjbBench, bench_hjb
from inference.faces.benchmark_clip import PATCH, FaceFrames, _patches, fitted_codec, read_clip
from inference.faces.places import FacePlaces
from pipelines.faces import InsightFaceBackend


@pytest.mark.real_data
def test_the_face_has_the_size_and_place_that_were_asked_for(models_env: Path, data_root: Path):
    detector = InsightFaceBackend(models_env / "face" / "mini")
    clip = read_clip(
        data_root / "video" / "moore_talking_1.mp4",
        data_root / "image" / "liveportrait_s0.jpg",
        detector,
        frames=2,
        size=(320, 480),
        face=120,
    )
    assert clip.frames.shape == (2, 320, 480, 3)
    for frame in range(2):
        (face, *_) = detector.detect(clip.frames[frame])
        height = float(face.box[3] - face.box[1]) * 320
        assert height == pytest.approx(120, rel=0.1)
        np.testing.assert_allclose(clip.places.landmarks[frame, 0], face.landmarks, atol=0.02)


@pytest.mark.real_data
def test_a_crop_raises_similarity_much_as_whole_frames_do_in_less_memory_and_background(
    models_env: Path, data_root: Path, tmp_path: Path
):
    """In a frame nearly all of which is crop: it has to gain less here than at full size."""
    result = bench_hjb(
        HjbBench(
            video=data_root / "video" / "moore_talking_1.mp4",
            reference=data_root / "image" / "liveportrait_s10.jpg",
            work=tmp_path,
            frames=2,
            height=192,
            width=384,
            face=56,
            iterations=4,
            fit_steps=40,
            rows=("exact", "crop"),
        )
    )
    exact, crop = result["rows"]["exact"], result["rows"]["crop"]
    assert exact["ratio"] == exact["memory_ratio"] == exact["raise_ratio"] == 1
    assert exact["cells_changed"] == 1
    assert exact["raised"] > 0.1
    assert 0 < crop["cells_changed"] < 0.6
    assert crop["raise_ratio"] > 0.7
    assert crop["background_change"] < 0.6 * exact["background_change"]
    assert crop["memory_ratio"] < 0.6
    assert crop["seconds"] > 0
    assert result["decoder"]["steps"] == 40


def grey_clip(*middles: tuple[float, float], side: int = 3 * PATCH) -> FaceFrames:
    """One grey frame with a person at each of these places (x, y); white there."""
    frame = np.full((1, side, side, 3), 90, np.uint8)
    boxes = np.array([[[x - 0.05, y - 0.05, x + 0.05, y + 0.05] for x, y in middles]], np.float32)
    for x0, y0, x1, y1 in (boxes[0] * side).astype(int):
        frame[0, y0:y1, x0:x1] = 255
    places = FacePlaces(
        visible=np.ones((1, len(middles)), bool),
        landmarks=np.zeros((1, len(middles), 5, 2), np.float32),
        boxes=boxes,
        size=(side, side),
    )
    return FaceFrames(frame, places)


def test_a_decoder_is_fitted_around_every_visible_face_wherever_it_is():
    clip = grey_clip((0.15, 0.2), (0.85, 0.8))
    rng = np.random.default_rng(0)
    white: list[bool] = []
    for _ in range(100):
        patch = _patches(clip, rng)
        assert patch.shape == (1, 3, PATCH, PATCH)
        white.append(bool((patch == 1).any()))
    assert np.mean(white) > 0.7

    clip.places.visible[:] = [[False, True]]
    clip.frames[0, : clip.frames.shape[1] // 2] = 0  # where the face is that is not visible
    assert np.mean([(_patches(clip, rng) > -1).float().mean() > 0.5 for _ in range(50)]) > 0.9


def test_a_fit_is_kept_for_the_faces_it_was_made_for(tmp_path: Path):
    def fits(clip: FaceFrames) -> int:
        fitted_codec(clip, tmp_path, steps=1, tell=lambda share: None)
        return len(list(tmp_path.iterdir()))

    one = grey_clip((0.3, 0.3))
    assert fits(one) == 1
    assert fits(one) == 1
    elsewhere = FaceFrames(one.frames, grey_clip((0.7, 0.7)).places)
    assert fits(elsewhere) == 2


def test_a_clip_that_no_decoder_can_be_fitted_to_is_refused(tmp_path: Path):
    small = grey_clip((0.5, 0.5), side=PATCH - 8)
    with pytest.raises(ValueError, match=f"at least {PATCH} x {PATCH}"):
        fitted_codec(small, tmp_path, steps=1, tell=lambda share: None)
    faceless = grey_clip((0.5, 0.5))
    faceless.places.visible[:] = False
    with pytest.raises(ValueError, match="without a visible face"):
        fitted_codec(faceless, tmp_path, steps=1, tell=lambda share: None)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"height": 100}, "multiples of 8"),
        ({"rows": ("crop",)}, "expected exact"),
        ({"rows": ("exact", "fastest")}, "key_frames"),
        ({"iterations": 0}, "iterations"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes: dict[str, Any], complaint: str):
    with pytest.raises(ValueError, match=complaint):
        HjbBench(video=Path("a.mp4"), reference=Path("b.jpg"), **changes)
