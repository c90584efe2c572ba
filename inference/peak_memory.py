"""The most memory that a run took, of the host and of each device."""

import re
from pathlib import Path
from typing import Any

import torch

_RESET = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_MB = 1e6


class PeakMemory:
    """Peaks from now on. Where the system does not let the host's be reset, since its start."""

    def __init__(self) -> None:
        try:
            _RESET.write_text("5")
            self.since_start = False
        except OSError:
            self.since_start = True
        for index in range(_devices()):
            torch.cuda.reset_peak_memory_stats(index)

    def record(self) -> dict[str, Any]:
        """Megabytes (10^6) for the JSON beside an output; what cannot be known is left out."""
        record: dict[str, Any] = {}
        host = host_peak()
        if host is not None:
            record["host_mb"] = round(host / _MB, 1)
            if self.since_start:
                record["host_since"] = "the start of the process"
        devices = {
            f"cuda:{index}": round(torch.cuda.max_memory_allocated(index) / _MB, 1)
            for index in range(_devices())
        }
        if devices:
            record["devices_mb"] = devices
        return record


def host_peak() -> int | None:
    """Most bytes the process had in memory at once (VmHWM); None where the system does not say."""
    return _status("VmHWM")


def host_now() -> float:
    """Bytes of the process in memory now; not a number where the system does not say."""
    found = _status("VmRSS")
    return float("nan") if found is None else float(found)


def _status(name: str) -> int | None:
    try:
        found = re.search(rf"{name}:\s+(\d+) kB", _STATUS.read_text())
    except OSError:
        return None
    return None if found is None else int(found[1]) * 1024


def _devices() -> int:
    return torch.cuda.device_count() if torch.cuda.is_initialized() else 0
