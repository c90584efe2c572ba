"""What a node does while it trains: processor, memory, disk, network and GPUs, from a thread.

The names are MLflow's own for system metrics, so that it shows them as such.
"""

import json
import platform
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import psutil

from training.outbox import Outbox, warn
from training.tracking import Say, TrackedRun, number_outbox

FOLDER = "system"
_MEGA = 1e6


class NodeMonitor:
    """Measures this node every `seconds`, into `out/system/<node>.jsonl` and the tracked run.

    One process a node has it, as a context. What cannot be measured or written is left out.

    Args:
        run: None where the run is not tracked.
        out: the run's folder, whose disk is watched.
        node: the node's name; of the machine by default.
    """

    def __init__(
        self,
        run: TrackedRun | None,
        out: Path,
        *,
        node: str = "",
        seconds: float = 15.0,
        say: Say = warn,
    ) -> None:
        self.node = re.sub(r"[^A-Za-z0-9_.-]", "-", node or platform.node() or "node")
        self._out, self._seconds = out, seconds
        self._started = run.started if run else 0.0
        self._outbox: Outbox[dict[str, Any]] | None = number_outbox(run, say) if run else None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="node monitor", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(5)
        if self._outbox is not None:
            self._outbox.close(patience=5)

    def _run(self) -> None:
        with _gpus() as gpus, suppress(OSError):
            path = self._out / FOLDER / f"{self.node}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            psutil.cpu_percent()  # measures from here on
            before, since = psutil.net_io_counters(), time.monotonic()
            while not self._over.wait(self._seconds):
                with suppress(OSError, psutil.Error):
                    after, now = psutil.net_io_counters(), time.monotonic()
                    measures = measure(self._out) | _traffic(before, after, now - since)
                    before, since = after, now
                    self._keep(path, measures | _of_gpus(gpus))

    def _keep(self, path: Path, measures: dict[str, float]) -> None:
        when = time.time()
        with path.open("a") as file:
            file.write(json.dumps({"time": round(when, 1), **measures}) + "\n")
        if self._outbox is not None:
            named = {f"system/{self.node}/{name}": value for name, value in measures.items()}
            place = {"samples_seen": int(when - self._started), "time_ms": int(when * 1000)}
            self._outbox.put(named | place)


def measure(folder: Path) -> dict[str, float]:
    """Processor, memory, and the disk that holds `folder`; percent and megabytes.

    The processor's share is since the last call in this process.
    """
    memory, disk = psutil.virtual_memory(), psutil.disk_usage(str(folder))
    return {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": round((memory.total - memory.available) / _MEGA, 1),
        "system_memory_usage_percentage": memory.percent,
        "disk_usage_percentage": disk.percent,
        "disk_available_megabytes": round(disk.free / _MEGA, 1),
    }


def read_nodes(out: Path) -> dict[str, list[dict[str, float]]]:
    """The measures of each node of a run, oldest first; torn lines are left out."""
    found: dict[str, list[dict[str, float]]] = {}
    for path in sorted((out / FOLDER).glob("*.jsonl")):
        lines = found.setdefault(path.stem, [])
        for line in path.read_text(errors="replace").splitlines():
            with suppress(ValueError):
                lines.append(json.loads(line))
    return found


def _traffic(before: Any, after: Any, seconds: float) -> dict[str, float]:
    if before is None or after is None:  # a machine without a network
        return {}
    scale = _MEGA * max(seconds, 1e-3)
    return {
        "network_receive_megabytes_per_second": round(
            (after.bytes_recv - before.bytes_recv) / scale, 3
        ),
        "network_transmit_megabytes_per_second": round(
            (after.bytes_sent - before.bytes_sent) / scale, 3
        ),
    }


@contextmanager
def _gpus() -> Iterator[tuple[Any, list[Any]]]:
    """NVIDIA's own library and a handle of each GPU; none where either is missing."""
    try:
        import pynvml  # type: ignore[import-not-found]

        pynvml.nvmlInit()
    except Exception:  # not installed, no driver, no GPU: each has an error of its own
        yield None, []
        return
    try:
        count = pynvml.nvmlDeviceGetCount()
        yield pynvml, [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
    finally:
        pynvml.nvmlShutdown()


def _of_gpus(found: tuple[Any, list[Any]]) -> dict[str, float]:
    library, handles = found
    measures: dict[str, float] = {}
    for index, handle in enumerate(handles):
        with suppress(library.NVMLError):
            memory = library.nvmlDeviceGetMemoryInfo(handle)
            measures[f"gpu_{index}_memory_usage_megabytes"] = round(memory.used / _MEGA, 1)
            share = 100 * memory.used / memory.total
            measures[f"gpu_{index}_memory_usage_percentage"] = round(share, 1)
            rates = library.nvmlDeviceGetUtilizationRates(handle)
            measures[f"gpu_{index}_utilization_percentage"] = rates.gpu
            watts = library.nvmlDeviceGetPowerUsage(handle) / 1000
            measures[f"gpu_{index}_power_usage_watts"] = round(watts, 1)
    return measures
