"""The alignment block as ONNX: torch's numbers for any batch, or no file."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from animator import onnx_export
from animator.alignment import AlignmentBlock
from animator.config import AlignmentConfig
from animator.onnx_export import INPUTS, OUTPUTS, export_alignment
from animator.tensor_files import WeightsError
from animator.weights import save_model
from infra.cli import main


def small_block(seed: int = 0) -> AlignmentBlock:
    """A block whose last layers, zero before training, are random: each output says something."""
    torch.manual_seed(seed)
    block = AlignmentBlock(AlignmentConfig(width=16, num_heads=2, encoder_depth=1, fusion_depth=1))
    for head in (block.head, block.vote_head, block.error_head):
        last = head[-1]
        assert isinstance(last, nn.Linear)
        nn.init.normal_(last.weight, std=0.3)
        nn.init.normal_(last.bias, std=0.3)
    return block.eval()


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command prints; `file` is the written one."""
    folder, block = tmp_path_factory.mktemp("onnx"), small_block()
    about = {"trained_on": {"alignment": {"data": "1", "motion": {"none stated": 2}}}}
    save_model(folder / "model", alignment=(block.config, block.state_dict()), about=about)
    command = ["weights", "export-alignment", "--model", str(folder / "model"), "--json"]
    printed = io.StringIO()
    with pytest.raises(SystemExit) as ended, contextlib.redirect_stdout(printed):
        main([*command, "--out", str(folder / "new" / "alignment.onnx")])
    assert not ended.value.code
    return json.loads(printed.getvalue())


def poses(batch: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    reference, driven = 0.3 * torch.randn(2, batch, 18, 2, generator=generator)
    weight = torch.rand(batch, 18, generator=generator)
    return reference, driven, weight, torch.tensor([[1.0, 0.6]]).repeat(batch, 1)


def differences(path: str, inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """How far ONNX Runtime is from torch, by output."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = session.run(list(OUTPUTS), {k: v.numpy() for k, v in zip(INPUTS, inputs, strict=True)})
    with torch.no_grad():
        transform, votes, error = small_block()(*inputs)
    found = {}
    for name, value, truth in zip(OUTPUTS, given, (*transform, votes, error), strict=True):
        assert isinstance(value, np.ndarray)
        assert value.shape == truth.shape
        found[name] = float(np.abs(value - truth.numpy()).max())
    return found


@pytest.mark.parametrize("batch", [1, 2, 33])
def test_any_batch_gives_torchs_numbers(result, batch):
    for name, off in differences(result["file"], poses(batch)).items():
        assert off < 1e-5, name


@pytest.mark.parametrize("kind", ["none seen", "two seen", "not a number", "one point"])
def test_degenerate_poses_give_torchs_numbers(result, kind):
    reference, driven, weight, frame = poses(4)
    if kind == "none seen":
        weight[:] = 0
    elif kind == "two seen":
        weight[:, 2:] = 0
    elif kind == "not a number":
        driven[:, ::2], reference[1] = torch.nan, torch.nan
    else:
        driven[:], reference[2], weight[:] = 0.25, -0.5, 1  # sums are exact in any order
    for name, off in differences(result["file"], (reference, driven, weight, frame)).items():
        assert off < 1e-5, name


def test_the_file_says_what_it_is_and_nothing_of_this_machine(result):
    model = onnx.load(result["file"])
    onnx.checker.check_model(model)
    notes = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(notes["inputs"]) == list(INPUTS) == [i.name for i in model.graph.input]
    assert json.loads(notes["outputs"]) == list(OUTPUTS) == [o.name for o in model.graph.output]
    assert notes["opset"] == str(result["opset"]) == str(model.opset_import[0].version)
    assert notes["licence"].startswith("non-commercial use only")
    assert {key: notes[key] for key in ("name", "licence", "sha256")} == result["weights"]
    assert result["largest_difference"] < 1e-5
    content = Path(result["file"]).read_bytes()
    assert str(Path(__file__).parents[2]).encode() not in content
    assert b"alignment.py" not in content


def test_a_file_that_is_off_is_refused_and_leaves_nothing(tmp_path, result, monkeypatch):
    # As if torch's exporter had made a mistake: the file of other weights.
    model = onnx.load(result["file"])
    monkeypatch.setattr(onnx_export, "_model", lambda flat: model)
    path = tmp_path / "alignment.onnx"
    path.write_text("what was there before")
    with pytest.raises(WeightsError, match=r"is off by 0\.\d+.*nothing was written"):
        export_alignment(small_block(seed=1), path)
    assert [p.name for p in tmp_path.iterdir()] == ["alignment.onnx"]
    assert path.read_text() == "what was there before"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--model", "closed-form", "--out", "a.onnx"], "only weights are exported"),
        (["--model", "nowhere", "--out", "a.onnx"], "or a model folder"),
        (["--out", "model"], "expected a file named NAME.onnx"),
    ],
)
def test_what_cannot_be_exported_is_wrong_use(options, complaint, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["weights", "export-alignment", *options])
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err
