"""Validations in MLflow: their numbers and pictures, and the best model in the registry.

The registry holds pointers: where the weights lie, with their metrics. Nothing heavy is uploaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.outbox import Outbox, warn
from training.tracking import Say, TrackedRun, client_of, metrics_of, refused


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What a validation found: `folder` holds pictures and tables, which become artefacts."""

    task: str
    samples_seen: int
    metrics: Mapping[str, float]
    folder: Path
    fingerprint: str
    metric: str  # by which models are compared
    higher_is_better: bool
    best: Path | None = None  # the model folder, where it is the best so far
    time_ms: int = 0


def validation_outbox(run: TrackedRun, say: Say = warn) -> Outbox[Validation]:
    """A queue of validations to a run: `val/…`, pictures, and the best model's registration."""

    def send(items: list[Validation]) -> None:
        client = client_of(run.uri)
        for item in items:
            record = {f"val/{name}": value for name, value in item.metrics.items()}
            place = {"samples_seen": item.samples_seen, "time_ms": item.time_ms}
            client.log_batch(run.run_id, metrics=metrics_of(record | place))
            for path in sorted(item.folder.iterdir()):
                if path.is_file():
                    client.log_artifact(run.run_id, str(path), f"validation/{item.folder.name}")
            if item.best is not None:
                _register(client, run, item, item.best)

    return Outbox("MLflow", send, together=1, refused=refused, say=say)


def registry_name(task: str) -> str:
    """The name that a task's best models are registered under."""
    return f"stableanimator-{task}"


def _register(client: Any, run: TrackedRun, item: Validation, folder: Path) -> None:
    """A version in the registry that points to the folder; `best` names it if it is better.

    A version of other data or of another metric cannot be compared and gives way.
    """
    name, value = registry_name(item.task), item.metrics[item.metric]
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in (".json", ".md", ".svg"):
            client.log_artifact(run.run_id, str(path), "best")
    try:
        client.create_registered_model(name, description="Pointers: `folder` has the weights.")
    except Exception as error:
        if getattr(error, "error_code", None) != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {
        "folder": str(folder),
        "samples_seen": str(item.samples_seen),
        "metric": item.metric,
        "value": repr(value),
        "fingerprint": item.fingerprint,
        **{f"val.{key}": repr(number) for key, number in item.metrics.items()},
    }
    held = client.search_model_versions(f"name = '{name}' and run_id = '{run.run_id}'")
    same = [v for v in held if v.tags.get("samples_seen") == tags["samples_seen"]]
    if same:  # of an attempt that broke off after it
        version = same[0].version
    else:
        source = f"{client.get_run(run.run_id).info.artifact_uri}/best"
        version = client.create_model_version(name, source, run.run_id, tags=tags).version
    try:
        holder = client.get_model_version_by_alias(name, "best").tags
    except Exception:
        holder = {}
    rival = all(holder.get(key) == tags[key] for key in ("metric", "fingerprint"))
    worse = rival and (float(holder["value"]) - value) * (1 if item.higher_is_better else -1) > 0
    if not worse:
        client.set_registered_model_alias(name, "best", version)
