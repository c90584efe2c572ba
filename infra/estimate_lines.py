"""How an estimate of a training run reads: one run in lines, several as a table."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from infra.console import table

_PARTS = {
    "weights": "weights",
    "gradients": "gradients, fp32",
    "optimiser": "optimiser and fp32 weights",
    "average": "averaged weights (rank 0)",
    "activations": "activations kept",
    "recomputation": "block on its way back",
    "buckets": "communication buckets",
    "encoders": "frozen encoders",
    "overhead": "CUDA, NCCL, fragments (assumed)",
    "total": "in all",
}
_HEADER = (
    "recipe",
    "GPUs",
    "GB a GPU",
    "s a step",
    "clips/s",
    "run",
    "GPU-hours",
    "checkpoint",
)


def estimate_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """One estimate for a reader, the caveat first."""
    memory, counted = found["memory"], found["parameters"]
    yield found["caveat"]
    sizes = " and ".join(found["sizes"])
    yield f"{found['gpus']} x {found['gpu']}, {sizes}, MFU {found['mfu']:.0%} assumed"
    yield f"{counted['all'] / 1e9:.3f} billion weights, {counted['trainable'] / 1e9:.3f} trained"
    rows = [(text, f"{memory[name] / 1e9:.1f} GB") for name, text in _PARTS.items()]
    yield from table(rows, header=("memory of a GPU", ""))
    room = "fits" if found["fits"] else "does NOT fit: more GPUs, task.recompute=1, or less trained"
    yield f"of {memory['gpu'] / 1e9:.0f} GB: {room}"
    flops = found["flops"]
    yield (
        f"{flops['model'] / 1e12:.4g} TFLOP a step of the model, {flops['encoders'] / 1e12:.4g} of "
        "the frozen encoders (0 from cached latents)"
    )
    yield f"{found['seconds']:.3g} s a step, {found['clips_per_second']:.3g} clips/s"
    run = found["run"]
    yield f"run: {run['clips']} clips in {run['steps']} steps, {_hours(run['hours'])}"
    if epoch := found["epoch"]:
        yield f"epoch: {epoch['clips']} clips, {_hours(epoch['hours'])}"
    disk = {name: f"{size / 1e9:.1f} GB" for name, size in found["disk"].items()}
    yield (
        f"disk: {disk['checkpoint']} a checkpoint, at most {disk['checkpoints_kept']} of them, "
        f"{disk['model']} the model; latents {disk['latents_hour']} for an hour of video"
    )


def estimate_table(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Several estimates in Markdown, as docs/train-cluster.md has them."""
    rows = [_row(name, each) for name, each in found.items()]
    lines = ["| " + " | ".join(cells) + " |" for cells in (_HEADER, *rows)]
    return [lines[0], "|---" * len(_HEADER) + "|", *lines[1:]]


def _row(name: str, found: Mapping[str, Any]) -> Sequence[str]:
    memory, run = found["memory"], found["run"]
    room = "" if found["fits"] else " (does not fit)"
    return (
        f"`{name}`",
        f"{found['gpus']} x {found['gpu']}",
        f"{memory['total'] / 1e9:.0f} of {memory['gpu'] / 1e9:.0f}{room}",
        f"{found['seconds']:.2g}",
        f"{found['clips_per_second']:.2g}",
        _hours(run["hours"]),
        f"{run['hours'] * found['gpus']:.0f}",
        f"{found['disk']['checkpoint'] / 1e9:.0f} GB",
    )


def _hours(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.0f} min"
    return f"{hours:.0f} h" if hours < 48 else f"{hours / 24:.1f} days"
