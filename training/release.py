"""From averaged weights to a model folder: at a run's end, of its best model, or of a checkpoint.

A released folder appears complete or not at all, and `from_pretrained` takes it.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from training import checkpoint as ckpt
from training.card import write_card
from training.config import TrainConfig, binding_settings, read_config
from training.metrics import Progress, read_metrics
from training.output import TrainSummary, write_json
from training.task import Task, TrainingError
from training.tracking import tracked_run

BEST = "best"  # in a run's folder: the model whose validation was best, with metrics.json
METRICS = "metrics.json"
_KEPT_FULL = ("alignment",)  # so small that half of it saves nothing, and it runs in fp32
_LARGEST_HALF = 65504.0


class ExportError(ValueError):
    """A checkpoint that cannot be exported as it was asked for."""


def averaged_model(config: TrainConfig, task: Task, average: Mapping[str, Any]) -> Any:
    """The task's module with averaged weights, in evaluation mode, on the CPU.

    Frozen parameters are not averaged: they are what `task.build` makes them.

    Raises:
        ValueError: the average has tensors that the module does not know.
    """
    import torch

    torch.manual_seed(config.run.seed)
    model = task.build()
    unknown = model.load_state_dict(dict(average), strict=False).unexpected_keys
    if unknown:
        raise ValueError(
            f"the averaged weights have {unknown[0]} and {len(unknown) - 1} more that the model "
            "does not: they belong to another one."
        )
    return model.eval()


def write_release(
    config: TrainConfig,
    task: Task,
    model: Any,
    out: Path,
    folder: Path,
    *,
    note: Callable[[str], None],
    samples_seen: int | None = None,
    validated: Mapping[str, Any] | None = None,
    finish: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write a model folder with its card, in the place of one that is there.

    A model without its card is still a model: what keeps the card from being written is noted.

    Args:
        model: with averaged weights.
        out: the run's folder.
        samples_seen: the card tells the run up to here.
        validated: metrics of these weights; read from the run's folder where they are there.
        finish: changes the folder before it gets its name.
    """
    scratch = folder.with_name(f".{folder.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        task.save_model(model.state_dict(), scratch)
        try:
            parameters = sum(p.numel() for p in model.parameters())
            write_card(config, task, parameters, out, scratch, samples_seen, validated)
        except Exception as error:
            note(f"The model has no card: {type(error).__name__}: {error}")
        finish(scratch)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def export_model(config: TrainConfig, task: Task, out: Path, progress: Progress) -> TrainSummary:
    """Write `model/` from the averaged weights of the last checkpoint, then `summary.json`."""
    latest = ckpt.newest_checkpoint(out / "checkpoints", thorough=False)
    records = read_metrics(out / "metrics.jsonl")
    if latest is None or not records:
        raise TrainingError(f"{out} holds no checkpoint to export: start the run again.")
    folder = out / "model"
    model = averaged_model(config, task, latest.average())
    write_release(config, task, model, out, folder, note=progress.note)
    summary = TrainSummary(
        task=config.task.name,
        samples_seen=latest.samples_seen,
        steps=records[-1]["step"],
        loss=next((r["loss"] for r in reversed(records) if r["loss"] is not None), math.nan),
        seconds=round(sum(record["dt"] for record in records), 3),
        model=folder,
        run_id=run.run_id if config.run.track and (run := tracked_run(out)) else None,
    )
    settings = binding_settings(config)
    write_json(out / "summary.json", {**asdict(summary), "model": "model", "settings": settings})
    return summary


def export_checkpoint(
    out: Path,
    target: Path,
    task_types: Mapping[str, type],
    *,
    at: int | Literal["best"] | None = None,
    half: bool = False,
    settings: Sequence[str] = (),
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Write the model of one checkpoint of a run, finished or not, to a folder of its own.

    Args:
        at: the checkpoint of so many samples, or the best model; the newest by default.
        half: in half precision (fp16), but for the alignment block.
        settings: `a.b=c` for settings that a continuation may change, such as where data lies.

    Returns:
        `model`, `samples_seen`, `half`, `bytes`, and `metrics` of its validation where there was
        one.

    Raises:
        ExportError: there is no such checkpoint, or the target is not free.
        ResumeError: other settings, or other weights to start from, than the run's.
    """
    from pipelines.overrides import apply_overrides

    out, target = out.resolve(), target.resolve()
    if not (out / "config.json").is_file():
        raise ExportError(f"{out} is no folder of a training run: it has no config.json.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ExportError(f"{target} exists: give --out another folder, or remove this one.")
    finish = _halve if half else lambda folder: None
    if at == "best":
        samples_seen = _copy_best(out, target, finish)
    else:
        config = apply_overrides(read_config(out / "config.json", task_types), settings)
        found = _checkpoint(out / "checkpoints", at)
        ckpt.check_resume(found, config, found.record["fingerprint"])
        task, samples_seen = config.build_task(), found.samples_seen
        ckpt.check_start(found, task)
        model = averaged_model(config, task, found.average())
        write_release(
            config, task, model, out, target, note=note, samples_seen=samples_seen, finish=finish
        )
    validated = out / "validation" / ckpt.checkpoint_name(samples_seen) / METRICS
    return {
        "model": target,
        "samples_seen": samples_seen,
        "half": half,
        "bytes": sum(path.stat().st_size for path in target.rglob("*") if path.is_file()),
        "metrics": json.loads(validated.read_text()) if validated.is_file() else {},
    }


def _checkpoint(root: Path, at: int | str | None) -> ckpt.Checkpoint:
    complete = [path for path in root.glob("samples-*") if ckpt.fault(path, thorough=False) is None]
    found = [
        ckpt.Checkpoint(folder=path, record=json.loads((path / ckpt.RECORD).read_text()))
        for path in sorted(complete, reverse=True)
    ]
    if not found:
        raise ExportError(f"{root} holds no complete checkpoint: train on to the next one.")
    if at is None:
        return found[0]
    for checkpoint in found:
        if checkpoint.samples_seen == at:
            return checkpoint
    there = ", ".join(str(checkpoint.samples_seen) for checkpoint in reversed(found))
    raise ExportError(
        f"there is no checkpoint at {at} samples: expected one of {there}"
        + (", or best." if (root.parent / BEST).is_dir() else ".")
    )


def _copy_best(out: Path, target: Path, finish: Callable[[Path], None]) -> int:
    source = out / BEST
    if not (source / METRICS).is_file():
        raise ExportError(
            f"{out} has no best model: nothing was validated. Set validate.every_samples, or give "
            "--at a number of samples."
        )
    samples_seen = json.loads((source / METRICS).read_text())["samples_seen"]
    scratch = target.with_name(f".{target.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        shutil.copytree(source, scratch)
        (scratch / METRICS).unlink()  # is about the run, and says where it was best
        finish(scratch)
        if target.is_dir():
            target.rmdir()
        os.replace(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return samples_seen


def _halve(folder: Path) -> None:
    """Turn fp32 tensors of a model folder into fp16, file by file.

    Raises:
        ExportError: a value is too large for fp16.
    """
    import torch
    from safetensors.torch import load_file, save_file

    smaller = 0
    for path in sorted(folder.glob("*.safetensors")):
        if path.name.startswith(_KEPT_FULL):
            continue
        state = load_file(path)
        for name, value in state.items():
            if value.dtype == torch.float32:
                if value.numel() and value.abs().max() > _LARGEST_HALF:
                    raise ExportError(
                        f"{name} has values beyond {_LARGEST_HALF:g}, which fp16 cannot hold: "
                        "export without --half."
                    )
                state[name] = value.half()
                smaller += 2 * value.numel()
        save_file(state, path, {"format": "pt"})
    for path in folder.glob("*.safetensors.index.json"):
        index = json.loads(path.read_text())
        names = set(index["weight_map"].values())
        index["metadata"]["total_size"] = sum(_tensor_bytes(folder / name) for name in names)
        path.write_text(json.dumps(index, indent=2, sort_keys=True))
    if not smaller:
        raise ExportError("nothing in this model is larger in full precision: leave --half out.")


def _tensor_bytes(path: Path) -> int:
    from safetensors.torch import load_file

    return sum(value.nbytes for value in load_file(path).values())
