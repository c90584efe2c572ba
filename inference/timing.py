"""Fair timing: competitors take turns, and ratios are of the same round."""

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

OnRun = Callable[[int, int], None]  # (runs done, runs in all)


def alternate(
    calls: dict[str, Callable[[], Any]],
    repeats: int,
    device: torch.device,
    after_each: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each call in each round.

    The order changes from round to round, so that none always follows the same other.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats):
        names = list(calls)[turn % len(calls) :] + list(calls)[: turn % len(calls)]
        for name in names:
            seconds[name].append(timed(calls[name], device))
            after_each()
    return seconds


def summary(times: list[float], baseline: list[float]) -> dict[str, float]:
    """Median and fastest seconds, and the ratio to the baseline of the same round."""
    ratios = sorted(own / other for own, other in zip(times, baseline, strict=True))
    return {
        "seconds": round(statistics.median(times), 4),
        "fastest": round(min(times), 4),
        "ratio": round(statistics.median(ratios), 4),
        "ratio_low": round(ratios[0], 4),
        "ratio_high": round(ratios[-1], 4),
    }


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, with what it started on the device."""
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Wait for what was started on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: torch.device) -> dict[str, Any]:
    """What a figure was measured on."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
