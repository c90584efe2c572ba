"""One validation: averaged weights on held-out data, in a process of its own.

validation/
  .samples-N/            in the works
    ema.safetensors      the averaged weights; gone once it is done
    metrics.json         written last
    model/               the released model, where it is the best so far; becomes `best/`
  samples-N/             done: metrics.json and the task's pictures
"""

import json
import math
import os
import pickle
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from training.checkpoint import AVERAGE
from training.config import TrainConfig, ValidateConfig
from training.output import enter_folder, write_json
from training.release import METRICS, averaged_model, write_release

FOLDER = "validation"
ABOUT = frozenset({"samples_seen", "seconds", "fingerprint"})  # in metrics.json, but no metrics
_POLITENESS = 10  # training on the same cores goes first


def validate_checkpoint(
    config: TrainConfig, out: Path, folder: Path, cwd: Path | None = None
) -> dict[str, Any]:
    """Validate the weights in `folder`; returns what `metrics.json` then holds.

    Args:
        out: the run's folder, where the earlier validations lie.
        folder: has `ema.safetensors` and is named after the samples seen.
        cwd: where relative paths of the settings start.

    Raises:
        ValueError: this machine has no folder `cwd`.
    """
    import torch
    from safetensors.torch import load_file

    started = time.perf_counter()
    if cwd is not None:
        enter_folder(cwd)
    with suppress(OSError):
        os.nice(_POLITENESS)
    use_gpu = torch.cuda.is_available() and config.run.use_gpu is not False
    device = torch.device("cuda" if use_gpu else "cpu")
    task = config.build_task()
    model = averaged_model(config, task, load_file(folder / AVERAGE))
    task.prepare(device)
    with torch.no_grad():
        found = task.validate(model.to(device), folder, device, config.validate.clips)
    metrics = {name: _number(value) for name, value in found.items()}
    samples_seen = int(folder.name.rpartition("-")[2])
    about = {"samples_seen": samples_seen, "fingerprint": task.fingerprint}
    if is_best(config.validate, metrics, read_validations(out)):
        write_release(
            config,
            task,
            model.cpu().eval(),
            out,
            folder / "model",
            note=print,
            samples_seen=samples_seen,
            validated=metrics,
        )
    result = {**metrics, **about, "seconds": round(time.perf_counter() - started, 3)}
    write_json(folder / METRICS, result)
    return result


def read_validations(out: Path) -> list[dict[str, Any]]:
    """`metrics.json` of every finished validation of a run, by samples seen."""
    found = []
    for path in (out / FOLDER).glob(f"samples-*/{METRICS}"):
        with suppress(OSError, ValueError):
            found.append(json.loads(path.read_text()))
    return sorted(found, key=lambda entry: entry["samples_seen"])


def is_best(
    config: ValidateConfig, metrics: Mapping[str, Any], others: list[dict[str, Any]]
) -> bool:
    """Whether no other validation is as good by the metric that decides."""
    value = metrics.get(config.metric)
    if value is None:
        return False
    sign = 1 if config.higher_is_better else -1
    rivals = [entry[config.metric] for entry in others if entry.get(config.metric) is not None]
    return all(sign * value > sign * rival for rival in rivals)


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _main() -> None:
    """Validate what a parent process hands over; ends with it."""
    payload = pickle.load(sys.stdin.buffer)
    sys.path[:0] = [path for path in payload["sys_path"] if path not in sys.path]
    arguments = pickle.loads(payload["arguments"])

    def end_with_parent() -> None:
        # Its end of the pipe closes when it is no more. Not by `sys.stdin`, whose lock a thread
        # that waits would still hold when this process ends.
        os.read(sys.stdin.fileno(), 1)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(payload["threads"])
    validate_checkpoint(*arguments)


if __name__ == "__main__":
    _main()
