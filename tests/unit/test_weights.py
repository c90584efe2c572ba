"""Model folders: what is saved comes back bit for bit; what does not fit is named."""

import dataclasses
import json
import pickle

import pytest
import torch

from animator.alignment import AlignmentBlock
from animator.config import AlignmentConfig
from animator.model import Animator
from animator.tensor_files import WeightsError
from animator.weights import load_alignment, read_config, save_model
from tests.unit.test_model import SMALL, inputs, small_animator


@pytest.fixture
def folder(tmp_path):
    model = small_animator()
    block = AlignmentBlock(AlignmentConfig(width=32, num_heads=4))
    save_model(
        tmp_path / "model",
        animator=(SMALL, model.state_dict()),
        alignment=(block.config, block.state_dict()),
    )
    return tmp_path / "model"


@torch.no_grad()
def test_round_trip_is_bit_equal(folder):
    given = inputs(SMALL)
    assert torch.equal(Animator.from_pretrained(folder)(*given), small_animator()(*given))
    assert load_alignment(folder) is not None


def test_same_weights_give_the_same_bytes(folder, tmp_path):
    model = small_animator()
    save_model(tmp_path / "again", animator=(SMALL, model.state_dict()))
    for part in ("unet", "pose_net", "face_encoder"):
        name = f"{part}.safetensors"
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@torch.no_grad()
def test_a_folder_from_before_the_ablations_is_the_full_method(folder):
    config = json.loads((folder / "config.json").read_text())
    for name in ("id_adapter", "face_encoder"):
        del config["animator"][name]
    (folder / "config.json").write_text(json.dumps(config))
    given = inputs(SMALL)
    assert torch.equal(Animator.from_pretrained(folder)(*given), small_animator()(*given))


@torch.no_grad()
def test_a_model_of_an_ablation_comes_back_as_one(tmp_path):
    sizes = dataclasses.replace(SMALL, id_adapter="norm", face_encoder="projection")
    torch.manual_seed(0)
    model = Animator(sizes).eval()
    model.save_pretrained(tmp_path)
    again = Animator.from_pretrained(tmp_path)
    assert again.config == sizes
    assert torch.equal(again(*inputs(SMALL)), model(*inputs(SMALL)))


def test_truncated_weights_are_named(folder):
    path = folder / "unet.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(WeightsError, match=r"unet\.safetensors is not a readable safetensors"):
        Animator.from_pretrained(folder)


def test_missing_component_is_named(folder):
    (folder / "pose_net.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"pose_net\.safetensors is missing"):
        Animator.from_pretrained(folder)


def test_other_sizes_in_the_config_are_named(folder):
    config = json.loads((folder / "config.json").read_text())
    config["animator"]["face_embedding_dim"] = 128
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"face_encoder\.safetensors.*proj\.0\.weight has shape"):
        Animator.from_pretrained(folder)


def test_a_pickle_under_a_safetensors_name_is_not_run(folder, tmp_path):
    marker = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    (folder / "unet.safetensors").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(WeightsError):
        Animator.from_pretrained(folder)
    assert not marker.exists()


def test_a_folder_without_a_model_says_what_makes_one(tmp_path):
    with pytest.raises(WeightsError, match="animator train animator"):
        Animator.from_pretrained(tmp_path)
    block = AlignmentBlock(AlignmentConfig(width=32, num_heads=4))
    save_model(tmp_path / "a", alignment=(block.config, block.state_dict()))
    with pytest.raises(WeightsError, match="holds no animator"):
        Animator.from_pretrained(tmp_path / "a")


@torch.no_grad()
def test_an_animator_saves_and_loads_itself_in_shards(tmp_path):
    model, given = small_animator(), inputs(SMALL)
    model.save_pretrained(tmp_path, about={"licence": "mine"}, max_shard_size=1_000_000)
    assert (tmp_path / "unet.safetensors.index.json").is_file()
    again = Animator.from_pretrained(tmp_path)
    assert not again.training
    assert torch.equal(again(*given), model(*given))
    assert read_config(tmp_path)["licence"] == "mine"
    assert Animator.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_folder_being_written_is_no_model_until_it_is_whole(folder):
    model = small_animator()
    state = {**model.state_dict(), "face_encoder.proj.0.weight": "no tensor"}
    with pytest.raises(AttributeError):
        save_model(folder, animator=(SMALL, state))
    with pytest.raises(WeightsError, match="is not a model folder"):
        Animator.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prediction", "eps"),
        ("pose_style", "publishd"),
        ("face_channel_order", "grb"),
        ("height", 64.0),
        ("num_frames", 0),
        ("num_frames", True),
        ("cross_attention_dim", "a"),
        ("layers_per_block", None),
        ("layers_per_block", 10**9),
        ("face_head_dim", 0),
        ("block_out_channels", [32, "x", 64]),
        ("noise_augmentation", "little"),
        ("conditioning_fps", "fast"),
    ],
)
def test_settings_of_a_wrong_kind_are_named(folder, name, value):
    config = json.loads((folder / "config.json").read_text())
    config["animator"][name] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=name):
        Animator.from_pretrained(folder)


def test_a_folder_cannot_ask_for_memory_that_its_files_do_not_fill(folder):
    config = json.loads((folder / "config.json").read_text())
    config["alignment"]["width"] = 65_536
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="has shape"):
        load_alignment(folder)
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(WeightsError, match="cannot be read as JSON"):
        read_config(folder)
