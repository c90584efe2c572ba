"""Recipes: functions that return a complete training configuration.

The command line picks one by name and overrides settings with `--set a.b=c`.
"""

import difflib
from collections.abc import Callable
from dataclasses import replace

from animator.config import svd_xt
from animator.face_gradient import FACE_GRADIENT_LIMIT
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
    ValidateConfig,
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


def animator_smoke() -> TrainConfig:
    """Every part of a run in about a minute on a CPU: checkpoint, validation, recomputation."""
    return TrainConfig(
        task=AnimateConfig(holdout_tail=0.2, drop_face=0.1, drop_pose=0.1, recompute=1.0),
        optim=OptimConfig(samples=40, lr=1e-3, warmup_samples=8),
        batch=BatchConfig(global_batch=2),
        ema=EmaConfig(half_life=10),
        checkpoint=CheckpointConfig(every_samples=20),
        validate=ValidateConfig(every_samples=20, clips=1),
        run=RunConfig(log_every=2),
    )


def animator_512_1gpu() -> TrainConfig:
    """512x512 on one GPU of 80 GB: the batch of the paper's eight GPUs, one clip after another."""
    return _published("512x512", gpus=1)


def animator_512_8gpu() -> TrainConfig:
    """512x512 on one node of eight GPUs."""
    return _published("512x512", gpus=8)


def animator_512_32gpu() -> TrainConfig:
    """512x512 on four nodes of eight GPUs."""
    return _published("512x512", gpus=32)


def animator_576x1024_1gpu() -> TrainConfig:
    """576x1024 on one GPU of 80 GB."""
    return _published("576x1024", gpus=1)


def animator_576x1024_8gpu() -> TrainConfig:
    """576x1024 on one node of eight GPUs."""
    return _published("576x1024", gpus=8)


def animator_576x1024_32gpu() -> TrainConfig:
    """576x1024 on four nodes of eight GPUs."""
    return _published("576x1024", gpus=32)


def animator_mixed_8gpu() -> TrainConfig:
    """Both published sizes, one of them a step, on eight GPUs: what the published model is."""
    return _published("512x512", "576x1024", gpus=8)


def animator_lora_24gb() -> TrainConfig:
    """Low-rank updates of the attention at 512x512 on one GPU of 24 GB, for one's own people.

    PoseNet, Face Encoder and ID adapters are trained whole: start from a trained model.
    """
    base = _published("512x512", gpus=1)
    return replace(
        base,
        task=replace(base.task, trainable="lora"),
        optim=OptimConfig(samples=8_000, lr=1e-4, warmup_samples=400),
        ema=replace(base.ema, half_life=1_000),
        checkpoint=CheckpointConfig(every_samples=800),
        validate=replace(base.validate, every_samples=800),
    )


def _published(*sizes: str, gpus: int) -> TrainConfig:
    """The second stage as published: UNet, Face Encoder and PoseNet, one clip a GPU.

    The paper's: learning rate, eight clips a step, what is trained. Its first version's: noise
    levels, frames and stride, dropped conditions, AdamW (its defaults here). Ours, published
    nowhere: clipping, averaging, warm-up, dropped face and pose, the limit on the face's gradient.

    Args:
        sizes: HEIGHTxWIDTH; the last is the model's own, more than one are buckets.
    """
    height, width = map(int, sizes[-1].split("x"))
    clips = max(8, gpus)  # one GPU takes the eight clips of a step in turn
    return TrainConfig(
        task=AnimateConfig(
            animator=replace(svd_xt(), height=height, width=width),
            buckets=sizes if len(sizes) > 1 else (),
            frame_strides=(4,),
            sigma="cosine",
            drop_image_token=0.2,
            drop_reference=0.2,
            drop_face=0.1,  # so that a guidance of its own is possible for each
            drop_pose=0.1,
            face_gradient_limit=FACE_GRADIENT_LIMIT,  # an untrained Face Encoder's has no bound
            recompute=1.0,
            sampling=SamplerConfig(),
        ),
        # With Adam the rate grows as the square root of the batch (Malladi et al.,
        # arXiv:2205.10287).
        optim=OptimConfig(samples=100_000, lr=1e-5 * (clips / 8) ** 0.5, warmup_samples=4_000),
        batch=BatchConfig(global_batch=clips),
        ema=EmaConfig(every=10),
        checkpoint=CheckpointConfig(every_samples=8_000),
        validate=ValidateConfig(every_samples=8_000),
        run=RunConfig(
            num_workers=gpus, use_gpu=True, precision="bf16", prefetch=4, loader_threads=2
        ),
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        alignment_tiny,
        alignment_demo,
        alignment_motion,
        animator_tiny,
        animator_demo,
        animator_smoke,
        animator_512_1gpu,
        animator_512_8gpu,
        animator_512_32gpu,
        animator_576x1024_1gpu,
        animator_576x1024_8gpu,
        animator_576x1024_32gpu,
        animator_mixed_8gpu,
        animator_lora_24gb,
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


def gpu_recipes() -> list[str]:
    """The names of those that are made for GPUs."""
    return [name for name, recipe in RECIPES.items() if recipe().run.use_gpu]
