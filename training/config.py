"""The settings of a training run: frozen groups that recipes fill and `--set a.b=c` overrides.

Progress is one integer, `samples_seen`; learning rate and cadences are functions of it.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipelines.overrides import differences, from_dict, to_dict


def _require(condition: bool, key: str, given: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{key} is {given!r}, expected {expected}: set it with --set {key}=….")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule; lengths are counted in samples."""

    samples: int  # the run ends at the first whole batch that reaches this many
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    clip: float = 1.0  # largest global gradient norm; 0 = no clipping
    warmup_samples: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    final_lr: float = 0.0  # fraction of lr that cosine ends at

    def __post_init__(self) -> None:
        _require(self.samples > 0, "optim.samples", self.samples, "at least 1")
        _require(self.lr > 0, "optim.lr", self.lr, "a number > 0")
        _require(self.clip >= 0, "optim.clip", self.clip, "a number ≥ 0")
        _require(self.warmup_samples >= 0, "optim.warmup_samples", self.warmup_samples, "≥ 0")
        _require(0 <= self.final_lr <= 1, "optim.final_lr", self.final_lr, "a fraction in 0..1")
        _require(all(0 <= b < 1 for b in self.betas), "optim.betas", self.betas, "values in [0, 1)")

    def learning_rate(self, samples_seen: int) -> float:
        """The rate of the step that starts at `samples_seen`."""
        rate = self.lr
        if samples_seen < self.warmup_samples:
            rate *= (samples_seen + 1) / self.warmup_samples
        if self.schedule == "cosine":
            progress = min(samples_seen / self.samples, 1.0)
            cosine = 0.5 * (1 + math.cos(math.pi * progress))
            rate *= self.final_lr + (1 - self.final_lr) * cosine
        return rate


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """`global_batch` samples make a step, `micro_batch` of them go through one worker at a time."""

    global_batch: int
    micro_batch: int = 1

    def __post_init__(self) -> None:
        _require(self.global_batch > 0, "batch.global_batch", self.global_batch, "at least 1")
        _require(self.micro_batch > 0, "batch.micro_batch", self.micro_batch, "at least 1")


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Exponential moving average of the trainable weights: what a run releases."""

    half_life: int = 10_000  # samples after which a weight's share has halved
    ramp: float = 0.05  # early on the half-life is this share of the samples seen
    every: int = 1  # steps between updates

    def __post_init__(self) -> None:
        _require(self.half_life >= 0, "ema.half_life", self.half_life, "≥ 0 (0 = no averaging)")
        _require(self.ramp > 0, "ema.ramp", self.ramp, "a number > 0")
        _require(self.every > 0, "ema.every", self.every, "at least 1")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """A checkpoint at every `every_samples` and at the end; the newest `keep` stay."""

    every_samples: int
    keep: int = 2
    keep_best: int = 1  # and so many of those with the best validation metric
    background: bool = True  # written while training goes on, from a copy in host memory

    def __post_init__(self) -> None:
        _require(self.every_samples > 0, "checkpoint.every_samples", self.every_samples, "≥ 1")
        _require(self.keep > 0, "checkpoint.keep", self.keep, "at least 1")
        _require(self.keep_best >= 0, "checkpoint.keep_best", self.keep_best, "≥ 0")


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Which steps are left out because they would harm the weights, and when that is enough."""

    spike: float = 100.0  # times the running mean of the gradient norm; 0 = only what is not finite
    settle_steps: int = 200  # good steps before a spike is believed
    max_in_a_row: int = 5  # steps left out one after the other before the run stops
    keep_batches: int = 4  # batches of left-out steps kept for inspection

    def __post_init__(self) -> None:
        _require(
            self.spike == 0 or self.spike > 1, "guard.spike", self.spike, "above 1, or 0 for none"
        )
        _require(self.settle_steps >= 1, "guard.settle_steps", self.settle_steps, "at least 1")
        _require(self.max_in_a_row >= 1, "guard.max_in_a_row", self.max_in_a_row, "at least 1")
        _require(self.keep_batches >= 0, "guard.keep_batches", self.keep_batches, "≥ 0")


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """Checkpoints that are tried on held-out data, beside the training that goes on."""

    every_samples: int = 0  # checkpoints that cross a multiple of it are validated; 0 = none
    clips: int = 4  # held-out clips, or poses of so many clips
    metric: str = "loss"  # decides which checkpoints and which model are best
    higher_is_better: bool = False
    num_gpus: float | None = None  # None = one where the cluster has one that training leaves

    def __post_init__(self) -> None:
        _require(self.every_samples >= 0, "validate.every_samples", self.every_samples, "≥ 0")
        _require(self.clips >= 1, "validate.clips", self.clips, "at least 1")
        _require(bool(self.metric), "validate.metric", self.metric, "the name of a metric")
        _require(
            self.num_gpus is None or self.num_gpus >= 0, "validate.num_gpus", self.num_gpus, "≥ 0"
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where and how it executes; only seed, precision, engine and ZeRO stage change results."""

    num_workers: int = 1
    threads_per_worker: int = 0  # torch threads; 0 = cores shared out among the workers
    use_gpu: bool | None = None  # None = where the cluster has one for each worker
    precision: Literal["fp32", "bf16"] = "fp32"
    engine: Literal["deepspeed", "ddp"] = "deepspeed"  # ddp: plain PyTorch, nothing shared out
    zero_stage: Literal[1, 2, 3] = 2  # what DeepSpeed shares out: optimiser, gradients, weights
    seed: int = 0
    max_failures: int = 3  # lost workers survived before the run gives up
    log_every: int = 10  # steps between lines on the console and points in the tracker
    prefetch: int = 2  # micro-batches built ahead
    track: bool = True  # log to MLflow
    loader_threads: int = 1  # threads that build them; more needs a thread-safe task.batch

    def __post_init__(self) -> None:
        _require(self.num_workers > 0, "run.num_workers", self.num_workers, "at least 1")
        _require(self.seed >= 0, "run.seed", self.seed, "an integer ≥ 0")
        _require(self.log_every > 0, "run.log_every", self.log_every, "at least 1")
        _require(self.prefetch > 0, "run.prefetch", self.prefetch, "at least 1")
        _require(self.loader_threads > 0, "run.loader_threads", self.loader_threads, "at least 1")
        _require(self.threads_per_worker >= 0, "run.threads_per_worker", "negative", "≥ 0")
        _require(self.max_failures >= 0, "run.max_failures", self.max_failures, "≥ 0")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A complete run. `task` is the task's own frozen dataclass (see `training.task`)."""

    task: Any
    optim: OptimConfig
    batch: BatchConfig
    checkpoint: CheckpointConfig
    ema: EmaConfig = field(default_factory=EmaConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        self.accumulation(self.run.num_workers)

    def build_task(self) -> Any:
        """Open the task with the run's seed and batch."""
        return self.task.build_task(self.run.seed, self.batch.global_batch)

    @property
    def num_steps(self) -> int:
        return -(-self.optim.samples // self.batch.global_batch)

    def accumulation(self, num_workers: int) -> int:
        """Micro-batches a worker runs for one step.

        Raises:
            ValueError: the global batch does not divide among the workers.
        """
        share = num_workers * self.batch.micro_batch
        steps, rest = divmod(self.batch.global_batch, share)
        if rest:
            raise ValueError(
                f"batch.global_batch is {self.batch.global_batch}, expected a multiple of "
                f"{share} (run.num_workers {num_workers} x batch.micro_batch "
                f"{self.batch.micro_batch}): change one of the three."
            )
        return steps


# What may differ between a run and its continuation, because it changes no result.
_FREE = {
    "checkpoint",
    "guard.max_in_a_row",
    "guard.keep_batches",
    "validate",
    "run.num_workers",
    "run.threads_per_worker",
    "run.use_gpu",
    "run.max_failures",
    "run.log_every",
    "run.prefetch",
    "run.loader_threads",
    "run.track",
    "batch.micro_batch",
}


def binding_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that a continuation must share with the run it continues, as a nested dict."""
    free = {*_FREE, *(f"task.{key}" for key in getattr(config.task, "may_change", ()))}
    if config.optim.schedule == "constant":
        free.add("optim.samples")  # a longer constant run begins with the shorter one

    def pick(node: dict[str, Any], prefix: str) -> dict[str, Any]:
        return {
            key: pick(value, f"{prefix}{key}.") if isinstance(value, dict) else value
            for key, value in node.items()
            if f"{prefix}{key}" not in free
        }

    return pick(describe(config), "")


def describe(config: TrainConfig) -> dict[str, Any]:
    """The whole config as JSON-ready nested dictionaries, with the task's name at the top."""
    return {"name": config.task.name, **to_dict(config)}


def changed_settings(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Readable lines for every binding setting that differs."""
    return differences(dict(before), json.loads(json.dumps(after)))


def read_config(path: Path, task_types: Mapping[str, type]) -> TrainConfig:
    """The config of a finished or interrupted run from its `config.json`.

    Args:
        task_types: the task config class for each task name.
    """
    data = json.loads(path.read_text())
    name = data.pop("name")
    if name not in task_types:
        raise ValueError(f"{path} is of task {name!r}, expected one of {', '.join(task_types)}.")
    return TrainConfig(
        task=from_dict(task_types[name], data["task"]),
        optim=from_dict(OptimConfig, data["optim"]),
        batch=from_dict(BatchConfig, data["batch"]),
        checkpoint=from_dict(CheckpointConfig, data["checkpoint"]),
        ema=from_dict(EmaConfig, data["ema"]),
        guard=from_dict(GuardConfig, data.get("guard", {})),
        validate=from_dict(ValidateConfig, data.get("validate", {})),
        run=from_dict(RunConfig, data["run"]),
    )
