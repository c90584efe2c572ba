"""Checkpoints are validated beside training; neither a failure nor a kill of it harms the run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.validated_task import validated_config
from training.checkpoint import checkpoint_name
from training.launch import train
from training.metrics import Quiet, read_metrics
from training.release import averaged_model
from training.validate import watching_checkpoints
from training.validate_checkpoint import is_best, read_validations


class Notes(Quiet):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def watched(config, out: Path, **options) -> list[str]:
    """What is said while what lies in the folder is validated."""
    notes = Notes()
    with watching_checkpoints(config, out, None, notes, local=True, workers=1, **options):
        pass
    return notes.texts


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> tuple[Path, list[str]]:
    """A run of three checkpoints; the validation of the second one fails."""
    out, notes = tmp_path_factory.mktemp("validated") / "out", Notes()
    train(validated_config(fails_at=64), out, progress=notes, local=True)
    return out, notes.texts


@pytest.fixture
def run(whole_run, tmp_path) -> Path:
    """A finished training of which nothing is validated."""
    out = tmp_path / "out"
    shutil.copytree(whole_run[0], out)
    shutil.rmtree(out / "validation")
    shutil.rmtree(out / "best")
    return out


def test_averaged_weights_of_the_checkpoints_are_validated_and_a_failure_is_a_note(whole_run):
    out, texts = whole_run
    found = read_validations(out)
    assert found[-1]["samples_seen"] == 96  # the last one always is
    assert 64 not in [entry["samples_seen"] for entry in found]
    failed = "Validation at 64 samples failed: RuntimeError: the validation does not work"
    assert failed in texts or found == found[-1:]  # training may be over before it is looked at
    config = validated_config()
    task = config.build_task()
    for entry in found:
        folder = out / "checkpoints" / checkpoint_name(entry["samples_seen"])
        model = averaged_model(config, task, load_file(folder / "ema.safetensors"))
        with torch.no_grad():
            loss = task.loss(model, task.batch(range(10_000, 10_016)))[0].item()
        assert entry["loss"] == pytest.approx(loss, abs=1e-7)
        assert entry["never"] is None
        folder = out / "validation" / checkpoint_name(entry["samples_seen"])
        assert {path.name for path in folder.iterdir()} == {"metrics.json", "contact.png"}
    assert not list((out / "validation").glob(".*"))


def test_best_model_is_kept_with_its_metrics(whole_run):
    out, texts = whole_run
    best = min(read_validations(out), key=lambda entry: entry["loss"])
    kept = json.loads((out / "best" / "metrics.json").read_text())
    assert kept["samples_seen"] == best["samples_seen"]
    folder = out / "checkpoints" / checkpoint_name(kept["samples_seen"])
    average = load_file(folder / "ema.safetensors")
    released = load_file(out / "best" / "model.safetensors")
    assert all(released[name].equal(value) for name, value in average.items())
    card = (out / "best" / "MODEL_CARD.md").read_text()
    assert "## Validation" in card
    assert f"| loss | {best['loss']:.4g} |" in card
    assert any("(best so far)" in text for text in texts)


def test_best_is_judged_by_the_metric_and_its_direction():
    config = validated_config(metric="psnr", higher_is_better=True).validate
    others = [{"psnr": 20.0}, {"psnr": None}, {}]
    assert is_best(config, {"psnr": 21.0}, others)
    assert not is_best(config, {"psnr": 19.0}, others)
    assert not is_best(config, {"psnr": 20.0}, others)
    assert not is_best(config, {"psnr": None}, [])
    assert is_best(validated_config().validate, {"loss": 0.1}, [{"loss": 0.2}])


def test_what_a_killed_driver_left_is_taken_up(run):
    left = run / "validation" / f".{checkpoint_name(96)}"
    left.mkdir(parents=True)
    shutil.copy(run / "checkpoints" / checkpoint_name(96) / "ema.safetensors", left)
    torn = run / "validation" / f".{checkpoint_name(64)}"
    torn.mkdir()
    shutil.rmtree(run / "checkpoints")  # gone since, in favour of newer ones
    texts = watched(validated_config(metric="fvd"), run)
    assert [entry["samples_seen"] for entry in read_validations(run)] == [96]
    assert not torn.exists()
    assert texts[1] == (
        "validate.metric is 'fvd', expected one of loss, never: no model is kept as the best."
    )
    assert not (run / "best").exists()


def test_a_kill_after_the_last_step_leaves_a_validation_to_the_next_start(run):
    (run / "summary.json").unlink()
    summary = train(validated_config(every=1000), run, progress=Quiet(), local=True)
    assert summary.samples_seen == 96
    assert [entry["samples_seen"] for entry in read_validations(run)] == [96]
    assert (run / "best" / "model.safetensors").exists()


def test_validation_that_is_too_slow_keeps_neither_the_end_nor_disks_waiting(run):
    for number in range(1, 6):
        name = checkpoint_name(96 + 32 * number)
        shutil.copytree(run / "checkpoints" / checkpoint_name(96), run / "checkpoints" / name)
    texts = watched(validated_config(takes=60.0), run, patience=1.0)
    assert any("takes too long" in text for text in texts)
    assert any("are not validated" in text for text in texts)
    assert len(list((run / "validation").glob(".samples-*/ema.safetensors"))) <= 3


def test_only_what_crosses_a_multiple_is_validated_and_nothing_where_nothing_is_held_out(run):
    texts = watched(validated_config(every=1000, holds_out=False), run)
    assert texts == ["Nothing is validated: this task holds no data out."]
    assert [entry["samples_seen"] for entry in read_validations(run)] == [96]
    assert not (run / "best").exists()


def test_without_validation_training_is_the_same(whole_run, tmp_path):
    train(validated_config(every=0), tmp_path / "out", progress=Quiet(), local=True)
    both = (read_metrics(out / "metrics.jsonl") for out in (whole_run[0], tmp_path / "out"))
    with_, without = ([record["loss"] for record in records] for records in both)
    assert with_ == without
    assert not (tmp_path / "out" / "validation").exists()
