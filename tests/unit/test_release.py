"""A checkpoint becomes a model folder that `from_pretrained` takes, whole or in half precision."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_task import toy_config
from typer.testing import CliRunner

from animator.alignment import AlignmentBlock
from animator.config import AlignmentConfig, svd_xt
from animator.model import Animator
from animator.weights import load_alignment, save_model
from infra.cli import app
from pipelines.overrides import apply_overrides
from tests.unit.test_clips import write_shard
from tests.unit.test_motion import write_motion
from tests.unit.test_tasks import SMALL
from tests.validated_task import ValidatedConfig
from training.align import AlignConfig
from training.animate import AnimateConfig, _lasting_files
from training.checkpoint import ResumeError, checkpoint_name
from training.config import TrainConfig
from training.launch import train
from training.metrics import Quiet
from training.recipes import TASKS
from training.release import ExportError, export_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run of the alignment, with checkpoints at 64 and 96 samples."""
    folder = tmp_path_factory.mktemp("release")
    block = AlignmentConfig(width=16, num_heads=2, encoder_depth=1, fusion_depth=1)
    task = AlignConfig(motion=str(write_motion(folder / "motion")), block=block)
    config = with_task(task)
    train(config, folder / "out", progress=Quiet(), local=True)
    return folder / "out"


def with_task(task: object) -> TrainConfig:
    return dataclasses.replace(toy_config(samples=96), task=task)


def average(run: Path, samples: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / checkpoint_name(samples) / "ema.safetensors")


def test_newest_and_chosen_checkpoints_export_their_averaged_weights(run, tmp_path):
    for at, samples in ((None, 96), (64, 64)):
        target = tmp_path / f"model-{at}"
        result = export_checkpoint(run, target, TASKS, at=at)
        assert result["samples_seen"] == samples
        block = load_alignment(target)
        assert isinstance(block, AlignmentBlock)
        state = block.state_dict()
        assert all(state[name].equal(value) for name, value in average(run, samples).items())
        card = (target / "MODEL_CARD.md").read_text()
        assert f"{samples} in {samples // 8} steps" in card
    assert not list(tmp_path.glob(".*"))


def test_what_cannot_be_exported_is_said_with_what_can(run, tmp_path):
    with pytest.raises(ExportError, match="no checkpoint at 50 samples: expected one of 64, 96"):
        export_checkpoint(run, tmp_path / "model", TASKS, at=50)
    with pytest.raises(ExportError, match="nothing was validated"):
        export_checkpoint(run, tmp_path / "model", TASKS, at="best")
    with pytest.raises(ExportError, match="no folder of a training run"):
        export_checkpoint(tmp_path, tmp_path / "model", TASKS)
    with pytest.raises(ExportError, match="exists: give --out another"):
        export_checkpoint(run, run, TASKS)
    with pytest.raises(ExportError, match="leave --half out"):
        export_checkpoint(run, tmp_path / "model", TASKS, half=True)
    with pytest.raises(ResumeError, match="clip_weight"):
        export_checkpoint(run, tmp_path / "model", TASKS, settings=["task.clip_weight=0.5"])
    assert not list(tmp_path.iterdir())


def test_torn_checkpoint_is_passed_over(run, tmp_path):
    copy = tmp_path / "out"
    shutil.copytree(run, copy)
    (copy / "checkpoints" / checkpoint_name(96) / "ema.safetensors").write_bytes(b"torn")
    assert export_checkpoint(copy, tmp_path / "model", TASKS)["samples_seen"] == 64


def test_best_model_is_copied_without_data_at_hand(run, tmp_path):
    copy = tmp_path / "out"
    shutil.copytree(run, copy)
    shutil.copytree(copy / "model", copy / "best")
    metrics = {"samples_seen": 64, "loss": 0.5}
    (copy / "best" / "metrics.json").write_text(json.dumps(metrics))
    shutil.rmtree(copy / "checkpoints")
    result = export_checkpoint(copy, tmp_path / "model", TASKS, at="best")
    assert result["samples_seen"] == 64
    assert load_alignment(tmp_path / "model") is not None
    assert not (tmp_path / "model" / "metrics.json").exists()


def test_data_that_moved_is_named_by_a_setting_and_the_verb_says_what_it_wrote(run, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(run.parent / "motion", moved)
    copy = tmp_path / "out"
    shutil.copytree(run, copy)
    config = json.loads((copy / "config.json").read_text())
    config["task"]["motion"] = str(tmp_path / "gone")
    (copy / "config.json").write_text(json.dumps(config))
    arguments = ["train", "export", str(copy), "--at", "64", "--out", str(tmp_path / "model")]
    assert CliRunner().invoke(app, arguments).exit_code != 0
    done = CliRunner().invoke(app, [*arguments, "--set", f"task.motion={moved}", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["samples_seen"] == 64


def test_animator_in_half_precision_loads_and_keeps_its_values(tmp_path):
    shards, work = tmp_path / "shards", tmp_path / "work"
    shards.mkdir()
    work.mkdir()
    write_shard(shards, work, 0, {"long_000": 12})
    config = with_task(AnimateConfig(shards=str(shards), animator=SMALL))
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, samples=8))
    train(config, tmp_path / "out", progress=Quiet(), local=True)
    whole, half = tmp_path / "whole", tmp_path / "half"
    sizes = [
        export_checkpoint(tmp_path / "out", folder, TASKS, half=folder == half)["bytes"]
        for folder in (whole, half)
    ]
    assert sizes[1] < 0.75 * sizes[0]
    full, small = (Animator.from_pretrained(folder).state_dict() for folder in (whole, half))
    assert all(small[name].dtype == torch.float16 for name in full)
    assert all(torch.equal(small[name], value.half()) for name, value in full.items())


def test_frozen_weights_of_another_start_are_refused_and_a_moved_folder_is_taken(tmp_path):
    shards, work, out = tmp_path / "shards", tmp_path / "work", tmp_path / "out"
    shards.mkdir()
    work.mkdir()
    write_shard(shards, work, 0, {"long_000": 12})
    for seed, name in enumerate(("start", "other")):
        torch.manual_seed(seed)
        save_model(tmp_path / name, animator=(SMALL, Animator(SMALL).state_dict()))
    task = AnimateConfig(
        shards=str(shards), animator=SMALL, start=str(tmp_path / "start"), trainable="adapters"
    )
    short = with_task(task)
    short = dataclasses.replace(short, optim=dataclasses.replace(short.optim, samples=8))
    train(short, out, progress=Quiet(), local=True)

    other = [f"task.start={tmp_path / 'other'}"]
    with pytest.raises(ResumeError, match="belongs to other weights"):
        export_checkpoint(out, tmp_path / "model", TASKS, settings=other)
    (out / "summary.json").unlink()
    with pytest.raises(ResumeError, match=r"task\.start=DIR"):
        train(apply_overrides(short, other), out, progress=Quiet(), local=True)

    (tmp_path / "start").rename(tmp_path / "moved")
    moved = [f"task.start={tmp_path / 'moved'}"]
    export_checkpoint(out, tmp_path / "model", TASKS, settings=moved)
    assert (tmp_path / "model" / "config.json").is_file()

    (path,) = (out / "checkpoints").glob("samples-*/train.json")
    record = json.loads(path.read_text())
    del record["start"]  # as versions before wrote it
    path.write_text(json.dumps(record))
    export_checkpoint(out, tmp_path / "model-2", TASKS, settings=other)


def test_what_lasts_of_stable_video_diffusion_is_its_encoders_and_what_of_its_unet_is_frozen(
    tmp_path,
):
    for part in ("vae", "image_encoder", "unet"):
        name = "model" if part == "image_encoder" else "diffusion_pytorch_model"
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text("{}")
        (tmp_path / part / f"{name}.fp16.safetensors").write_bytes(part.encode())
    whole = AnimateConfig(animator=svd_xt(), start=str(tmp_path))
    low_rank = dataclasses.replace(whole, trainable="lora")
    assert {part for part, _ in _lasting_files(whole)} == {"vae", "image_encoder"}
    assert {part for part, _ in _lasting_files(low_rank)} == {"vae", "image_encoder", "unet"}
    assert all(path.suffix == ".safetensors" for _, path in _lasting_files(low_rank))
    assert not list(_lasting_files(dataclasses.replace(low_rank, start="")))


def test_task_types_of_other_modules_can_be_exported_too(tmp_path):
    config = with_task(ValidatedConfig())
    train(config, tmp_path / "out", progress=Quiet(), local=True)
    types = {ValidatedConfig.name: ValidatedConfig}
    export_checkpoint(tmp_path / "out", tmp_path / "model", types, at=96)
    assert (tmp_path / "model" / "model.safetensors").exists()
