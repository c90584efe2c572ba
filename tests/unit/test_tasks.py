"""What the tasks draw from clips: pure functions of sample numbers, held-out frames untouched."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from animator.config import AlignmentConfig, AnimatorConfig
from animator.model import Animator
from animator.similarity import apply, fit
from animator.weights import load_alignment, read_config
from pipelines.clips import ClipStore
from pipelines.motion import MotionStore
from pipelines.overrides import apply_overrides
from tests.unit.test_clips import FPS, write_shard
from tests.unit.test_motion import write_motion
from training.align import AlignConfig, AlignTask
from training.animate import AnimateConfig, AnimateTask, trained_frames
from training.recipes import RECIPES, TASKS, get_recipe

SMALL = AnimatorConfig(
    height=64,
    width=64,
    num_frames=3,
    block_out_channels=(32, 32),
    num_attention_heads=(1, 1),
    cross_attention_dim=32,
    face_encoder_depth=1,
)
SAMPLES = range(20)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, work = tmp_path_factory.mktemp("shards"), tmp_path_factory.mktemp("work")
    write_shard(folder, work, 0, {"long_000": 40, "short_000": 2})
    return folder


def animate_task(shards: Path, **changes) -> AnimateTask:
    config = dataclasses.replace(AnimateConfig(shards=str(shards), animator=SMALL), **changes)
    return config.build_task(seed=3)


def test_a_batch_depends_on_its_samples_alone(shards):
    one = animate_task(shards).batch(list(SAMPLES))
    other = animate_task(shards)
    other.batch([7])
    for sample in (0, 13):
        alone = other.batch([sample])
        for key, value in alone.items():
            assert torch.equal(value[0], one[key][sample]), key


def test_held_out_frames_are_never_drawn_and_the_reference_lies_outside(shards):
    task = animate_task(shards, holdout_tail=0.5, frame_strides=(1, 4))
    long = ClipStore(shards).index("long_000")
    strides = set()
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        _, chosen, reference, stride = task.examples.choose(long, generator)
        strides.add(stride)
        assert chosen.max() < trained_frames(40, 0.5)
        assert 0 <= reference < trained_frames(40, 0.5)
        assert not chosen[0] <= reference <= chosen[-1]
        assert (np.diff(chosen) == stride).all()
    assert strides == {1, 4}


def test_clips_shorter_than_a_window_hold_their_last_frame(shards):
    task = animate_task(shards)
    short = task.examples.clips.index("short_000")
    _, chosen, reference, stride = task.examples.choose(short, torch.Generator().manual_seed(0))
    assert chosen.tolist() == [0, 1, 1]
    assert reference in (0, 1)
    assert stride == 1


def test_the_rate_given_to_the_model_follows_the_stride(shards):
    rates = {
        float(rate) for rate in animate_task(shards, frame_strides=(2,)).batch(list(SAMPLES))["fps"]
    }
    assert rates == {FPS / 2, FPS}  # the short clip has no stride of two


def test_loss_is_finite_and_falls_on_one_batch(shards):
    torch.manual_seed(0)
    task = animate_task(shards)
    model = task.build()
    batch = task.batch([0, 1, 2, 3])
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        loss, _numbers = task.loss(model, batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.7 * losses[0]


def test_the_face_mask_raises_the_loss_only_where_faces_are(shards):
    task = animate_task(shards)
    torch.manual_seed(0)
    model = task.build()
    batch = task.batch([0, 2])
    plain, _ = task.loss(model, {**batch, "face_mask": batch["face_mask"] * 0})
    masked, _ = task.loss(model, {**batch, "face_mask": torch.ones_like(batch["face_mask"])})
    torch.testing.assert_close(masked, 4 * plain, rtol=1e-4, atol=0)


def test_released_model_records_its_data_and_takes_the_alignment_in(shards, tmp_path):
    aligner = AlignConfig(
        shards=str(shards), block=AlignmentConfig(width=32, num_heads=4)
    ).build_task(seed=0)
    aligner.save_model(aligner.build().state_dict(), tmp_path / "alignment")
    task = animate_task(shards, alignment=str(tmp_path / "alignment"))
    task.save_model(task.build().state_dict(), tmp_path / "model")
    assert Animator.from_pretrained(tmp_path / "model").config == SMALL
    assert load_alignment(tmp_path / "model") is not None
    about = read_config(tmp_path / "model")
    assert about["trained_on"]["animator"]["data"] == task.fingerprint
    assert about["sampling"]["steps"] == task.config.sampling.steps


def test_alignment_pairs_are_misaligned_versions_of_real_poses(shards):
    config = AlignConfig(shards=str(shards), hide_joints=0.0, joint_noise=0.0, wide=0.0)
    task = config.build_task(seed=0)
    assert isinstance(task, AlignTask)
    batch = task.batch(list(SAMPLES))
    assert batch["reference"].shape == (20, 18, 2)
    # In these clips every joint is at the frame's centre, which a similarity only shifts.
    assert batch["target"].abs().max() == 0
    assert 0 < batch["driven"].abs().max() <= 0.25
    assert torch.equal(batch["driven"], task.batch(list(SAMPLES))["driven"])


def test_alignment_pairs_from_motion_depend_on_their_samples_alone(tmp_path):
    motion = write_motion(tmp_path / "motion")
    config = AlignConfig(motion=str(motion))
    task = config.build_task(seed=0)
    whole, again = task.batch(range(64)), config.build_task(seed=0).batch([40, 7])
    for key, value in again.items():
        assert torch.equal(value, whole[key][[40, 7]]), key
    assert not torch.equal(config.build_task(seed=1).batch([7])["driven"], again["driven"][1:])
    assert task.num_samples == MotionStore(motion).num_frames
    assert task.fingerprint == MotionStore(motion).fingerprint
    # Two different frames of one clip, and a similarity between the driven pose and the truth.
    poses = torch.cat([whole["reference"][:, None], whole["target"]], 1)
    apart = (poses[:, :, None] - poses[:, None]).abs().amax((3, 4)) + torch.eye(3)
    assert apart.min() > 1e-3
    # One misalignment for all driven frames of an example, and for some none.
    seen = torch.ones(64, 2, 18)
    found = fit(whole["moved"], whole["target"], seen)
    torch.testing.assert_close(found.scale, found.scale[:, :1].expand(-1, 2), atol=1e-3, rtol=0)
    none = (whole["moved"] == whole["target"]).all((1, 2, 3))
    assert 0 < none.sum() < 20
    wide = (found.scale[:, 0].log().abs() > 1.01 * math.log(2)) | (found.degrees[:, 0].abs() > 31)
    assert 0 < wide.sum() < 20
    back = apply(found, whole["moved"])
    torch.testing.assert_close(back, whole["target"], atol=1e-4, rtol=0)
    assert (whole["weight"] == 0).any()
    assert (whole["weight"] == 1).any()


def test_the_camera_of_motion_is_a_setting(tmp_path):
    motion = write_motion(tmp_path / "motion")
    config = apply_overrides(
        AlignConfig(motion=str(motion)),
        ["camera.full_body=1", "camera.walk=0", "camera.perfect=1", "misalignment.rotation=0"],
    )
    batch = config.build_task(seed=0).batch(range(50))
    assert (batch["weight"] == 1).all()
    assert (batch["visible"] == 1).all()
    turned = fit(batch["moved"], batch["target"], batch["weight"]).degrees
    assert turned.abs().max() < 0.1


def test_alignment_learns_from_motion_and_records_its_licences(tmp_path):
    motion = write_motion(tmp_path / "motion")
    block = AlignmentConfig(width=16, num_heads=2, encoder_depth=1, fusion_depth=1)
    task = AlignConfig(motion=str(motion), block=block).build_task(seed=0)
    torch.manual_seed(0)
    model = task.build()
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    ratios = []
    clip_ratios = []
    for step in range(40):
        loss, numbers = task.loss(model, task.batch(range(32 * step, 32 * step + 32)))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        ratios.append((numbers["distance"] / numbers["distance_closed_form"]).item())
        clip_ratios.append((numbers["distance_clip"] / numbers["distance_closed_form"]).item())
    assert ratios[0] == pytest.approx(1)
    assert np.mean(ratios[-10:]) < 0.97 * np.mean(ratios[:5])
    assert np.mean(clip_ratios[-10:]) < 0.97 * np.mean(clip_ratios[:5])
    assert clip_ratios[0] < 1  # two frames together know more than one
    task.save_model(model.state_dict(), tmp_path / "model")
    about = read_config(tmp_path / "model")["trained_on"]["alignment"]
    assert about["data"] == task.fingerprint
    assert list(about["motion"]) == ["CC BY-NC 4.0 (Bandai-Namco Research Motion Dataset)"]


def test_alignment_takes_shards_or_motion(shards, tmp_path):
    both = AlignConfig(shards=str(shards), motion=str(write_motion(tmp_path / "motion")))
    with pytest.raises(ValueError, match="one of them"):
        both.build_task(seed=0)
    with pytest.raises(ValueError, match=r"task\.motion=DIR"):
        AlignConfig().build_task(seed=0)
    with pytest.raises(ValueError, match="clip_frames"):
        dataclasses.replace(both, shards="", clip_frames=2).build_task(seed=0)
    for wrong in ({"aligned": 2}, {"wide": -1}, {"aligned": 0.6, "wide": 0.6}):
        with pytest.raises(ValueError, match=r"task\.(aligned|wide)"):
            AlignConfig(**wrong)


def test_the_reference_may_be_of_a_person_with_other_limbs(tmp_path):
    motion = str(write_motion(tmp_path / "motion"))
    settings = ["camera.perfect=1", "camera.walk=0", "camera.full_body=1", "camera.limbs=0.2"]

    def limb_lengths(chance: float) -> torch.Tensor:
        """Of the thighs in the reference against the driven frames, `(B,)`."""
        config = apply_overrides(AlignConfig(motion=motion), settings)
        config = dataclasses.replace(
            config, camera=dataclasses.replace(config.camera, other_person=chance)
        )
        batch = config.build_task(seed=0).batch(range(64))
        arms = [(p[..., 2, :] - p[..., 5, :]).norm(dim=-1) for p in poses(batch)]
        spans = [(p[..., 1, :] - p[..., 8, :]).norm(dim=-1) for p in poses(batch)]
        return (arms[0] / spans[0]) / (arms[1] / spans[1]).mean(1)

    def poses(batch):
        return batch["reference"], batch["target"]

    spread = [float(limb_lengths(chance).log().std()) for chance in (0.0, 1.0)]
    assert spread[1] > 1.1 * spread[0]


def test_tasks_without_shards_say_what_to_give():
    for config in (AlignConfig(), AnimateConfig()):
        with pytest.raises(ValueError, match=r"task\.shards=DIR"):
            config.build_task(seed=0)


def test_recipes_are_complete_and_unknown_names_are_corrected():
    for name in RECIPES:
        recipe = get_recipe(name)
        assert name.startswith(recipe.task.name)
        assert TASKS[recipe.task.name] is type(recipe.task)
    with pytest.raises(ValueError, match="Did you mean animator_tiny"):
        get_recipe("animator_tyni")


def test_low_rank_training_releases_a_plain_model_and_the_small_file(shards, tmp_path):
    task = animate_task(shards, trainable="lora", lora_rank=2, lora_alpha=4.0)
    torch.manual_seed(0)
    model = task.build()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(weights, lr=1e-2)
    loss, _ = task.loss(model, task.batch([0]))
    loss.backward()
    optimiser.step()
    task.save_model(model.state_dict(), tmp_path / "model")
    plain = Animator.from_pretrained(tmp_path / "model")
    batch = task.batch([1])
    assert task.loss(plain, batch)[0].item() == pytest.approx(task.loss(model, batch)[0].item())
    with safe_open(tmp_path / "model" / "lora.safetensors", framework="pt") as file:
        assert file.metadata() == {"rank": "2", "alpha": "4.0"}
        names = set(file.keys())
    assert names
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    start = animate_task(shards, start=str(tmp_path / "model")).build()
    assert sum(p.requires_grad for p in start.parameters()) > 0


def test_what_is_trained_and_recomputed_is_a_setting(shards):
    torch.manual_seed(0)
    every = animate_task(shards).build()
    torch.manual_seed(0)
    task = animate_task(shards, trainable="adapters", recompute=1.0, face_gradient_limit=1.0)
    model = task.build()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if name.startswith("unet.")} == {
        name for name in trained if "id_to_" in name
    }
    assert model.face_gradient_limit == 1.0
    assert every.face_gradient_limit is None
    batch = task.batch([0, 1])
    losses = [float(task.loss(each, batch)[0]) for each in (model, every)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert 0 < task.flops < animate_task(shards).flops


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"drop_pose": 1.5}, "drop_pose 1.5"),
        ({"recompute": -1}, "recompute -1"),
        ({"lora_rank": 0}, "lora_rank 0"),
        ({"framing": "stretch"}, "pad, crop"),
        ({"face_gradient_limit": -1.0}, "face_gradient_limit"),
        ({"holdout_tail": 1.0}, "holdout_tail"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        AnimateConfig(**wrong)
