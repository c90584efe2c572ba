"""Where perception models are looked for, and which is taken."""

import re
import shutil
from pathlib import Path

import pytest

from pipelines.models import (
    CATALOGUE,
    ModelError,
    face_packs,
    find,
    known,
    locate_face_pack,
    locate_folder,
    locate_pose_models,
    model_folders,
    sha256,
)


def _put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(path.name.encode())
    return path


def _pack(folder: Path) -> Path:
    _put(folder / "one.onnx")
    _put(folder / "two.onnx")
    return folder


def test_nothing_is_found_on_a_fresh_machine(no_models: Path):
    assert model_folders() == [no_models]
    assert locate_face_pack() is None
    assert locate_pose_models() is None
    assert find("dwpose") is None


def test_earlier_folders_win_and_the_cache_comes_last(tmp_path: Path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    cache = tmp_path / "cache" / "animator" / "models"
    for folder in (first, second, cache):
        _put(folder / "pose" / "yolox_nano.onnx")
    _put(cache / "pose" / "tinypose_256x192.onnx")
    monkeypatch.setenv("ANIMATOR_MODELS", f"{first}:{tmp_path / 'absent'}:{second}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert model_folders() == [first, second, cache]
    assert find("yolox_nano") == first / "pose" / "yolox_nano.onnx"
    assert find("tinypose") == cache / "pose" / "tinypose_256x192.onnx"


def test_best_known_pack_is_taken_before_foreign_ones(no_models: Path):
    foreign = _pack(no_models / "face" / "aaa_mine")
    assert locate_face_pack() == foreign
    best = _pack(no_models / "face" / "buffalo_l")
    _pack(no_models / "face" / "buffalo_s")
    assert locate_face_pack() == best
    assert locate_face_pack("aaa_mine") == foreign
    assert [pack.name for pack in face_packs()] == ["buffalo_l", "buffalo_s", "aaa_mine"]


def test_folder_with_one_network_is_no_pack(no_models: Path):
    _put(no_models / "face" / "half" / "detector.onnx")
    assert locate_face_pack() is None


def test_dwpose_is_preferred_and_a_lone_pose_network_is_not_enough(no_models: Path):
    tiny = _put(no_models / "tinypose_256x192.onnx")
    assert locate_pose_models() is None
    nano = _put(no_models / "yolox_nano.onnx")
    models = locate_pose_models()
    assert models is not None
    assert (models.detector, models.pose) == (nano, tiny)
    dwpose = _put(no_models / "pose" / "dw-ll_ucoco_384.onnx")
    models = locate_pose_models()
    assert models is not None
    assert models.pose == dwpose


def test_catalogue_names_source_and_licence_of_every_model():
    assert len({model.name for model in CATALOGUE}) == len(CATALOGUE)
    for model in CATALOGUE:
        assert model.source.startswith("https://")
        assert model.licence
        assert model.purpose
        assert all(terms.url.startswith("https://") for terms in model.terms)
        assert all(file.url.startswith("https://") for file in model.files)
        digests = [file.sha256 for file in model.files] + [each for _, each in model.networks]
        assert all(digest is None or re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)
    free = {model.name for model in CATALOGUE if not model.non_commercial}
    assert free == {"yolox_l", "yolox_nano", "dwpose", "tinypose", "svd-xt"}
    with pytest.raises(ModelError, match="expected one of"):
        known("no_such_model")


def test_a_model_of_many_files_is_found_under_either_name_when_it_is_whole(no_models: Path):
    names = ("unet.pth", "pose_net.pth", "face_encoder.pth")
    for name in names:
        assert locate_folder("stableanimator-v1") is None
        _put(no_models / "StableAnimator" / "Animation" / name)
    assert locate_folder("stableanimator-v1") == no_models / "StableAnimator"
    cached = no_models / "cache" / "animator" / "models" / "svd-xt"
    for part in ("unet", "vae"):
        assert locate_folder("svd-xt") is None
        _put(cached / part / "config.json")
        _put(cached / part / "diffusion_pytorch_model.fp16.safetensors")
    assert locate_folder("svd-xt") == cached
    hub_name = no_models / "stable-video-diffusion-img2vid-xt"
    shutil.copytree(cached, hub_name)
    assert locate_folder("svd-xt") == hub_name
    with pytest.raises(ModelError, match="no model of many files"):
        locate_folder("dwpose")


def test_digest_of_a_pack_changes_with_any_of_its_files(tmp_path: Path):
    pack = _pack(tmp_path / "pack")
    before = sha256(pack)
    assert sha256(pack) == before
    (pack / "two.onnx").write_bytes(b"other")
    assert sha256(pack) != before
