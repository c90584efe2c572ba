"""Image tokens: CLIP's from a folder of weights, and the thumbnail's without any."""

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from animator.image_token import (
    CLIP_MEAN,
    CLIP_STD,
    ClipImageToken,
    ImageTokenError,
    ThumbnailToken,
    open_image_token,
    resize_antialiased,
)

DIM = 12


def images(height: int, width: int, count: int = 2) -> torch.Tensor:
    return torch.rand((count, 3, height, width), generator=torch.Generator().manual_seed(0)) * 2 - 1


def tower(projection: int = DIM) -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        projection_dim=projection,
        attention_dropout=0.5,
    )
    return CLIPVisionModelWithProjection(config).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image encoder of random weights, as diffusers keeps it."""
    tower().save_pretrained(tmp_path / "image_encoder")
    return tmp_path / "image_encoder"


# --- the resize ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "target"),
    [
        ((288, 512), (112, 112)),
        ((1024, 256), (56, 56)),
        ((333, 97), (28, 30)),
        ((448, 225), (224, 224)),
        ((100, 61), (224, 224)),
        ((224, 224), (224, 224)),
        ((2, 9), (28, 28)),
        ((901, 3), (7, 28)),
    ],
)
def test_resizes_as_diffusers_does(size: tuple[int, int], target: tuple[int, int]):
    from diffusers.pipelines.stable_video_diffusion import pipeline_stable_video_diffusion

    expected = pipeline_stable_video_diffusion._resize_with_antialiasing(images(*size), target)
    result = resize_antialiased(images(*size), target)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_fine_stripes_vanish_instead_of_folding_into_coarse_ones():
    stripes = torch.ones(1, 3, 400, 400)
    stripes[..., ::2] = -1
    assert resize_antialiased(stripes, (30, 30)).abs().max() < 0.05


def test_pictures_of_one_line_are_refused():
    with pytest.raises(ValueError, match="1x40"):
        resize_antialiased(torch.zeros(1, 3, 1, 40), (28, 28))


# --- the encoder ---------------------------------------------------------------------------------


def by_hand(encoder: Any, pictures: torch.Tensor) -> torch.Tensor:
    small = (resize_antialiased(pictures, (28, 28)) + 1) / 2
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    with torch.no_grad():
        return encoder(((small - mean) / std).to(encoder.dtype)).image_embeds[:, None]


def test_token_is_that_of_transformers(folder: Path):
    token = ClipImageToken.from_folder(folder)
    result = token(images(64, 100))
    assert result.shape == (2, 1, DIM)
    torch.testing.assert_close(result, by_hand(tower(), images(64, 100)))
    assert token.dim == DIM
    assert token.name == "clip_vision"
    assert "MIT" in token.licence
    assert "Stability" in token.licence
    assert token.takes_native


def test_pictures_of_different_sizes_may_be_resized_first_and_stacked(folder: Path):
    for token in (ClipImageToken.from_folder(folder), ThumbnailToken(DIM)):
        pictures = [images(64, 100, 1), images(31, 47, 1)]
        stacked = token(torch.cat([token.resize(picture) for picture in pictures]))
        alone = torch.cat([token(picture) for picture in pictures])
        torch.testing.assert_close(stacked, alone, rtol=1e-4, atol=1e-5)


def test_is_frozen_and_the_same_in_every_mode(folder: Path):
    token = ClipImageToken.from_folder(folder)
    assert not any(parameter.requires_grad for parameter in token.parameters())
    whole = torch.nn.Sequential(token).train()
    assert not any(module.training for module in token.modules())
    torch.testing.assert_close(whole(images(30, 30)), token(images(30, 30)))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_computes_near_the_whole(kind: torch.dtype, folder: Path):
    expected = ClipImageToken.from_folder(folder)(images(64, 100))
    result = ClipImageToken.from_folder(folder, dtype=kind)(images(64, 100))
    assert result.dtype == kind
    assert torch.nn.functional.cosine_similarity(result.float(), expected, dim=-1).min() > 0.999


def test_file_of_half_precision_is_found_by_its_name(tmp_path: Path):
    tower().half().save_pretrained(tmp_path, variant="fp16")
    assert not (tmp_path / "model.safetensors").exists()
    token = ClipImageToken.from_folder(tmp_path)
    assert token.encoder.dtype == torch.float16
    whole = ClipImageToken.from_folder(tmp_path, dtype=torch.float32)
    assert whole.encoder.dtype == torch.float32
    torch.testing.assert_close(
        whole(images(64, 100)), by_hand(tower(), images(64, 100)), rtol=0, atol=0.01
    )


def test_of_two_files_the_one_for_the_asked_precision_is_read(folder: Path):
    other = {name: value.half() * 0 for name, value in tower().state_dict().items()}
    save_file(other, folder / "model.fp16.safetensors", {"format": "pt"})
    assert ClipImageToken.from_folder(folder)(images(30, 30)).abs().max() > 0
    half = ClipImageToken.from_folder(folder, dtype=torch.float16)
    assert half(images(30, 30)).abs().max() == 0


# --- what is refused -----------------------------------------------------------------------------


class _Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (Path("executed"),)  # type: ignore[return-value]


def test_pickled_weights_are_refused_and_never_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.fp16.bin", "pytorch_model.fp16.bin"):
        (folder / name).write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(ImageTokenError, match=r"pytorch_model\.bin.*expected model\.safetensors"):
        ClipImageToken.from_folder(folder)
    assert not (tmp_path / "executed").exists()


def test_folders_without_an_encoder_are_refused(tmp_path: Path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ImageTokenError, match="no image encoder"):
            ClipImageToken.from_folder(path)


@pytest.mark.parametrize("content", ["{", "[]", '{"image_size": "wide"}', '{"hidden_size": 64}'])
def test_a_config_that_does_not_fit_is_refused(content: str, folder: Path):
    (folder / "config.json").write_text(content)
    with pytest.raises(ImageTokenError, match="copy the whole folder again"):
        ClipImageToken.from_folder(folder)


def test_damaged_weights_are_refused(folder: Path):
    weights = folder / "model.safetensors"
    state = load_file(weights)
    whole = weights.read_bytes()
    for content in (b"", b"garbage" * 99, whole[:-9]):
        weights.write_bytes(content)
        with pytest.raises(ImageTokenError, match=r"model\.safetensors"):
            ClipImageToken.from_folder(folder)
    for lost in ("visual_projection.weight", "vision_model.pre_layrnorm.bias"):
        rest = {name: value for name, value in state.items() if name != lost}
        save_file(rest, weights, {"format": "pt"})
        with pytest.raises(ImageTokenError, match=lost):
            ClipImageToken.from_folder(folder)


# --- the choice ----------------------------------------------------------------------------------


def test_the_named_encoder_is_opened(folder: Path):
    thumbnail = open_image_token("thumbnail", 32, None)
    assert isinstance(thumbnail, ThumbnailToken)
    assert not thumbnail.takes_native
    assert thumbnail(images(40, 30)).shape == (2, 1, 32)
    clip = open_image_token("clip_vision", DIM, folder, torch.bfloat16)
    assert isinstance(clip, ClipImageToken)
    assert clip(images(40, 30)).dtype == torch.bfloat16


def test_encoders_that_do_not_fit_the_model_are_refused(folder: Path):
    with pytest.raises(ImageTokenError, match=f"{DIM} numbers, but the model takes 1024"):
        open_image_token("clip_vision", 1024, folder)
    with pytest.raises(ImageTokenError, match="image_encoder folder"):
        open_image_token("clip_vision", DIM, None)
    with pytest.raises(ImageTokenError, match="expected one of thumbnail, clip_vision"):
        open_image_token("dino", DIM, folder)


def test_transformers_is_imported_only_where_it_is_used():
    code = "import sys, animator.image_token; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
