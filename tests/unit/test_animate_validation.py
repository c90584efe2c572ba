"""Validation of checkpoints on held-out frames and poses: metrics, videos, sheets."""

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from animator.config import AlignmentConfig
from inference.sampler import SamplerConfig
from pipelines.schema import shard_name
from pipelines.video import probe
from tests.unit.encode_shards import moving_stripes, write_clips
from tests.unit.fashion_shards import write_fashion
from tests.unit.test_animate_examples import FACE, SMALL
from training.align import AlignConfig
from training.animate import AnimateConfig, AnimateTask, trained_frames
from training.animate_validation import fixed_sigmas, held_out_examples, held_out_windows

CPU = torch.device("cpu")
METRICS = {
    "loss",
    "loss_face",
    *(f"loss_sigma_q{quarter}" for quarter in range(4)),
    *(f"{name}{where}" for name in ("psnr", "ssim") for where in ("", "_person")),
    "psnr_person_repeat",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shards"
    clips = {f"{name}_000": moving_stripes(12, i) for i, name in enumerate(("aa", "bb", "cc"))}
    write_clips(folder, shard_name(0), clips, faces=FACE, damaged=["bb_000"])
    return folder


def task_of(source: Path, **changes) -> AnimateTask:
    sampling = SamplerConfig(steps=2, sigma_min=0.02, sigma_max=80.0)
    config = AnimateConfig(shards=str(source), animator=SMALL, sampling=sampling)
    return dataclasses.replace(config, **changes).build_task(seed=3)


def trained(task: AnimateTask, steps: int) -> torch.nn.Module:
    torch.manual_seed(0)
    model = task.build()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(weights, lr=2e-3)
    for _ in range(steps):
        loss, _numbers = task.loss(model, task.batch([0, 1]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model


def test_a_better_model_has_a_lower_loss_on_frames_it_never_saw(source, tmp_path):
    task = task_of(source, holdout_tail=0.3)
    model = trained(task, 0)
    before = task.validate(model, tmp_path / "before", CPU, clips=2)
    again = task_of(source, holdout_tail=0.3).validate(model, tmp_path / "again", CPU, clips=2)
    assert model.training
    assert again == before
    after = task.validate(trained(task, 10), tmp_path / "after", CPU, clips=2)
    for found in (before, after):
        assert set(found) == METRICS
        assert np.isfinite(list(found.values())).all()
    assert after["loss"] < 0.9 * before["loss"]
    # One video for each clip that can be read, and what was shown of both on one sheet.
    videos = sorted(path.name for path in (tmp_path / "after").glob("*.mp4"))
    assert videos == ["aa_000.mp4", "cc_000.mp4"]
    assert probe(tmp_path / "after" / videos[0]).width == 4 * 64
    sheet = cv2.imread(str(tmp_path / "after" / "contact.png"))
    assert sheet.shape == (2 * 3 * 256, 4 * 256, 3)


def test_a_run_that_does_not_weigh_faces_is_measured_like_one_that_does(source, tmp_path):
    weighed, plain = (task_of(source, holdout_tail=0.3, face_mask=on) for on in (True, False))
    model, batch = trained(weighed, 0), weighed.batch([0])
    assert weighed.loss(model, batch)[0] > plain.loss(model, batch)[0]
    found = [task.validate(model, tmp_path / "out", CPU, clips=1) for task in (weighed, plain)]
    assert found[0] == found[1]


def test_windows_are_of_held_out_frames_alone(source):
    task = task_of(source, holdout_tail=0.3, frame_strides=(4, 1))
    examples = held_out_examples(task)
    assert examples is not None
    windows = list(held_out_windows(examples, 3))
    assert [examples.clips.keys[window.index] for window in windows] == ["aa_000", "cc_000"]
    for window in windows:
        assert window.chosen.tolist() == [9, 10, 11]
        assert window.reference < trained_frames(12, 0.3)
    assert [key for key, _ in examples.problems()] == ["bb_000"]


def test_clips_held_out_whole_are_used_and_nothing_held_out_gives_nothing(source, tmp_path):
    assert task_of(source).validate(torch.nn.Identity(), tmp_path, CPU, clips=2) == {}
    write_clips(tmp_path / "other", shard_name(0), {"dd_000": moving_stripes(9, 5)}, faces=FACE)
    task = task_of(source, validation=str(tmp_path / "other"), frame_strides=(2,))
    examples = held_out_examples(task)
    assert examples is not None
    (window,) = held_out_windows(examples, 3)
    assert window.chosen.tolist() == [4, 6, 8]
    found = task.validate(trained(task, 0), tmp_path / "out", CPU, clips=3)
    assert set(found) == METRICS
    assert (tmp_path / "out" / "dd_000.mp4").exists()


def test_noise_levels_of_validation_lie_in_each_quarter(source):
    for law in ("lognormal", "cosine"):
        config = task_of(source, sigma=law).config
        found = torch.bucketize(fixed_sigmas(config), config.sigma_quartiles())
        assert found.tolist() == [0, 1, 2, 3]


@pytest.mark.real_data
def test_alignment_is_measured_on_held_out_poses(data_root, tmp_path):
    source = write_fashion(data_root, tmp_path / "shards")
    block = AlignmentConfig(width=16, num_heads=2, encoder_depth=1, fusion_depth=1)
    config = AlignConfig(shards=str(source), block=block, holdout_tail=0.4)
    task = config.build_task(seed=0)
    torch.manual_seed(0)
    found = task.validate(task.build(), tmp_path / "out", CPU, clips=2)
    assert set(found) == {"loss", "dis_none", "dis_similarity", "dis_learned", "dis_learned_clip"}
    # An untrained block is the closed form.
    assert found["dis_learned"] == pytest.approx(found["dis_similarity"])
    assert found["dis_similarity"] < 0.5 * found["dis_none"]
    assert cv2.imread(str(tmp_path / "out" / "contact.png")).shape == (2 * 256, 4 * 256, 3)
    pairs = config.held_out_pairs()
    assert pairs is not None
    held_out = {tuple(point) for i in range(2) for point in pairs.poses(i)[0][:, 0].tolist()}
    seen = {tuple(point) for i in range(2) for point in task.pairs.poses(i)[0][:, 0].tolist()}
    assert len(held_out) == 16
    assert not held_out & seen
    plain = AlignConfig(shards=str(source), block=block).build_task(seed=0)
    assert plain.validate(plain.build(), tmp_path / "none", CPU, clips=2) == {}
