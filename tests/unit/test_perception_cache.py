"""Perception that remembers gives the same answers, and asks again where a file is another."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from inference.perception import AnimationError, Perception
from inference.perception_cache import RememberingPerception
from pipelines.images import read_image
from pipelines.video import encode


@pytest.fixture
def folder(tmp_path: Path, no_models: Path) -> Path:
    rng = np.random.default_rng(0)
    for name, frames in {"ann": 1, "dance": 5}.items():
        points = rng.uniform(0.3, 0.7, (frames, 1, 18, 2)).astype(np.float32)
        score = np.ones((frames, 1, 18), np.float32)
        np.savez(tmp_path / f"{name}.pose.npz", keypoints=points, score=score, fps=8)
    Image.fromarray(rng.integers(0, 255, (64, 48, 3), np.uint8)).save(tmp_path / "ann.png")
    for name in ("dance", "empty"):
        encode(tmp_path / f"{name}.mp4", [np.zeros((32, 32, 3), np.uint8)] * 5, fps=8)
    return tmp_path


def seen(perception: Perception, folder: Path, clip: str = "dance.mp4") -> list[np.ndarray]:
    picture, driving = folder / "ann.png", folder / clip
    image = read_image(picture)
    face = perception.face(picture, image, 1)
    reference = perception.reference(picture, image, face)
    info = perception.probe(driving)
    frames = perception.frames(driving, info)
    pose = perception.driving(driving, info, frames)
    cuts = np.array(perception.cuts(driving, info))
    return [reference.keypoints, reference.score, pose.keypoints, pose.score, cuts]


def test_what_was_seen_is_not_looked_for_again_and_is_the_same(folder: Path) -> None:
    perception = RememberingPerception(face="cascade", keep=8)
    for found in (seen(perception, folder), seen(perception, folder)):
        for mine, plain in zip(found, seen(Perception("cascade"), folder), strict=True):
            assert np.array_equal(mine, plain)
    assert dict(perception.hits) == {"face": 1, "reference": 1, "driving": 1, "cuts": 1}


def test_another_content_under_the_same_name_is_looked_at_anew(folder: Path) -> None:
    perception = RememberingPerception(face="cascade", keep=8)
    *_, before, _, _ = seen(perception, folder)
    points = np.full((5, 1, 18, 2), 0.5, np.float32)
    score = np.ones((5, 1, 18), np.float32)
    np.savez(folder / "dance.pose.npz", keypoints=points, score=score, fps=8)
    *_, after, _, _ = seen(perception, folder)
    assert not np.array_equal(before, after)
    assert "driving" not in perception.hits


def test_a_refusal_is_remembered_with_its_words(folder: Path) -> None:
    perception = RememberingPerception(face="cascade", keep=8)
    said = []
    for _ in range(2):
        with pytest.raises(AnimationError, match=r"empty\.mp4: no person found") as caught:
            seen(perception, folder, "empty.mp4")
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert perception.hits["driving"] == 1


def test_the_memory_is_bounded_and_keeps_what_was_asked_for_last(folder: Path) -> None:
    perception = RememberingPerception(face="cascade", keep=3)
    seen(perception, folder)
    for number in range(3):
        picture = folder / f"{number}.png"
        Image.new("RGB", (32, 32)).save(picture)
        perception.face(picture, read_image(picture), 1)
    seen(perception, folder)
    assert not perception.hits
