"""Speed and memory of the forward pass beside a named baseline, in one run.

The baseline is diffusers' plain `UNetSpatioTemporalConditionModel` with the same weights and size.
Runs of both alternate, so that a busy machine slows both; what is compared is the ratio within a
pair, not seconds of different minutes.
"""

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_spatio_temporal_condition import (
    UNetSpatioTemporalConditionModel,
)
from torch import Tensor

from animator.config import PRESETS
from animator.model import Animator
from inference.peak_memory import host_now, host_peak
from inference.timing import OnRun, alternate, machine, summary, synchronise

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BASELINE = "diffusers_unet"
CPU_SIZE = {"height": 256, "width": 256, "frames": 4}


@dataclass(frozen=True, kw_only=True)
class ForwardBench:
    """What is measured; None takes the preset's own size on a GPU, `CPU_SIZE` on a CPU."""

    preset: str = "svd_xt"
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    batch: int = 1
    dtype: str = "fp32"
    device: str = "auto"
    repeats: int = 5
    compile: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("preset", PRESETS), ("dtype", DTYPES)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"Got {name} {getattr(self, name)!r}, but expected one of {', '.join(choices)}."
                )
        if self.device.partition(":")[0] not in ("auto", "cpu", "cuda"):
            raise ValueError(f"Got device {self.device!r}, but expected auto, cpu or cuda.")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError("Got device cuda, but there is no GPU here: give --device cpu.")
        for name in ("batch", "repeats", "height", "width", "frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Got {name} {value}, but expected at least 1.")


@torch.no_grad()
def bench_forward(config: ForwardBench, on_run: OnRun | None = None) -> dict[str, Any]:
    """Time and peak memory of three forward passes on the same inputs.

    - `diffusers_unet`: the baseline, with one context token a frame.
    - `animator`: the public forward with PoseNet, Face Encoder and ID adapters.
    - `animator_step`: what a sampler calls each step; PoseNet and Face Encoder ran before.

    Returns:
        `rows` (seconds, ratio to the baseline of the same round, peak memory beyond the weights
        in GB), the machine and the settings.

    Raises:
        ValueError: for a size that the model cannot take.
    """
    gpu = torch.cuda.is_available()
    place = ("cuda" if gpu else "cpu") if config.device == "auto" else config.device
    device, dtype = torch.device(place), DTYPES[config.dtype]
    torch.manual_seed(0)
    model = _animator(config.preset, device, dtype)
    plain = _plain_unet(model)
    given = _inputs(config, model, device, dtype)
    context = model.context(given["image_token"], given["face_embedding"])
    features = model.pose_net(given["pose_images"])
    calls: dict[str, Callable[[], Any]] = {
        BASELINE: lambda: plain(
            given["sample"],
            given["timestep"],
            given["image_token"],
            added_time_ids=given["added_time_ids"],
            return_dict=False,
        ),
        "animator": lambda: model(**given),
        "animator_step": lambda: model.denoise(
            given["sample"], given["timestep"], context, features, given["added_time_ids"]
        ),
    }
    if config.compile:
        plain.compile()
        model.unet.compile()
    rounds = config.repeats + 2
    done = 0
    # One round to warm up, one for memory: what libraries keep from their first call is not it.
    for call in calls.values():
        call()
        done = _tell(on_run, done + 1, len(calls) * rounds)
    memory = {}
    for name, call in calls.items():
        with _peak_memory(device) as peak:
            call()
        memory[name] = peak[0]
        done = _tell(on_run, done + 1, len(calls) * rounds)

    def tell() -> None:
        nonlocal done
        done = _tell(on_run, done + 1, len(calls) * rounds)

    seconds = alternate(calls, config.repeats, device, tell)
    rows = {
        name: {
            **summary(times, seconds[BASELINE]),
            "peak_gb": round(memory[name] / 1e9, 3),
        }
        for name, times in seconds.items()
    }
    return {
        "bench": "forward",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(device),
        "settings": asdict(config),
        "sample": list(given["sample"].shape),
        "weights_gb": round(sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9, 3),
        "baseline": BASELINE,
        "rows": rows,
    }


def _tell(on_run: OnRun | None, done: int, total: int) -> int:
    if on_run is not None:
        on_run(done, total)
    return done


def _animator(preset: str, device: torch.device, dtype: torch.dtype) -> Animator:
    """Random weights of plausible spread, made where they are used: no second copy."""
    with torch.device("meta"):
        model = Animator(PRESETS[preset]()).to(dtype)
    model.to_empty(device=device)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.fill_(0.5)
    return model.eval()


def _plain_unet(model: Animator) -> UNetSpatioTemporalConditionModel:
    """Diffusers' own UNet on the very tensors of the animator's backbone."""
    with torch.device("meta"):
        plain = UNetSpatioTemporalConditionModel(**model.unet.config)
    state = {k: v for k, v in model.unet.state_dict().items() if ".processor." not in k}
    plain.load_state_dict(state, assign=True)
    return plain.eval()


def _inputs(
    config: ForwardBench, model: Animator, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    sizes = model.config
    own = {"height": sizes.height, "width": sizes.width, "frames": sizes.num_frames}
    if device.type == "cpu":  # the published size would take an hour
        own = {name: min(size, CPU_SIZE[name]) for name, size in own.items()}
    height, width = config.height or own["height"], config.width or own["width"]
    multiple = sizes.size_multiple
    if height % multiple or width % multiple:
        raise ValueError(
            f"Got {height} x {width}, but expected multiples of {multiple} for {config.preset}."
        )
    frames, batch, cell = config.frames or own["frames"], config.batch, sizes.spatial_factor

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    return {
        "sample": draw(batch, frames, 2 * sizes.latent_channels, height // cell, width // cell),
        "timestep": torch.full((batch,), 0.3, device=device),
        "image_token": draw(batch, 1, sizes.cross_attention_dim),
        "face_embedding": draw(batch, sizes.face_embedding_dim),
        "pose_images": draw(batch * frames, 3, height, width).clamp(-1, 1),
        "added_time_ids": torch.tensor([[6.0, 127, 0.02]] * batch, device=device),
    }


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[list[float]]:
    """Bytes beyond those held at the start, at the highest point inside; first entry of a list."""
    peak = [0.0]
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        yield peak
        synchronise(device)
        peak[0] = torch.cuda.max_memory_allocated(device) - held
        return
    _give_back()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts anew
        held = host_now()
        yield peak
        peak[0] = max(0.0, (host_peak() or float("nan")) - held)
    except OSError:  # another system
        yield peak
        peak[0] = float("nan")


def _give_back() -> None:
    """Have glibc return what earlier calls freed, or a call's memory would be hidden in it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
