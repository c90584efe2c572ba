"""Faces: the cascade that needs no file, and a real InsightFace pack."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from skimage.data import astronaut

from pipelines.faces import CascadeBackend, FaceError, InsightFaceBackend, open_face_backend
from pipelines.images import read_image
from pipelines.pose import box_overlap
from pipelines.video import decode

ASTRONAUT_FACE = np.array([0.34, 0.12, 0.54, 0.40])


def test_auto_without_models_is_the_cascade_and_says_so(no_models: Path):
    backend = open_face_backend("auto")
    assert backend.name == "cascade"
    assert backend.embedding_dim == 0
    assert "no InsightFace pack" in backend.reason


def test_cascade_finds_the_portrait_and_no_face_in_noise():
    backend = CascadeBackend()
    faces = backend.detect(astronaut())
    assert faces
    assert box_overlap(faces[0].box, ASTRONAUT_FACE) > 0.3
    assert np.isnan(faces[0].landmarks).all()
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
    assert not backend.detect(noise)
    with pytest.raises(FaceError, match="no embeddings"):
        backend.embed(astronaut(), faces[0])


def test_cascade_gives_one_box_a_face():
    close = astronaut()[:300, 80:380]
    centres = [(face.box[:2] + face.box[2:]) / 2 for face in CascadeBackend().detect(close)]
    assert sum(bool(np.abs(centre - [0.49, 0.42]).max() < 0.2) for centre in centres) == 1


def test_tiny_frames_have_no_faces_and_no_errors():
    assert CascadeBackend().detect(np.zeros((10, 300, 3), np.uint8)) == []


@pytest.mark.parametrize("choice", ["insightface", "insightface:buffalo_l"])
def test_missing_pack_is_an_error_that_says_where_to_put_it(no_models: Path, choice: str):
    with pytest.raises(FaceError, match="ANIMATOR_MODELS"):
        open_face_backend(choice)


def test_unknown_backend_is_refused(no_models: Path):
    with pytest.raises(FaceError, match="expected auto"):
        open_face_backend("mediapipe")


def test_damaged_pack_is_refused(tmp_path: Path):
    (tmp_path / "a.onnx").write_bytes(b"not a network")
    with pytest.raises(FaceError, match="cannot be loaded"):
        InsightFaceBackend(tmp_path)


@pytest.mark.real_data
def test_pack_finds_the_same_person_again_under_any_file_names(models_env: Path, tmp_path: Path):
    for number, file in enumerate(sorted((models_env / "face" / "mini").glob("*.onnx"))):
        shutil.copy(file, tmp_path / f"network{number}.onnx")
    backend = InsightFaceBackend(tmp_path)
    portrait = astronaut()
    other = read_image(models_env.parent / "image" / "liveportrait_s4.jpg")
    (face,) = backend.detect(portrait)
    assert box_overlap(face.box, ASTRONAUT_FACE) > 0.5
    assert ((face.landmarks > 0) & (face.landmarks < 1)).all()

    def embedding(frame: np.ndarray) -> np.ndarray:
        vector = backend.embed(frame, backend.detect(frame)[0])
        assert vector.shape == (backend.embedding_dim,)
        return vector / np.linalg.norm(vector)

    same = embedding(portrait) @ embedding(portrait[40:330, 100:400, :])
    different = embedding(portrait) @ embedding(other)
    assert same > 0.54
    assert different < 0.38


@pytest.mark.real_data
def test_pack_finds_a_face_that_fills_the_frame(models_env: Path):
    backend = open_face_backend("auto")
    assert backend.name == "insightface:mini"
    assert "mini" in backend.reason
    close = astronaut()[60:220, 165:285]
    (face,) = backend.detect(close)
    assert face.area > 0.3


@pytest.mark.real_data
def test_pack_sees_everyone_in_a_group_and_nobody_in_a_bird(models_env: Path):
    backend = open_face_backend("insightface:mini")
    images = models_env.parent / "image"
    group = backend.detect(read_image(images / "insightface_t1.jpg"))
    assert len(group) == 6
    areas = [face.area for face in group]
    assert areas == sorted(areas, reverse=True)
    assert backend.detect(read_image(images / "katna_bird.jpg")) == []


@pytest.mark.real_data
def test_pack_looks_closer_where_it_is_not_sure(models_env: Path):
    backend = open_face_backend("insightface:mini")
    video = models_env.parent / "video" / "liveportrait_d14.mp4"
    frames = list(decode(video, fps=1, max_side=640))[:8]
    assert all(backend.detect(frame)[0].score > 0.6 for frame in frames)
