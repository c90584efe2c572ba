"""Where the time of a step goes, how fast the run is, and when it will end."""

import time
from typing import Any

import psutil
import torch

_WINDOW = 100  # steps that the running mean looks back on


class StepClock:
    """Cheap timers of one worker: `begin`, a `lap` at the end of each part of a step, `end`.

    A step lasts from the end of the one before, so that the seconds of all steps add up to those
    of the run; what is in no part (averaging, logging, the checkpoint after the step before) is
    its `other`.

    Args:
        steps: from here to the run's end.
        samples: of one step, on all workers.
        flops: of one sample, forward and backward; 0 = unknown.
        peak: floating-point operations a second that all workers' devices can do; None = unknown.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        steps: int,
        samples: int,
        flops: float = 0.0,
        peak: float | None = None,
    ) -> None:
        self._device, self._left, self._samples = device, steps, samples
        self._flops, self._peak = flops, peak
        self._mean, self._counted = 0.0, -1  # the first step warms up, and is not counted
        self._started = self._lap = time.perf_counter()
        self._parts: dict[str, float] = {}

    def begin(self) -> None:
        """The first part of a step begins."""
        self._lap = time.perf_counter()

    def lap(self, part: str) -> None:
        """The time since the last lap, or since `begin`, went into `part`.

        Waits for the device, where work is only queued; the loop calls it where it waits anyway.
        """
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self._parts[part] = self._parts.get(part, 0.0) + now - self._lap
        self._lap = now

    def end(self, data_wait: float) -> dict[str, Any]:
        """End the step; its timings in seconds, for the record.

        Args:
            data_wait: the part of `compute` that was spent waiting for batches.
        """
        now = time.perf_counter()
        seconds, parts = now - self._started, self._parts
        self._started = now
        self._parts = {}
        self._left -= 1
        self._count(seconds)
        mfu = None
        if self._peak and self._flops:
            mfu = self._flops * self._samples / seconds / self._peak
        return {
            "dt": seconds,
            "data_wait": data_wait,
            "compute": parts.get("compute", 0.0) - data_wait,
            "optimiser": parts.get("optimiser", 0.0),
            "other": seconds - sum(parts.values()),
            "samples_per_second": self._samples / seconds,
            "mfu": mfu,
            "memory_gb": self._memory_gb(),
            "eta": self._left * (self._mean or seconds),
        }

    def _count(self, seconds: float) -> None:
        self._counted += 1
        if self._counted > 0:
            self._mean += (seconds - self._mean) / min(self._counted, _WINDOW)

    def _memory_gb(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 1e9
        return psutil.Process().memory_info().rss / 1e9
