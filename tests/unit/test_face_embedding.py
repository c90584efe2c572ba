"""Faces aligned and recognised in torch: the numbers of InsightFace, with gradients."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from onnx_sketch import Sketch, runtime
from skimage.data import astronaut

from animator.face_embedding import TEMPLATE, ArcFace, align_faces
from animator.onnx_file import OnnxError
from pipelines.faces import Face, InsightFaceBackend
from pipelines.images import read_image

# Eyes, nose and mouth corners of the portrait, as a detector finds them.
LANDMARKS = np.array(
    [[0.399, 0.207], [0.472, 0.203], [0.438, 0.247], [0.410, 0.294], [0.473, 0.291]], np.float32
)


def tensor(frames: np.ndarray) -> torch.Tensor:
    """uint8 RGB (B, H, W, 3) in [-1, 1], (B, 3, H, W)."""
    return torch.from_numpy(np.array(frames)).movedim(-1, 1).float() / 127.5 - 1


def recogniser(path: Path, *, scaled: bool = False, batch: int | str = "N") -> Path:
    """A small network of a recogniser's input and output."""
    s = Sketch(opset=8)
    x = "data"
    if scaled:
        x = s.op("Sub", x, s.weight([127.5]), name="_minusscalar0")
        x = s.op("Mul", x, s.weight([0.0078125]), name="_mulscalar0")
    x = s.conv(x, (3, 4), 8, strides=[8, 8])
    x = s.op("PRelu", s.batch_norm(x, 4), s.normal(4, 1, 1))
    x = s.op("Gemm", s.op("Flatten", x), s.normal(16, 784, scale=0.1), s.normal(16), transB=1)
    return s.save(path, s.batch_norm(x, 16), (3, 112, 112), batch=batch)


def insightface_embedding(path: Path, crop: np.ndarray) -> torch.Tensor:
    from insightface.model_zoo.arcface_onnx import ArcFaceONNX

    model = ArcFaceONNX(str(path))
    model.prepare(-1)
    return torch.from_numpy(model.get_feat(np.ascontiguousarray(crop[..., ::-1])))


@pytest.mark.parametrize("scaled", [False, True])
def test_range_and_colours_are_those_of_insightface(scaled: bool, tmp_path: Path):
    path = recogniser(tmp_path / "r.onnx", scaled=scaled)
    crop = np.ascontiguousarray(astronaut()[60:172, 170:282])
    arcface = ArcFace.from_onnx(path)
    assert arcface.scaled_inside is scaled
    assert arcface.dim == 16
    assert arcface.name == "arcface:r"
    assert "non-commercial" in arcface.licence
    expected = insightface_embedding(path, crop)
    torch.testing.assert_close(arcface(tensor(crop[None])), expected, rtol=1e-4, atol=1e-4)


def test_a_network_of_swapped_colours_is_given_them(tmp_path: Path):
    path = recogniser(tmp_path / "r.onnx")
    crop = tensor(astronaut()[None, 60:172, 170:282])
    swapped = ArcFace.from_onnx(path, channel_order="bgr")
    torch.testing.assert_close(swapped(crop), ArcFace.from_onnx(path)(crop.flip(1)))


def test_faces_of_another_size_are_refused(tmp_path: Path):
    arcface = ArcFace.from_onnx(recogniser(tmp_path / "r.onnx"))
    with pytest.raises(ValueError, match="112, 112"):
        arcface(torch.zeros(1, 3, 64, 64))


def test_a_network_of_another_input_is_refused(tmp_path: Path):
    s = Sketch(opset=11)
    path = s.save(tmp_path / "r.onnx", s.op("Flatten", "data"), (3, 64, 64))
    with pytest.raises(OnnxError, match="112"):
        ArcFace.from_onnx(path)


# --- alignment -----------------------------------------------------------------------------------


def insightface_crop(image: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    from insightface.utils.face_align import norm_crop

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return norm_crop(image, landmarks * np.array(image.shape[1::-1], np.float32))


@pytest.mark.parametrize("shift", [(0.0, 0.0), (-0.4, -0.2)])
@pytest.mark.parametrize("degrees", [0.0, 70.0])
def test_crops_are_those_of_insightface(shift: tuple[float, float], degrees: float):
    image = astronaut()[:400]
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centre = LANDMARKS.mean(0)
    landmarks = ((LANDMARKS - centre) @ turn.T + centre + shift).astype(np.float32)
    expected = tensor(insightface_crop(image, landmarks)[None])
    crop = align_faces(tensor(image[None]), torch.from_numpy(landmarks)[None])
    # OpenCV places samples to 1/32 of a pixel and rounds the result to whole numbers.
    assert (crop - expected).abs().mean() < 1 / 127.5
    if shift[0]:
        assert crop[0, :, 0, 0].tolist() == pytest.approx([-1, -1, -1])


def test_a_face_that_lies_right_is_left_alone():
    crop = tensor(astronaut()[None, 60:172, 170:282])
    landmarks = torch.tensor(TEMPLATE)[None] / 112
    torch.testing.assert_close(align_faces(crop, landmarks), crop, rtol=0, atol=1e-4)
    assert align_faces(crop, landmarks, size=224).shape == (1, 3, 224, 224)


def test_each_image_of_a_batch_has_its_own_landmarks():
    images = tensor(np.stack([astronaut(), astronaut()[::-1]]))
    landmarks = torch.from_numpy(np.stack([LANDMARKS, LANDMARKS * 0.5 + 0.3]))
    both = align_faces(images, landmarks)
    for index in range(2):
        single = align_faces(images[index : index + 1], landmarks[index : index + 1])
        torch.testing.assert_close(both[index : index + 1], single)


@pytest.mark.parametrize("landmarks", [torch.full((1, 5, 2), float("nan")), torch.zeros(1, 3, 2)])
def test_faces_without_landmarks_are_refused(landmarks: torch.Tensor):
    with pytest.raises(ValueError, match="landmarks"):
        align_faces(torch.zeros(1, 3, 64, 64), landmarks)


def test_gradients_reach_the_pixels_of_the_image(tmp_path: Path):
    arcface = ArcFace.from_onnx(recogniser(tmp_path / "r.onnx")).double()
    image = tensor(astronaut()[None, :200, 100:300]).double().requires_grad_()
    landmarks = torch.from_numpy((LANDMARKS * 512 - [100, 0]) / 200)[None]

    def embedding(pixels: torch.Tensor) -> torch.Tensor:
        return F.normalize(arcface(align_faces(pixels, landmarks)))

    assert torch.autograd.gradcheck(embedding, (image,), eps=1e-4, fast_mode=True)


# --- a real network ------------------------------------------------------------------------------


@pytest.fixture
def pack(models_env: Path) -> Path:
    return models_env / "face" / "mini"


@pytest.mark.real_data
def test_real_network_gives_the_numbers_of_onnx_runtime(pack: Path):
    path = pack / "mobilefacenet.onnx"
    arcface = ArcFace.from_onnx(path)
    faces = torch.rand((3, 3, 112, 112), generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = runtime(path, faces)
    torch.testing.assert_close(arcface(faces), expected, rtol=1e-4, atol=1e-4)
    half = arcface.to(torch.bfloat16)(faces).float()
    assert F.cosine_similarity(half, expected).min() > 0.99


@pytest.mark.real_data
def test_real_network_has_the_gradients_of_finite_differences(pack: Path):
    arcface = ArcFace.from_onnx(pack / "mobilefacenet.onnx")
    face = tensor(astronaut()[None, 60:172, 170:282]).requires_grad_()
    target = torch.randn((1, arcface.dim), generator=torch.Generator().manual_seed(0))

    def loss(pixels: torch.Tensor) -> torch.Tensor:
        return 1 - F.cosine_similarity(arcface(pixels), target).mean()

    (gradient,) = torch.autograd.grad(loss(face), face)
    step = 0.02 * gradient / gradient.norm()
    with torch.no_grad():
        measured = (loss(face + step) - loss(face - step)) / 2
    assert float(measured) == pytest.approx(float((gradient * step).sum()), rel=0.02)


@pytest.mark.real_data
def test_people_are_told_apart_as_by_the_backend(pack: Path, data_root: Path):
    backend = InsightFaceBackend(pack)
    arcface = ArcFace.from_onnx(pack / "mobilefacenet.onnx")
    portrait = np.array(astronaut())
    group = read_image(data_root / "image" / "insightface_t1.jpg")
    frames = [portrait, portrait[40:330, 100:400], group, group]

    people = backend.detect(group)
    found: list[Face] = [backend.detect(frame)[0] for frame in frames[:2]] + people[:2]
    known = np.stack([backend.embed(*pair) for pair in zip(frames, found, strict=True)])
    own = torch.cat(
        [
            arcface(align_faces(tensor(frame[None]), torch.from_numpy(face.landmarks)[None]))
            for frame, face in zip(frames, found, strict=True)
        ]
    )
    theirs = torch.from_numpy(known)
    assert F.cosine_similarity(own, theirs).min() > 0.999
    between = F.normalize(own) @ F.normalize(own).T
    torch.testing.assert_close(
        between, F.normalize(theirs) @ F.normalize(theirs).T, rtol=0, atol=0.01
    )
    assert between[0, 1] > 0.54
    assert between[0, 2:].max() < 0.38
