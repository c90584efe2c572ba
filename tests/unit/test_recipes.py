"""Recipes: each is complete, does what its name says, and can be changed by one flag."""

import pytest

from pipelines.overrides import apply_overrides
from training.animate_config import AnimateConfig
from training.config import TrainConfig
from training.recipes import RECIPES, TASKS, get_recipe, gpu_recipes


def animator(name: str, *settings: str) -> tuple[TrainConfig, AnimateConfig]:
    config = apply_overrides(get_recipe(name), list(settings))
    assert isinstance(config.task, AnimateConfig)
    return config, config.task


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_it_is_for_and_divides_its_batch(name: str) -> None:
    config = get_recipe(name)
    assert (RECIPES[name].__doc__ or "").strip()
    assert type(config.task) is TASKS[config.task.name]
    assert name.startswith(config.task.name)
    assert config.accumulation(config.run.num_workers) >= 1
    assert config.optim.samples > config.optim.warmup_samples
    assert config.checkpoint.every_samples <= config.optim.samples


@pytest.mark.parametrize("name", gpu_recipes())
def test_recipes_for_gpus_have_what_long_runs_need(name: str) -> None:
    config, task = animator(name)
    assert (config.run.precision, config.run.zero_stage, config.optim.clip) == ("bf16", 2, 1.0)
    assert config.ema.half_life > 0
    assert config.optim.warmup_samples > 0
    assert task.recompute == 1.0
    assert config.validate.every_samples > 0
    assert config.validate.every_samples % config.checkpoint.every_samples == 0
    assert config.checkpoint.keep_best == 1


@pytest.mark.parametrize("size", ["512", "576x1024"])
@pytest.mark.parametrize("gpus", [1, 8, 32])
def test_published_sizes_come_for_one_node_and_for_four(size: str, gpus: int) -> None:
    config, task = animator(f"animator_{size}_{gpus}gpu")
    assert config.run.num_workers == gpus
    assert (task.animator.height, task.animator.width) == {
        "512": (512, 512),
        "576x1024": (576, 1024),
    }[size]
    assert config.batch.global_batch == max(8, gpus)
    assert (task.drop_image_token, task.drop_reference) == (0.2, 0.2)
    assert (task.frame_strides, task.animator.num_frames, task.sigma) == ((4,), 16, "cosine")


def test_the_published_rate_is_that_of_the_published_batch() -> None:
    rates = {g: get_recipe(f"animator_512_{g}gpu").optim.lr for g in (1, 8, 32)}
    assert rates == {1: 1e-5, 8: 1e-5, 32: pytest.approx(2e-5)}


def test_mixed_sizes_are_buckets_and_low_rank_updates_fit_one_worker() -> None:
    assert animator("animator_mixed_8gpu")[1].sizes() == ((512, 512), (576, 1024))
    config, task = animator("animator_lora_24gb")
    assert (task.trainable, config.run.num_workers) == ("lora", 1)
    assert config.optim.lr > get_recipe("animator_512_1gpu").optim.lr


@pytest.mark.parametrize(
    ("flag", "changed"),
    [
        ("task.face_mask=false", lambda task: task.face_mask is False),
        (
            "task.animator.face_encoder=projection",
            lambda task: task.animator.face_encoder == "projection",
        ),
        ("task.animator.id_adapter=addition", lambda task: task.animator.id_adapter == "addition"),
        ("task.pose_augmentation=aligned", lambda task: task.pose_augmentation == "aligned"),
        ("task.trainable=attentions", lambda task: task.trainable == "attentions"),
    ],
)
def test_each_ablation_is_one_flag(flag: str, changed) -> None:
    for name in ("animator_smoke", "animator_mixed_8gpu"):
        assert changed(animator(name, flag)[1])
        assert not changed(animator(name)[1])


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="Did you mean animator_512_8gpu"):
        get_recipe("animator_512_8gpus")
