"""The benchmark of face optimisation: its clip, a small run, and what it refuses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inference.faces.benchmark import HjbBench, bench_hjb
from inference.faces.benchmark_clip import read_clip
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
def test_rows_are_judged_by_what_they_made(models_env: Path, data_root: Path, tmp_path: Path):
    result = bench_hjb(
        HjbBench(
            video=data_root / "video" / "moore_talking_1.mp4",
            reference=data_root / "image" / "liveportrait_s0.jpg",
            work=tmp_path,
            frames=1,
            height=128,
            width=256,
            face=40,
            iterations=2,
            fit_steps=3,
            rows=("exact", "crop"),
        )
    )
    exact, crop = result["rows"]["exact"], result["rows"]["crop"]
    assert exact["ratio"] == exact["memory_ratio"] == exact["raise_ratio"] == 1
    assert exact["cells_changed"] == 1
    assert 0 < crop["cells_changed"] < 0.9
    assert crop["seconds"] > 0
    assert result["decoder"]["steps"] == 3


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
