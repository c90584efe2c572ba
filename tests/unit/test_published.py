"""Published weights: what Stable Video Diffusion and v1 give, and files that are not them."""

import json
import pickle

import pytest
import torch
from diffusers.models.unets.unet_spatio_temporal_condition import (
    UNetSpatioTemporalConditionModel,
)
from safetensors.torch import load_file

from animator.config import svd_xt
from animator.id_adapter import IDAdapter
from animator.model import Animator
from animator.published import animator_from_v1
from animator.stable_video import animator_from_svd
from animator.tensor_files import WeightsError
from animator.weights import add_encoders
from tests.unit.published_folders import UNET, small_svd, small_v1


@pytest.fixture(scope="module")
def svd(tmp_path_factory):
    return small_svd(tmp_path_factory.mktemp("svd"))


@pytest.fixture
def v1(tmp_path):
    return small_v1(tmp_path / "v1")


def call(model: Animator, batch: int = 2, **zeros) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    config, frames = model.config, 3

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    inputs = {
        "sample": draw(batch, frames, 8, 8, 8),
        "timestep": draw(batch),
        "image_token": draw(batch, 1, config.cross_attention_dim),
        "face_embedding": draw(batch, config.face_embedding_dim),
        "pose_images": draw(batch * frames, 3, 64, 64).clamp(-1, 1),
        "added_time_ids": torch.tensor([[6.0, 127, 0.02]] * batch),
    }
    with torch.no_grad():
        return model(**{**inputs, **zeros})


def test_adapters_start_from_their_blocks_own_keys_and_values(svd):
    model = animator_from_svd(svd)
    adapters = 0
    for name, module in model.unet.named_modules():
        if isinstance(module, IDAdapter):
            block = model.unet.get_submodule(name.removesuffix(".processor"))
            assert torch.equal(module.id_to_k.weight, block.to_k.weight)
            assert torch.equal(module.id_to_v.weight, block.to_v.weight)
            assert module.id_to_k.weight.data_ptr() != block.to_k.weight.data_ptr()
            adapters += 1
    assert adapters == 16
    assert not any(p.is_meta for p in model.parameters())


def test_an_untrained_start_without_a_picture_is_stable_video_diffusion_itself(svd):
    # In double precision: random weights amplify the rounding of fp32 by orders of magnitude.
    plain = UNetSpatioTemporalConditionModel.from_pretrained(
        svd / "unet", low_cpu_mem_usage=False
    ).double()
    model = animator_from_svd(svd).double()
    sample = torch.randn(1, 4, 8, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    time, ids = torch.tensor([0.3]), torch.tensor([[6.0, 127, 0.02]])
    nothing = torch.zeros(1, 1, 64, dtype=torch.float64)
    pose = torch.rand(4, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        expected = plain.eval()(sample, time, nothing, ids, return_dict=False)[0]
        got = model(sample, time, nothing, None, pose, ids)
    torch.testing.assert_close(got, expected, atol=1e-8, rtol=0)


def test_half_precision_files_are_found_and_kept(tmp_path):
    folder = small_svd(tmp_path, variant="fp16")
    assert animator_from_svd(folder).dtype == torch.float16
    model = animator_from_svd(folder, dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_training_run_may_ask_for_sizes_that_the_folder_must_have(svd):
    with pytest.raises(WeightsError, match=r"block_out_channels is \(32, 64, 64, 64\)"):
        animator_from_svd(svd, sizes=svd_xt())


def test_encoders_are_copied_whole_or_named(svd, tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    copied = add_encoders(target, svd)
    assert sorted(copied)[0] == "image_encoder/config.json"
    assert (target / "vae" / "diffusion_pytorch_model.safetensors").is_file()
    with pytest.raises(WeightsError, match=r"vae has no config\.json"):
        add_encoders(target, tmp_path)


def test_v1_checkpoints_become_a_model_folder_with_the_same_predictions(v1, tmp_path):
    imported = animator_from_v1(v1)
    imported.save_pretrained(tmp_path / "model")
    again = Animator.from_pretrained(tmp_path / "model")
    assert again.config.face_channel_order == "bgr"
    assert again.config.conditioning_fps == 7
    assert torch.equal(call(again), call(imported))
    # The weights are the files' own, all of them.
    for part in ("unet", "pose_net", "face_encoder"):
        stored = torch.load(v1 / f"{part}.pth", weights_only=True)
        loaded = getattr(again, part).state_dict()
        assert stored.keys() == loaded.keys()
        assert all(torch.equal(stored[key], loaded[key]) for key in stored)


def test_sizes_of_a_v1_face_encoder_come_from_its_tensors(tmp_path):
    model = animator_from_v1(small_v1(tmp_path, embedding_dim=128))
    assert model.config.face_embedding_dim == 128


@pytest.mark.real_data
@torch.no_grad()
def test_published_predecessor_gives_the_same_numbers(data_root, tmp_path):
    folder = data_root.parent / "reference" / "v1_small"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing")
    animator_from_v1(folder).save_pretrained(tmp_path)
    model = Animator.from_pretrained(tmp_path)
    io = load_file(folder / "io.safetensors")
    names = (
        "sample",
        "timestep",
        "image_token",
        "face_embedding",
        "pose_images",
        "added_time_ids",
    )
    inputs = {name: io[name] for name in names}
    close = {"atol": 1e-4, "rtol": 0.0}
    token = io["image_token"]
    torch.testing.assert_close(
        model.face_encoder(io["face_embedding"], token), io["face_tokens"], **close
    )
    torch.testing.assert_close(model.pose_net(io["pose_images"]), io["pose_features"], **close)
    torch.testing.assert_close(model(**inputs), io["prediction"], **close)
    nothing = {
        "image_token": torch.zeros_like(token),
        "face_embedding": None,
        "pose_images": None,
    }
    free = model(**{**inputs, **nothing})
    torch.testing.assert_close(free, io["prediction_unconditional"], **close)


def rewrite(path, change):
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def test_a_missing_an_unknown_and_a_misshapen_tensor_are_named(v1):
    rewrite(v1 / "unet.pth", lambda s: s.update({"conv_in.wight": s.pop("conv_in.weight")}))
    with pytest.raises(WeightsError, match=r"lacks conv_in\.weight and has conv_in\.wight"):
        animator_from_v1(v1)
    small_v1(v1)
    rewrite(v1 / "pose_net.pth", lambda s: s.update({"scale": torch.ones(2)}))
    with pytest.raises(WeightsError, match=r"scale has shape \(2,\), expected \(1,\)"):
        animator_from_v1(v1)


def test_a_pickle_with_code_is_refused_and_does_nothing(v1, tmp_path):
    marker = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    for write in (
        lambda path: torch.save({"conv_in.weight": Evil()}, path),
        lambda path: path.write_bytes(pickle.dumps(Evil())),
    ):
        write(v1 / "face_encoder.pth")
        with pytest.raises(WeightsError, match=r"nothing in it was executed") as refused:
            animator_from_v1(v1)
        assert "face_encoder.pth" in str(refused.value)
        assert "weights_only" not in str(refused.value)  # never torch's advice to load it anyway
        assert not marker.exists()


def test_damaged_checkpoints_are_named(v1):
    whole = (v1 / "unet.pth").read_bytes()
    (v1 / "unet.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match=r"unet\.pth is cut off"):
        animator_from_v1(v1)
    (v1 / "unet.pth").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"unet\.pth"):
        animator_from_v1(v1)
    torch.save([1, 2], v1 / "unet.pth")
    with pytest.raises(WeightsError, match="holds list, expected named tensors"):
        animator_from_v1(v1)
    (v1 / "pose_net.pth").unlink()
    with pytest.raises(WeightsError, match=r"lacks pose_net\.pth"):
        animator_from_v1(v1)


def test_a_unet_of_another_structure_is_refused(v1):
    config = {"unet_config": {**UNET, "transformer_layers_per_block": 2}}
    (v1 / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="transformer_layers_per_block is 2"):
        animator_from_v1(v1)
    config = {"unet_config": {**UNET, "num_attention_heads": [2, 4]}}
    (v1 / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="do not go together"):
        animator_from_v1(v1)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(1, device="meta"),
        torch.ones(1).to_sparse(),
        torch.ones(1, dtype=torch.complex64),
        torch.ones(1, dtype=torch.int64),
    ],
)
def test_tensors_that_are_no_weights_are_named(v1, tensor):
    rewrite(v1 / "pose_net.pth", lambda s: s.update({"scale": tensor}))
    with pytest.raises(WeightsError, match=r"scale is a .* dense real numbers"):
        animator_from_v1(v1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"block_out_channels": 5},
        {"addition_time_embed_dim": None},
        {"num_attention_heads": [0, 4, 4, 4]},
        {"cross_attention_dim": "wide"},
    ],
)
def test_sizes_that_are_none_are_named(v1, wrong):
    (v1 / "config.json").write_text(json.dumps({"unet_config": {**UNET, **wrong}}))
    with pytest.raises(WeightsError, match=r"do not go together|is "):
        animator_from_v1(v1)
