"""Alignment measured against known truth: what each row must be, and the verb that prints them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from animator.alignment import AlignmentBlock
from animator.config import AlignmentConfig
from animator.keypoints import SimilarityRange, misalignment
from animator.similarity import Similarity, apply, invert
from animator.weights import save_model
from inference.affine import UPPER_BODY, fit_affine
from inference.alignment.benchmark import evaluate_alignment, misaligned_clips
from inference.alignment.settings import SETTINGS, named_settings
from pipelines.draws import uniforms
from pipelines.motion import MotionStore
from tests.unit.test_cli import run
from tests.unit.test_motion import write_motion

ROWS = {"none", "affine", "similarity", "similarity_clip", "oracle", "oracle_clip"}
LEARNED = {"learned", "learned_clip"}
COLUMNS = {"dis", "dis_p95", "rotation", "scale", "shift", "jitter", "ms_per_frame"}


def measure(motion: Path, **options: Any) -> dict[str, Any]:
    options = {"alignment": "closed-form", **options}
    return evaluate_alignment(motion, clips=12, num_frames=8, **options)


@pytest.fixture(scope="module")
def motion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_motion(tmp_path_factory.mktemp("data") / "motion")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A block that was never trained: the closed form."""
    config = AlignmentConfig(width=16, num_heads=2)
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, alignment=(config, AlignmentBlock(config).state_dict()))
    return folder


def test_rows_are_what_their_names_say(motion, model):
    result = measure(motion, alignment=str(model))
    rows = result["rows"]
    assert set(rows) == ROWS | LEARNED
    assert all(set(row) == COLUMNS for row in rows.values())
    assert rows["none"]["dis"] > 0.1
    assert rows["similarity"]["dis"] < 0.5 * rows["none"]["dis"]
    assert rows["oracle"]["rotation"] < 1e-3
    assert rows["oracle"]["scale"] < 1e-4
    assert rows["affine"]["rotation"] == pytest.approx(rows["none"]["rotation"])
    for name in ("none", "affine", "similarity_clip", "learned_clip", "oracle_clip"):
        assert rows[name]["jitter"] < 1e-6, name
    assert rows["similarity"]["jitter"] > 1e-4
    for name in ("", "_clip"):  # an untrained block is the closed form
        assert rows["learned" + name]["dis"] == pytest.approx(
            rows["similarity" + name]["dis"], rel=1e-4
        )


def test_the_same_seed_gives_the_same_table_and_another_one_does_not(motion):
    first, again = (measure(motion)["rows"] for _ in range(2))
    other = measure(motion, seed=1)["rows"]
    for name in ROWS:
        assert first[name]["dis"] == again[name]["dis"]
    assert first["none"]["dis"] != other["none"]["dis"]


def test_known_misalignments_take_the_truth_to_the_driven_poses(motion):
    store = MotionStore(motion)
    limits = SimilarityRange()
    ((done, clips),) = misaligned_clips(store, SETTINGS["full"], 12, 0, 8)
    assert done == 12
    assert clips.driven.shape == (12, 8, 18, 2)
    torch.testing.assert_close(
        apply(invert(clips.misalign), clips.driven), clips.truth, atol=1e-5, rtol=0
    )
    assert clips.misalign.degrees.abs().max() <= limits.rotation
    assert clips.misalign.shift.abs().max() <= limits.shift
    # The reference is a frame of the clip and none of the driven ones.
    gap = (clips.truth - clips.reference[:, None]).abs().amax((2, 3))
    assert gap.min() > 0


def test_misalignments_fill_their_ranges():
    drawn = misalignment(uniforms(0, range(4000), 4), SimilarityRange())
    assert 0.5 <= drawn.scale.min() < 0.51
    assert 1.96 < drawn.scale.max() <= 2
    assert abs(drawn.scale.log().mean()) < 0.03
    assert 29 < drawn.degrees.abs().max() <= 30
    assert 0.24 < drawn.shift.abs().max() <= 0.25


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_can_be_measured(motion, name):
    result = measure(motion, setting=name)
    for row in result["rows"].values():
        assert all(value == value and value >= 0 for value in row.values())
    if name == "aligned":
        assert result["rows"]["none"]["dis"] == 0
    if name == "several":
        assert len(SETTINGS[name].cameras) == 2


def test_affine_finds_a_scale_and_a_shift_and_no_rotation():
    reference = torch.randn(2, 18, 2, generator=torch.Generator().manual_seed(0))
    moved = Similarity(
        torch.tensor([[0.5], [2.0]]),
        torch.ones(2, 1),
        torch.zeros(2, 1),
        torch.tensor([[[0.1, -0.2]], [[0.0, 0.3]]]),
    )
    driven = apply(invert(moved), reference[:, None].expand(-1, 3, -1, -1))
    weight = torch.ones(2, 3, 18)
    driven[:, :, [3, 4, 6, 7]] += 5  # the arms have no say
    weight[0, 1] = 0  # and neither does what is not seen, whatever is there
    driven[0, 1] = float("nan")
    weight[1, :, 2] = 0
    found = fit_affine(driven, reference, weight)
    torch.testing.assert_close(found.scale, moved.scale[:, 0])
    torch.testing.assert_close(found.shift, moved.shift[:, 0], atol=1e-5, rtol=0)
    assert (found.sin == 0).all()
    assert not {3, 4, 6, 7} & set(UPPER_BODY)


def test_affine_falls_back_to_the_shift():
    flat = torch.zeros(1, 1, 18, 2)
    found = fit_affine(flat, torch.full((1, 18, 2), 0.25), torch.ones(1, 1, 18))
    assert found.scale.item() == 1
    torch.testing.assert_close(found.shift, torch.full((1, 2), 0.25))
    nothing = fit_affine(flat, torch.full((1, 18, 2), 0.25), torch.zeros(1, 1, 18))
    assert (nothing.shift == 0).all()


def test_the_verb_prints_and_writes_the_table(motion, model, tmp_path, capsys):
    report = tmp_path / "alignment.json"
    verb = ("evaluate", "alignment", "--motion", str(motion), "--clips", "3")
    assert run(*verb, "--report", str(report), "--seed", "4", "--alignment", str(model)) == 0
    printed = capsys.readouterr().out
    written = json.loads(report.read_text())
    assert set(written["rows"]) == ROWS | LEARNED
    assert all(name in printed for name in ROWS | LEARNED)
    assert written["seed"] == 4
    assert written["data"]["fingerprint"] == MotionStore(motion).fingerprint
    assert {"date", "machine", "settings"} <= set(written)
    assert run(*verb, "--setting", "all", "--alignment", "closed-form") == 0
    printed = capsys.readouterr().out
    assert all(f"{name}: " in printed for name in SETTINGS)
    assert "left out" in printed


def test_mistakes_are_one_sentence(motion, tmp_path, capsys):
    verb = ["evaluate", "alignment", "--motion"]
    for arguments, said in (
        ([str(tmp_path / "nowhere")], "is no folder"),
        ([str(motion), "--clips", "0"], "at least 1"),
        ([str(motion), "--setting", "halve"], "Did you mean half"),
        ([str(motion), "--report", str(tmp_path / "no" / "a.json")], "make the folder"),
        ([str(motion), "--alignment", str(tmp_path)], "not a model folder"),
        ([str(motion), "--poses", str(motion)], "Got both"),
    ):
        assert run(*verb, *arguments) == 2, said
        assert said in capsys.readouterr().err
    with pytest.raises(ValueError, match="There is no setting"):
        named_settings("nothing")


@pytest.mark.real_data
def test_real_motion_keeps_the_order_of_the_rows(data_root):
    folder = data_root / "motion" / "val"
    rows = evaluate_alignment(folder, clips=150, num_frames=24, alignment="closed-form")["rows"]
    assert rows["none"]["dis"] > 2 * rows["similarity"]["dis"]
    assert rows["similarity"]["dis"] > rows["similarity_clip"]["dis"]
    assert rows["similarity"]["dis"] > rows["oracle"]["dis"]
    assert rows["similarity_clip"]["dis"] > rows["oracle_clip"]["dis"]
