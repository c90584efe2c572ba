"""What a run costs, before it is started: memory a GPU, seconds a step, hours, disk.

Memory is counted part by part: what the settings of the engine say of weights, gradients and
optimiser, and one training pass on fake tensors for activations. Time is model operations over
what a GPU does of them, whose share (MFU) is an assumption. Nothing here has been measured on a
GPU.

Bytes and FLOPs are plain numbers; GB are 1e9 bytes.
"""

from dataclasses import dataclass
from typing import Any

from animator.config import AnimatorConfig
from training.animate_config import AnimateConfig
from training.config import TrainConfig
from training.throughput import peak_of

CAVEAT = (
    "Computed, not measured on a GPU: memory from one training pass on tensors without numbers, "
    "time from the operations of the model at the stated MFU."
)
# What CUDA, cuDNN and NCCL take for themselves, and what the allocator cannot use; an assumption.
OVERHEAD = 3e9
# DeepSpeed's own default for the weights of ZeRO-3 that are gathered at one time.
_GATHERED = 1_000_000_000
# Of Stable Video Diffusion: the VAE's encoder for one frame of 576 x 1024, counted with torch's
# counter, and the weights of VAE and image encoder.
_VAE_FLOPS, _VAE_PIXELS = 2.44e12, 576 * 1024
_VAE_WEIGHTS, _TOKEN_WEIGHTS = 97_700_000, 632_000_000
FPS = 30  # of the hour of video whose latents are sized


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A card: its memory in bytes, and the dense bf16 peak in FLOPs a second."""

    memory: float
    peak: float


def _card(gigabytes: float, driver_name: str) -> Gpu:
    peak = peak_of(driver_name, "bf16")
    assert peak is not None, driver_name
    return Gpu(memory=gigabytes * 1e9, peak=peak)


GPUS = {
    "a100-40gb": _card(42.3, "A100"),
    "a100-80gb": _card(85.0, "A100"),
    "h100": _card(85.0, "H100"),
    "h200": _card(150.0, "H200"),
    "l40s": _card(48.0, "L40S"),
    # AWS's variant of the A10; the peak is that of its own data sheet.
    "a10g-24gb": Gpu(memory=24.1e9, peak=70e12),
    "rtx3090": _card(25.4, "RTX 3090"),
    "rtx4090": _card(25.4, "RTX 4090"),
}
DEFAULT_GPU, DEFAULT_MFU = "a100-80gb", 0.35


def estimate(
    config: TrainConfig,
    *,
    gpu: str = DEFAULT_GPU,
    mfu: float = DEFAULT_MFU,
    clips: int | None = None,
) -> dict[str, Any]:
    """The cost of a training run of the animator, on `run.num_workers` GPUs.

    Args:
        gpu: one of `GPUS`.
        mfu: share of its peak that the operations of the model get, recomputation not counted.
        clips: of the shards, for the length of an epoch.

    Returns:
        JSON-ready: `parameters`, `memory` (bytes on rank 0, which also holds the average, by
        part), `fits`, `flops` of a step, `seconds` a step, `run` and `epoch` (hours, clips),
        `disk` (bytes).

    Raises:
        ValueError: another task, an unknown GPU, a share outside 0 to 1.
    """
    task = config.task
    if not isinstance(task, AnimateConfig):
        raise ValueError(
            f"task {task.name!r} has no estimate, expected a recipe of the animator: the "
            "alignment trains in minutes on any machine."
        )
    if gpu not in GPUS:
        raise ValueError(f"got GPU {gpu!r}, expected one of {', '.join(GPUS)}.")
    if not 0 < mfu <= 1:
        raise ValueError(f"got MFU {mfu}, expected a share above 0 and at most 1, such as 0.35.")
    if clips is not None and clips < 1:
        raise ValueError(f"got {clips} clips, expected at least 1.")
    card, workers = GPUS[gpu], config.run.num_workers
    memory = memory_parts(config, task)
    flops = step_flops(config, task)
    seconds = sum(flops.values()) / (workers * card.peak * mfu)
    return {
        "gpu": gpu,
        "gpus": workers,
        "mfu": mfu,
        "sizes": [f"{height}x{width}" for height, width in sizes(task)],
        "parameters": _parameters(task),
        "memory": memory | {"total": sum(memory.values()), "gpu": card.memory},
        "fits": sum(memory.values()) <= card.memory,
        "flops": flops,
        "seconds": seconds,
        "clips_per_second": config.batch.global_batch / seconds,
        "run": {
            "steps": config.num_steps,
            "clips": config.optim.samples,
            "hours": config.num_steps * seconds / 3600,
        },
        "epoch": clips
        and {"clips": clips, "hours": clips / config.batch.global_batch * seconds / 3600},
        "disk": disk(config, task),
        "caveat": CAVEAT,
    }


def default_gpu(recipe: str) -> str:
    """The card that a recipe is meant for."""
    return "rtx4090" if recipe.endswith("_24gb") else DEFAULT_GPU


def sizes(task: AnimateConfig) -> list[tuple[int, int]]:
    """(height, width) that are trained on, in pixels."""
    return list(task.sizes()) or [(task.animator.height, task.animator.width)]


def memory_parts(config: TrainConfig, task: AnimateConfig) -> dict[str, float]:
    """Bytes on rank 0's GPU at the worst moment of a step, by what they hold."""
    from training.activations import activations

    counted = _counted(task)
    bf16 = config.run.precision == "bf16"
    ddp = config.run.engine == "ddp"
    found = [
        activations(
            task.animator,
            height=height,
            width=width,
            batch=config.batch.micro_batch,
            trainable=task.trainable,
            rank=task.lora_rank,
            recompute=task.recompute,
            weights=_weights_dtype(config),
            autocast=bf16,
        )
        for height, width in sizes(task)
    ]
    worst = max(found, key=lambda each: each.peak)
    parts = _state(config, counted.all, counted.trainable)
    bucket = 0.0
    if not ddp:
        elements = min(counted.trainable, 200_000_000)  # the engine's own limit
        bucket = 2 * elements * (2 if bf16 else 4)  # filled while the last one is reduced
    return {
        **parts,
        "average": 4.0 * counted.trainable if config.ema.half_life else 0.0,
        "activations": float(worst.kept),
        "recomputation": float(worst.peak - worst.kept),
        "buckets": float(bucket),
        "encoders": _encoders(task, config.batch.micro_batch),
        "overhead": OVERHEAD,
    }


def _state(config: TrainConfig, weights: int, trained: int) -> dict[str, float]:
    """Bytes of weights, gradients and optimiser on one GPU.

    The optimiser has fp32 masters and two moments; DDP's masters are the weights themselves.
    Under ZeRO every share keeps its reduced gradients in fp32.
    """
    workers, stage = config.run.num_workers, config.run.zero_stage
    size = 2 if config.run.precision == "bf16" else 4
    if config.run.engine == "ddp":
        return {"weights": 4.0 * weights, "gradients": 4.0 * trained, "optimiser": 8.0 * trained}
    share = trained / workers
    whole = size * trained if stage == 1 else 0.0
    held = float(size * weights)
    if stage == 3:
        held = size * (weights / workers + min(weights, _GATHERED))
    return {"weights": held, "gradients": 4 * share + whole, "optimiser": 12 * share}


def step_flops(config: TrainConfig, task: AnimateConfig) -> dict[str, float]:
    """Operations of one global batch: `model` forward and backward, `encoders` before it.

    With buckets each size is taken to come equally often.
    """
    from animator.flops import training_flops

    clips, frames = config.batch.global_batch, task.animator.num_frames
    found = sizes(task)
    model = sum(
        training_flops(task.animator, height, width, frames, trainable=task.trainable)
        for height, width in found
    )
    encoders = 0.0
    if _uses_vae(task):  # every frame, and the reference
        pixels = sum(height * width for height, width in found)
        encoders = _VAE_FLOPS * pixels / _VAE_PIXELS * (frames + 1)
    return {"model": clips * model / len(found), "encoders": clips * encoders / len(found)}


def disk(config: TrainConfig, task: AnimateConfig) -> dict[str, float]:
    """Bytes of a checkpoint and its parts, of the released model, of latents for an hour of video.

    A checkpoint has the weights as they train, the optimiser's three fp32 tensors (DDP: two) and
    the fp32 average.
    """
    counted = _counted(task)
    ddp = config.run.engine == "ddp"
    size = 2 if config.run.precision == "bf16" and not ddp else 4
    optimiser = (8.0 if ddp else 12.0) * counted.trainable
    average = 4.0 * counted.trainable
    model = 4.0 * counted.all
    latents = [
        2.0
        * task.animator.latent_channels
        * (height // task.animator.spatial_factor)
        * (width // task.animator.spatial_factor)
        for height, width in sizes(task)
    ]
    checkpoint = size * counted.all + optimiser + average
    kept = config.checkpoint.keep + config.checkpoint.keep_best
    return {
        "checkpoint": checkpoint,
        "checkpoints_kept": checkpoint * (kept + 1),  # one more while it is written
        "model": model,
        "latents_hour": sum(latents) / len(latents) * FPS * 3600,
    }


def _counted(task: AnimateConfig) -> Any:
    from training.activations import count_parameters

    return count_parameters(task.animator, task.trainable, task.lora_rank)


def _parameters(task: AnimateConfig) -> dict[str, int]:
    counted = _counted(task)
    return {**counted.parts, "all": counted.all, "trainable": counted.trainable}


def _weights_dtype(config: TrainConfig) -> Any:
    import torch

    half = config.run.precision == "bf16" and config.run.engine != "ddp"
    return torch.bfloat16 if half else torch.float32


def _uses_vae(task: AnimateConfig) -> bool:
    return task.animator.codec == "temporal_vae" and not task.latents


def _encoders(task: AnimateConfig, micro_batch: int) -> float:
    """Frozen encoders on the GPU, in fp32, with what the VAE holds for the frames of a chunk."""
    if not _uses_vae(task):
        return 0.0
    sides: AnimatorConfig = task.animator
    pixels = max(height * width for height, width in sizes(task))
    # Two frames at a time; its widest maps are 128 channels of every pixel, some six of them live.
    chunk = 2 * 6 * 128 * 4 * pixels * micro_batch if sides.codec == "temporal_vae" else 0
    return 4.0 * (_VAE_WEIGHTS + _TOKEN_WEIGHTS) + chunk
