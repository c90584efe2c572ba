"""The card of a released model: what it is, how it is made again, what its data's licences mean.

model/
  MODEL_CARD.md
  curve.svg       the loss, by samples seen
"""

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from animator.licences import non_commercial
from training.checkpoint import checkpoint_name
from training.config import TrainConfig, describe
from training.curve import loss_curve
from training.metrics import TIMINGS, Record, read_metrics
from training.task import Task
from training.tracking import flatten

CARD, CURVE = "MODEL_CARD.md", "curve.svg"
LATE = 20  # one part in so many, at the run's end, gives the last values
_VERSIONS = ("stableanimator-pp", "torch", "deepspeed", "ray")
_FOLDERS = ("shards", "motion")  # settings of a task that the command line has options for
_WORDS = {
    "distance_none": "distance to the truth, of the frame's longer side: without alignment",
    "distance_closed_form": "closed form, each frame by itself",
    "distance": "learned, each frame by itself",
    "distance_clip": "learned, one transform a clip",
    "certainty_loss": "error of the expected distance, as a logarithm",
}
_NOT_LEARNED = TIMINGS | frozenset(
    "samples_seen step samples lr grad_norm skipped replaced epoch".split()
)


def write_card(
    config: TrainConfig,
    task: Task,
    parameters: int,
    out: Path,
    folder: Path,
    samples_seen: int | None = None,
    validated: Mapping[str, Any] | None = None,
) -> None:
    """Write card and curve of a run into the folder of its released model.

    Args:
        parameters: of the model.
        out: the run's folder.
        folder: the released model, complete but for its card.
        samples_seen: what comes after so many is not part of the model.
        validated: metrics of these weights; by default as the run's folder has them.
    """
    import jinja2

    records = [
        record
        for record in read_metrics(out / "metrics.jsonl")
        if samples_seen is None or record["samples_seen"] <= samples_seen
    ]
    known = [record for record in records if record["loss"] is not None]
    curve = loss_curve(
        [record["samples_seen"] for record in known],
        [record["loss"] for record in known],
        f"Loss, {task.name}",
    )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # Markdown
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["cell"] = _cell
    validated = validated or _validation(out, records[-1]["samples_seen"])
    content = _content(config, task, parameters, records, _about(folder), validated)
    text = environment.get_template("model_card.md.jinja").render(**content, curve=CURVE)
    (folder / CURVE).write_text(curve, encoding="utf-8")
    (folder / CARD).write_text(text, encoding="utf-8")


def training_command(config: TrainConfig) -> list[str] | None:
    """The command that trains under these settings, in parts; None for a task without recipes.

    It names the nearest recipe and every setting that differs from it. Folders are DIR.
    """
    from training.recipes import RECIPES

    settings = flatten(describe(config))
    changes: dict[str, dict[str, Any]] = {}
    for name, recipe in RECIPES.items():
        base = flatten(describe(recipe()))
        if base["name"] == config.task.name:
            changes[name] = {k: v for k, v in settings.items() if base.get(k) != v}
    if not changes:
        return None
    name = min(changes, key=lambda name: len(changes[name]))
    changed = dict(sorted(changes[name].items()))
    parts = [f"animator train {config.task.name}", f"--recipe {name}"]
    for folder in _FOLDERS:
        if changed.pop(f"task.{folder}", None):
            parts.append(f"--{folder} DIR")
    sets = (shlex.quote(f"{key}={_assigned(value)}") for key, value in changed.items())
    return [*parts, *(f"--set {text}" for text in sets), f"--out runs/{config.task.name}"]


def _assigned(value: Any) -> str:
    """A setting as `--set` takes it, without the names of folders."""
    if isinstance(value, str):
        return "DIR" if os.sep in value else value
    return "none" if value is None else json.dumps(value)


def _content(
    config: TrainConfig,
    task: Task,
    parameters: int,
    records: Sequence[Record],
    about: Mapping[str, Any],
    validation: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What the template shows; `about` is the model's `config.json`."""
    trained_on = about.get("trained_on", {})
    licences = _licences(about)
    late = records[-max(1, len(records) // LATE) :]
    return {
        "name": task.name,
        "parameters": parameters,
        "half_life": config.ema.half_life,
        "sizes": about.get(task.name, {}),
        "command": training_command(config),
        "training": _training(config, records),
        "late": len(late),
        "numbers": _means(late),
        "validation": {k: v for k, v in (validation or {}).items() if isinstance(v, float)},
        "data": _data(task, trained_on.get(task.name, {})),
        "licences": licences,
        "clips": any("motion" not in data for data in trained_on.values()),
        "restricted": sorted({text for _, text in licences if non_commercial(text)}),
    }


def _about(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _training(config: TrainConfig, records: Sequence[Record]) -> dict[str, str]:
    import torch

    from inference.timing import machine

    run, last = config.run, records[-1]
    use_gpu = torch.cuda.is_available() if run.use_gpu is None else run.use_gpu
    found = machine(torch.device("cuda" if use_gpu and torch.cuda.is_available() else "cpu"))
    where = f"{found['processor']}, {os.cpu_count()} cores"
    if use_gpu:
        where = f"{found.get('gpu', 'GPUs of other machines')}, one a worker; {where}"
    hours = sum(record["dt"] for record in records) / 3600
    versions = ", ".join(f"{name} {version(name)}" for name in _VERSIONS)
    left_out = last.get("skipped") or 0
    return {
        "samples seen": f"{last['samples_seen']:,} in {last['step']:,} steps"
        + (f", of which {left_out:,} were left out" if left_out else ""),
        "seed": str(run.seed),
        "hours": f"{hours:.2f} in steps, all attempts together",
        "workers": f"{run.num_workers}, {run.precision}",
        "machine": where,
        "versions": f"Python {found['python']}, {versions}",
    }


def _means(records: Sequence[Record]) -> dict[str, float]:
    """Mean of every number that the task logged, under the words for it; the loss first."""
    keys = records[-1].keys() - _NOT_LEARNED - {"loss"}
    means: dict[str, float] = {}
    for key in ["loss", *(key for key in _WORDS if key in keys), *sorted(keys - _WORDS.keys())]:
        values = [record[key] for record in records if record.get(key) is not None]
        if values:
            means[_WORDS.get(key, key)] = sum(values) / len(values)
    return means


def _validation(out: Path, samples_seen: int) -> dict[str, float] | None:
    """What was measured of these very weights on held-out data."""
    path = out / "validation" / checkpoint_name(samples_seen) / "metrics.json"
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    return {key: value for key, value in found.items() if key != "seconds"}


def _data(task: Task, learned: Mapping[str, Any]) -> dict[str, str]:
    """Args: learned: what the model's `config.json` says that this task was trained on."""
    found = {"fingerprint (SHA-256)": task.fingerprint}
    if motion := learned.get("motion"):
        found["sequences of motion capture"] = f"{sum(motion.values()):,}"
        found["frames"] = f"{task.num_samples:,}"
    else:
        found["clips"] = f"{task.num_samples:,}"
    others = {key: value for key, value in learned.items() if key not in ("data", "motion")}
    return found | {key: str(value) for key, value in others.items()}


def _licences(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the model was made from, and the licence of each."""
    motion = about.get("trained_on", {}).get("alignment", {}).get("motion", {})
    found = [(f"motion capture, {number:,} sequences", name) for name, number in motion.items()]
    if "licence" in about:
        found.append(("the weights that training started from", about["licence"]))
    for kind, encoder in about.get("encoders", {}).items():
        found.append((f"{kind}: {encoder['name']}", encoder["licence"]))
    return found


def _cell(value: Any) -> str:
    """Text that stays within a cell of a table."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return " ".join(text.replace("|", "/").split())
