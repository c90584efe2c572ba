"""The state of a run in lines for a terminal, and its numbers in few words."""

import math
from collections.abc import Mapping
from typing import Any


def status_lines(status: Mapping[str, Any]) -> list[str]:
    """The state as lines for a terminal."""
    place, now = status["position"], status["now"]
    lines = [f"{status['task']} in {status['folder']}: {status['message']}"]
    lines.append(
        f"{place['samples_seen']:,} of {place['samples']:,} samples "
        f"({100 * place['share']:.1f} %), step {place['step']:,} of {place['steps']:,}"
        + (f", epoch {place['epoch']:.2f}" if place["epoch"] is not None else "")
        + (
            f", {clock(place['eta'])} to go"
            if status["state"] == "running" and place["eta"]
            else ""
        )
    )
    if status["line"]:
        lines.append(status["line"])
    if now:
        lines += _number_lines(now)
    left = status["left_out"]
    if left["steps"] or left["clips"]:
        clips = ", ".join(entry["key"] for entry in left["clips"][:3])
        more = f" ({clips}{', …' if len(left['clips']) > 3 else ''})" if clips else ""
        lines.append(f"Left out: {left['steps']} steps, {len(left['clips'])} clips{more}")
    for entry in status["checkpoints"]:
        fault = f"not complete: {entry['fault']}" if entry["fault"] else "good"
        lines.append(f"Checkpoint {entry['samples_seen']:,}: {fault}, {size(entry['bytes'])}")
    lines += _validation_lines(status)
    for node, row in status["nodes"].items():
        lines.append(f"Node {node}: {node_text(row)}")
    lines += [f"Note: {text}" for text in status["notes"]]
    if status["model"]:
        lines.append(f"Model: {status['model']}")
    if status["mlflow"]:
        lines.append(f"MLflow: run {status['mlflow']['run_id']} at {status['mlflow']['uri']}")
    return lines


def clock(seconds: float) -> str:
    """`2 d 03:04`, `3:04:05` or `04:05`."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"


def size(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def node_text(row: Mapping[str, float]) -> str:
    """What a node did last, in a few words."""
    parts = [
        f"CPU {row['cpu_utilization_percentage']:.0f} %",
        f"memory {row['system_memory_usage_percentage']:.0f} %",
        f"{size(1e6 * row['disk_available_megabytes'])} of disk free",
    ]
    gpus = [v for key, v in row.items() if key.startswith("gpu_") and "utilization" in key]
    if gpus:
        parts.append("GPU " + ", ".join(f"{value:.0f}" for value in gpus) + " %")
    return ", ".join(parts)


def _number_lines(now: Mapping[str, Any]) -> list[str]:
    quarters = [f"{_short(v)}" for k, v in now["numbers"].items() if k.startswith("loss_sigma_q")]
    others = {
        key: value
        for key, value in now["numbers"].items()
        if key != "loss" and value is not None and not key.startswith("loss_sigma_q")
    }
    lines = [
        f"Mean of {now['steps']} steps: loss {_short(now['numbers'].get('loss'))} (first "
        f"{_short(now['first_loss'])})"
        + (f", by noise level {' '.join(quarters)}" if quarters else "")
        + "".join(f", {key} {_short(value)}" for key, value in others.items()),
        f"Speed: {now['samples_per_second']:.3g} samples/s, {now['seconds']:.3g} s a step"
        + (f", data wait {100 * now['data_wait']:.1f} %" if now["data_wait"] is not None else "")
        + (f", MFU {100 * now['mfu']:.1f} %" if now["mfu"] is not None else "")
        + f", memory {now['memory_gb']:.1f} GB",
    ]
    return lines


def _validation_lines(status: Mapping[str, Any]) -> list[str]:
    rows = status["validation"]
    best = status["best"]["samples_seen"] if status["best"] else None
    lines = []
    for entry in rows[-5:]:
        numbers = ", ".join(f"{key} {_short(value)}" for key, value in entry["metrics"].items())
        mark = "  ← best" if entry["samples_seen"] == best else ""
        lines.append(f"Validation {entry['samples_seen']:,}: {numbers}{mark}")
    if best is not None and best not in [entry["samples_seen"] for entry in rows[-5:]]:
        lines.append(f"Best: at {best:,} samples")
    return lines


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
