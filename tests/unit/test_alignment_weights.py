"""Which alignment block is taken, and what is recorded of it."""

import hashlib
from pathlib import Path

import pytest
import torch

from animator import alignment_weights, licences
from animator.alignment import AlignmentBlock
from animator.alignment_weights import open_alignment
from animator.config import AlignmentConfig
from animator.tensor_files import WeightsError
from animator.weights import read_config, save_model
from tests.unit.test_model import SMALL, small_animator

BANDAI = "CC BY-NC 4.0 (Bandai-Namco Research Motion Dataset)"


def write_block(folder: Path, seed: int = 0, state: dict | None = None, **data: object) -> Path:
    torch.manual_seed(seed)
    block = AlignmentBlock(AlignmentConfig(width=16, num_heads=2, encoder_depth=1, fusion_depth=1))
    about = {"trained_on": {"alignment": data}} if data else {}
    save_model(folder, alignment=(block.config, state or block.state_dict()), about=about)
    return folder


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation whose shipped weights are those of a small block."""
    monkeypatch.setattr(alignment_weights, "__file__", str(tmp_path / "animator" / "module.py"))
    folder = tmp_path / "animator" / "pretrained" / "alignment"
    return write_block(folder, seed=1, data="0" * 64, motion={BANDAI: 7, "none stated": 2})


@pytest.fixture
def animator(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", animator=(SMALL, small_animator().state_dict()))
    return tmp_path / "model"


def position(block: AlignmentBlock | None) -> torch.Tensor:
    assert block is not None
    assert not block.training
    return block.encoder_m.position


def test_a_model_brings_its_own_block_and_takes_the_shipped_one_without(
    shipped, animator, tmp_path
):
    block, about = open_alignment("auto", animator)
    assert about["name"] == "shipped"
    assert torch.equal(position(block), position(open_alignment("shipped")[0]))
    assert about == open_alignment()[1]
    own = write_block(tmp_path / "own", seed=2)
    block, about = open_alignment("auto", own)
    assert about["name"] == "own"
    assert not torch.equal(position(block), position(open_alignment("shipped", own)[0]))
    assert torch.equal(position(block), position(open_alignment(str(own), animator)[0]))


def test_the_record_names_weights_and_what_they_may_be_used_for(shipped):
    about = open_alignment("shipped")[1]
    whole = hashlib.sha256((shipped / "alignment.safetensors").read_bytes()).hexdigest()
    assert about["sha256"] == whole[:12]
    licence = about["licence"] or ""
    assert licence.startswith("non-commercial use only")
    assert f"{BANDAI}: 7 sequences, none stated: 2 sequences" in licence


def test_the_closed_form_needs_no_weights(tmp_path):
    block, about = open_alignment("closed-form", tmp_path)
    assert block is None
    assert about == {"name": "closed form", "licence": None, "sha256": None}


def test_a_choice_that_is_no_block_says_what_to_choose(shipped, animator, tmp_path):
    with pytest.raises(WeightsError, match=r"'closed_form'.*closed-form or a model folder"):
        open_alignment("closed_form")
    with pytest.raises(WeightsError, match="is not a model folder"):
        open_alignment(str(tmp_path))
    with pytest.raises(WeightsError, match=r"holds no alignment block.*train alignment"):
        open_alignment(str(animator))


def test_an_installation_without_weights_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(alignment_weights, "__file__", str(tmp_path / "module.py"))
    with pytest.raises(WeightsError, match=r"install this package again.*closed-form"):
        open_alignment()


def test_a_block_of_an_earlier_version_is_named_as_one(tmp_path):
    state = AlignmentBlock(
        AlignmentConfig(width=16, num_heads=2, encoder_depth=1, fusion_depth=1)
    ).state_dict()
    earlier = {key: value for key, value in state.items() if not key.startswith("vote_head")}
    with pytest.raises(WeightsError, match=r"by an earlier version.*train it again"):
        open_alignment(str(write_block(tmp_path / "model", state=earlier)))
    later = {**state, "new_head.bias": torch.zeros(1)}
    with pytest.raises(WeightsError, match=r"has new_head\.bias that is not expected"):
        open_alignment(str(write_block(tmp_path / "model", state=later)))


def test_licences_of_the_data_decide_what_the_weights_are_for(tmp_path):
    def terms(**data: object) -> str:
        return licences.of_alignment(read_config(write_block(tmp_path / "model", **data)))

    assert terms(data="1", motion={"CC0": 3}) == "that of its motion capture (CC0: 3 sequences)"
    assert terms(data="1", motion={"CC0": 3, BANDAI: 1}).startswith("non-commercial use only")
    assert terms(data="1") == "that of the clips it was trained on"
    assert terms() == licences.of_alignment({"trained_on": [1]}) == "not recorded"


@pytest.mark.parametrize(
    ("licence", "closed"),
    [
        (BANDAI, True),
        ("CC-BY-NC-SA 4.0", True),
        (licences.INSIGHTFACE, True),
        ("none stated", True),
        ("CC BY 4.0", False),
        ("Apache-2.0", False),
        ("a licence of the ENC group", False),
    ],
)
def test_wordings_that_forbid_commercial_use(licence, closed):
    assert licences.non_commercial(licence) is closed
