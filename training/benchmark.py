"""Where a training step's time goes, and what the loop costs over a bare PyTorch step.

The real loop trains with engine, guard, averaging, records and tracker; after each of its steps
the bare step trains a second copy of the model on the same batch. Both run in turn in one thread,
so that a busy machine slows both, and ratios are of the same turn.

Batches are random tensors that lie in memory, as cached latents would come: reading data is not
measured here but in every run's own record (`data_wait`).

Shapes: B batch, T frames, C latent channels, H W pixels, h w latent size, D context width.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from animator.config import PRESETS, AnimatorConfig
from animator.flops import training_flops
from inference.timing import OnRun, machine, synchronise
from training.animate import AnimateTask
from training.animate_config import AnimateConfig
from training.config import (
    BatchConfig,
    CheckpointConfig,
    EmaConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    describe,
)
from training.metrics import read_metrics
from training.task import Batch
from training.throughput import peak_flops
from training.worker import join_alone

ENGINES = {"zero2": ("deepspeed", 2), "ddp": ("ddp", 2)}
_POOL = 4  # batches that come again and again
_WARM_UP = 3  # steps that count for nothing


@dataclass(frozen=True, kw_only=True)
class TrainBench:
    """What is measured; None takes the preset's own size.

    baseline: also train a bare copy; without it, peak memory on a GPU is the loop's alone.
    track: log to MLflow, in a scratch folder.
    """

    preset: str = "tiny"
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    batch: int = 1
    dtype: str = "fp32"
    device: str = "auto"
    engines: tuple[str, ...] = ("zero2", "ddp")
    recompute: float = 1.0
    steps: int = 20
    baseline: bool = True
    track: bool = True

    def __post_init__(self) -> None:
        for name, given, choices in (
            ("preset", (self.preset,), PRESETS),
            ("dtype", (self.dtype,), ("fp32", "bf16")),
            ("device", (self.device,), ("auto", "cpu", "cuda")),
            ("engine", self.engines, ENGINES),
        ):
            if not given or any(each not in choices for each in given):
                raise ValueError(f"Got {name} {given}, but expected of {', '.join(choices)}.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("Got device cuda, but there is no GPU here: give --device cpu.")
        for name in ("height", "width", "frames", "batch", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Got {name} {value}, but expected at least 1.")

    @property
    def animator(self) -> AnimatorConfig:
        """The sizes of the model.

        Raises:
            ValueError: a size that the model cannot take.
        """
        sizes = PRESETS[self.preset]()
        return replace(
            sizes,
            height=self.height or sizes.height,
            width=self.width or sizes.width,
            num_frames=self.frames or sizes.num_frames,
        )


def bench_train(config: TrainBench, on_run: OnRun | None = None) -> dict[str, Any]:
    """Time, memory and overhead of training steps on one worker, for each engine.

    Returns:
        `rows` by engine: `seconds` a step (medians of all), its `parts` (data, forward, backward,
        optimiser, other), `tflops` a second and `mfu` where the peak is known, `peak_gb`, and of
        the baseline its `bare_seconds`, and `overhead`: the median of the loop's time over the
        bare step's of the same turn, less 1, with the quarter points; the machine, its `load`,
        the settings.

    Raises:
        ValueError: a size that the model cannot take.
    """
    gpu = torch.cuda.is_available() and config.device != "cpu"
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    _ = config.animator  # a size that does not fit is said before anything starts
    total, done = len(config.engines) * (config.steps + _WARM_UP), 0
    rows, flops = {}, 0.0
    load = [os.getloadavg()[0]]
    join_alone(device)
    for name in config.engines:
        engine, stage = ENGINES[name]
        steps = config.steps + _WARM_UP
        task = _BenchTask(config, device, on_run, done, total)
        flops = task.flops
        rows[name] = _measure(_training(config, engine, stage, steps), task, device)
        done += steps
        load.append(os.getloadavg()[0])
    return {
        "bench": "train",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(device),
        "load": [round(each, 2) for each in load],
        "settings": asdict(config),
        "sample": [config.animator.num_frames, config.animator.height, config.animator.width],
        "flops": flops * config.batch,
        "rows": rows,
    }


def _training(config: TrainBench, engine: Any, stage: Any, steps: int) -> TrainConfig:
    samples = steps * config.batch
    return TrainConfig(
        task=AnimateConfig(animator=config.animator, recompute=config.recompute),
        optim=OptimConfig(samples=samples, lr=1e-5),
        batch=BatchConfig(global_batch=config.batch, micro_batch=config.batch),
        checkpoint=CheckpointConfig(every_samples=samples),
        ema=EmaConfig(every=10),
        run=RunConfig(
            engine=engine,
            zero_stage=stage,
            precision="bf16" if config.dtype == "bf16" else "fp32",
            track=config.track,
        ),
    )


def _measure(config: TrainConfig, task: "_BenchTask", device: torch.device) -> dict[str, Any]:
    from training import tracking
    from training.loop import train_loop
    from training.reporter import LocalReporter

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        tracker: tracking.Tracker = tracking.NullTracker()
        run = None
        if config.run.track:
            with _tracking_to(out):
                run = tracking.open_run(out, "bench", describe(config), "bench")
        if run is not None:
            tracker = tracking.MlflowTracker(run)
        task.begin(config)
        try:
            train_loop(
                task, config, out, reporter=LocalReporter(out), tracker=tracker, device=device
            )
        except _AllMeasuredError:
            pass
        finally:
            tracker.close()
            tracking.close_run(run, finished=True)
        records = read_metrics(out / "metrics.jsonl")[_WARM_UP:]
    found = _row(task, records)
    speed = config.batch.global_batch / found["seconds"]
    peak = peak_flops(device, config.run.precision)
    return {
        **found,
        "tflops": round(task.flops * speed / 1e12, 4),
        "mfu": task.flops * speed / peak if peak else None,
        "peak_gb": round(_peak(device) / 1e9, 3),
    }


def _row(task: "_BenchTask", records: list[dict[str, Any]]) -> dict[str, Any]:
    own, bare = task.own[_WARM_UP:], task.bare[_WARM_UP:]

    def median(values: Iterator[float] | list[float]) -> float:
        return round(statistics.median(values), 5)

    forward = task.forward[_WARM_UP:]
    parts = {
        "data": median(record["data_wait"] for record in records),
        "forward": median(forward),
        "backward": median(
            record["compute"] - seconds for record, seconds in zip(records, forward, strict=False)
        ),
        "optimiser": median(record["optimiser"] for record in records),
    }
    seconds = median(own)
    parts["other"] = round(max(0.0, seconds - sum(parts.values())), 5)
    found: dict[str, Any] = {"seconds": seconds, "parts": parts}
    if bare:
        ratios = sorted(o / b - 1 for o, b in zip(own, bare, strict=True))
        quarters = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        found |= {
            "bare_seconds": median(bare),
            "overhead": median(ratios),
            "overhead_quarters": [round(quarters[0], 4), round(quarters[2], 4)],
        }
    return found


class _AllMeasuredError(Exception):
    """All steps are measured: the checkpoint at the run's end is not part of a step."""


class _BenchTask(AnimateTask):
    """The animator's own model and loss on random batches; times itself and the bare step."""

    def __init__(
        self, config: TrainBench, device: torch.device, on_run: OnRun | None, done: int, total: int
    ) -> None:
        # Not AnimateTask's own: there is no data to open.
        task = AnimateConfig(animator=config.animator, recompute=config.recompute)
        self.config, self.device = task, device
        self.fingerprint, self.num_samples, self.terms = "bench", 1, {}
        sizes = config.animator
        self.flops = training_flops(sizes, sizes.height, sizes.width, sizes.num_frames)
        self.quartiles = task.sigma_quartiles()
        self._pool = [_random_batch(sizes, config.batch, seed) for seed in range(_POOL)]
        self._bench, self._told = config, (on_run, done, total)
        self.own: list[float] = []
        self.bare: list[float] = []
        self.forward: list[float] = []

    def begin(self, config: TrainConfig) -> None:
        """Make the bare copy; the clock of the first step starts."""
        self._training = config
        if self._bench.baseline:
            torch.manual_seed(config.run.seed)
            self._copy = self.build().to(self.device)
            self._weights = [p for p in self._copy.parameters() if p.requires_grad]
            optim = config.optim
            self._optimizer = torch.optim.AdamW(
                self._weights,
                lr=optim.lr,
                betas=optim.betas,
                eps=optim.eps,
                weight_decay=optim.weight_decay,
                fused=self.device.type == "cuda",
            )
        self._started = time.perf_counter()

    def prepare(self, device: torch.device) -> None:
        self.quartiles = self.quartiles.to(device)

    def batch(self, samples: Sequence[int]) -> Batch:
        return self._pool[samples[0] // self._bench.batch % _POOL]

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        began = time.perf_counter()
        found = super().loss(model, batch)
        synchronise(self.device)
        self._forward = time.perf_counter() - began
        return found

    def problems(self) -> list[tuple[str, str]]:
        """Asked once a step, when it is over but for the record: the bare step's turn.

        What the loop does after this counts for its next step.
        """
        synchronise(self.device)
        self.own.append(time.perf_counter() - self._started)
        self.forward.append(self._forward)
        if self._bench.baseline:
            began = time.perf_counter()
            self._bare_step(len(self.bare))
            synchronise(self.device)
            self.bare.append(time.perf_counter() - began)
        on_run, done, total = self._told
        if on_run is not None:
            on_run(done + len(self.own), total)
        if len(self.own) == self._training.num_steps:
            raise _AllMeasuredError
        self._started = time.perf_counter()
        return []

    def _bare_step(self, step: int) -> None:
        batch = self._pool[step % _POOL]
        batch = {name: value.to(self.device) for name, value in batch.items()}
        bf16 = self._training.run.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            loss, _ = super().loss(self._copy, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self._weights, self._training.optim.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        loss.item()


def _random_batch(sizes: AnimatorConfig, batch: int, seed: int) -> Batch:
    """What the task would give from cached latents and tokens."""
    generator = torch.Generator().manual_seed(seed)
    frames, cell, channels = sizes.num_frames, sizes.spatial_factor, sizes.latent_channels
    grid = (sizes.height // cell, sizes.width // cell)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    pixels = (batch, frames, sizes.height, sizes.width, 3)
    return {
        "latents": draw(frames, channels, *grid).half(),
        "reference_latents": draw(channels, *grid),
        "image_token": draw(1, sizes.cross_attention_dim),
        "face_embedding": draw(sizes.face_embedding_dim),
        "face_mask": (draw(frames, 1, *grid) > 1).float(),
        "poses": torch.randint(256, pixels, generator=generator, dtype=torch.uint8),
        "sigma": draw().exp(),
        "noise": draw(frames, channels, *grid),
        "fps": torch.full((batch,), 7.0),
        "replaced": torch.zeros(batch),
        **{
            f"keep_{name}": torch.ones(batch)
            for name in ("image_token", "reference", "face", "pose")
        },
    }


@contextmanager
def _tracking_to(folder: Path) -> Iterator[None]:
    """MLflow's SQLite store in a folder that goes away, unless a server is named."""
    if os.environ.get("MLFLOW_TRACKING_URI"):
        yield
        return
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'mlflow.db'}"
    try:
        yield
    finally:
        del os.environ["MLFLOW_TRACKING_URI"]


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
