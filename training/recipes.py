"""Recipes: functions that return a complete training configuration.

The command line picks one by name and overrides settings with `--set a.b=c`.
"""

import difflib
from collections.abc import Callable

from animator.config import svd_xt
from inference.sampler import SamplerConfig
from pipelines.motion_camera import CameraConfig
from training.align import AlignConfig
from training.animate import AnimateConfig
from training.config import (
    BatchConfig,
    CheckpointConfig,
    EmaConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)

TASKS: dict[str, type] = {AlignConfig.name: AlignConfig, AnimateConfig.name: AnimateConfig}


def alignment_tiny() -> TrainConfig:
    """The alignment block in about five minutes on two CPU cores."""
    return TrainConfig(
        task=AlignConfig(),
        optim=OptimConfig(
            samples=128_000, lr=3e-3, schedule="cosine", final_lr=0.01, warmup_samples=6400
        ),
        batch=BatchConfig(global_batch=128, micro_batch=64),
        ema=EmaConfig(half_life=4_000),
        checkpoint=CheckpointConfig(every_samples=32_000),
        run=RunConfig(num_workers=2),
    )


def alignment_demo() -> TrainConfig:
    """A small alignment block in about a minute, for the demonstration."""
    base = alignment_tiny()
    return TrainConfig(
        task=AlignConfig(),
        optim=OptimConfig(
            samples=38_400, lr=3e-3, schedule="cosine", final_lr=0.01, warmup_samples=1920
        ),
        batch=base.batch,
        ema=EmaConfig(half_life=1_200),
        checkpoint=CheckpointConfig(every_samples=19_200),
        run=RunConfig(num_workers=2),
    )


def alignment_motion() -> TrainConfig:
    """The alignment block from motion capture: what the shipped weights come from.

    Half an hour on two CPU cores. Most examples are what most clips are: whole people who hardly
    leave their place, as in the published training videos of a minute; the others are half
    bodies, close-ups, walkers, and what detectors miss.
    """
    camera = CameraConfig(
        span=(30.0, 60.0),
        full_body=0.85,
        fill=(0.55, 0.95),
        walk=0.05,
        other_person=0.15,
        perfect=0.6,
    )
    return TrainConfig(
        task=AlignConfig(camera=camera, aligned=0.05, wide=0.05, clip_weight=0.25),
        optim=OptimConfig(
            samples=1_200_000, lr=2.5e-3, schedule="cosine", final_lr=0.005, warmup_samples=12_800
        ),
        batch=BatchConfig(global_batch=128, micro_batch=64),
        ema=EmaConfig(half_life=12_000),
        checkpoint=CheckpointConfig(every_samples=128_000),
        run=RunConfig(num_workers=2),
    )


def animator_tiny() -> TrainConfig:
    """The whole animator on one person's clips in about a quarter of an hour on two CPU cores."""
    return TrainConfig(
        task=AnimateConfig(),
        optim=OptimConfig(
            samples=1_800,
            lr=1e-3,
            betas=(0.9, 0.99),
            schedule="cosine",
            final_lr=0.02,
            warmup_samples=100,
        ),
        batch=BatchConfig(global_batch=2, micro_batch=1),
        ema=EmaConfig(half_life=120),
        checkpoint=CheckpointConfig(every_samples=600),
        run=RunConfig(num_workers=2),
    )


def animator_demo() -> TrainConfig:
    """The animator of the demonstration: fewer steps, about six minutes."""
    base = animator_tiny()
    return TrainConfig(
        task=AnimateConfig(),
        optim=OptimConfig(
            samples=720,
            lr=1e-3,
            betas=(0.9, 0.99),
            schedule="cosine",
            final_lr=0.02,
            warmup_samples=60,
        ),
        batch=base.batch,
        ema=EmaConfig(half_life=60),
        checkpoint=CheckpointConfig(every_samples=360),
        run=RunConfig(num_workers=2),
    )


def animator_svd_xt() -> TrainConfig:
    """The published sizes, learning rate and clips, on eight GPUs of 80 GB."""
    return TrainConfig(
        task=AnimateConfig(
            animator=svd_xt(),
            frame_strides=(4,),
            sampling=SamplerConfig(),
            sigma_mean=0.7,  # of Stable Video Diffusion itself
            drop_image_token=0.2,
            drop_reference=0.2,
            gradient_checkpointing=True,
        ),
        optim=OptimConfig(samples=100_000, lr=1e-5, warmup_samples=4_000),
        batch=BatchConfig(global_batch=8),
        checkpoint=CheckpointConfig(every_samples=8_000),
        run=RunConfig(num_workers=8, use_gpu=True, precision="bf16"),
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        alignment_tiny,
        alignment_demo,
        alignment_motion,
        animator_tiny,
        animator_demo,
        animator_svd_xt,
    )
}


def get_recipe(name: str) -> TrainConfig:
    """The complete configuration of a recipe.

    Raises:
        ValueError: for an unknown name; names the nearest one.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"There is no recipe {name!r}; there are {', '.join(RECIPES)}.{hint}")
    return RECIPES[name]()
