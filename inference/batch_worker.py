"""The worker's side of a batch: one engine, one item after another, each done or recorded.

No Ray in here: `inference/batch.py` has Ray Data call `EngineActor`.
"""

import json
import logging
import os
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from inference import outputs
from inference.engine_factory import DEFAULT_FACTORY, Engine, open_engine
from inference.outputs import FolderLock
from inference.requests import AnimationRequest

MAX_DEATHS = 3
WORK = ".batch"
WORKERS = ".batch.workers"  # held by every worker, so that a run never overlaps a killed one's
WORKERS_SECONDS = 60.0

log = logging.getLogger(__name__)


class BatchError(ValueError):
    """A batch that cannot be started as asked; the message says what to change."""


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """What to run, on how many engines, each of how many CPUs.

    `cpus_per_engine` None shares out this machine's CPUs, and is 1 on a cluster.
    """

    manifest: Path
    out: Path
    model_dir: Path
    engines: int = 1
    cpus_per_engine: int | None = None
    face: str = "auto"
    pose: str = "auto"
    alignment: str = "auto"
    engine_factory: str = DEFAULT_FACTORY

    def __post_init__(self) -> None:
        for name in ("engines", "cpus_per_engine"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BatchError(f"{name} is {value}, expected 1 or more")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One item on its way to a worker and back; travels as JSON text in a row of Ray Data."""

    id: str
    identity: str
    request: dict[str, Any]
    status: str = "pending"
    error: str = ""
    seconds: float = 0.0
    final: Path = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "final", Path(self.request["output"]))

    @property
    def error_file(self) -> Path:
        """There exactly if the item failed."""
        return self.final.with_suffix(".error.json")

    @property
    def starts_file(self) -> Path:
        """One byte for every start: how often a process died on the item."""
        return self.final.parent / WORK / f"{self.final.stem}.starts"

    def is_done(self) -> bool:
        """Whether this very item is published, whole."""
        record = outputs.published(self.final)
        return record is not None and record.get("identity") == self.identity

    def ended(self, status: str, error: str = "", seconds: float = 0.0) -> "Task":
        """The result; an error file is there exactly if the item failed."""
        if error:
            record = {"id": self.id, "identity": self.identity, "error": error}
            outputs.write_json(self.error_file, {**record, "request": self.request})
        else:
            self.error_file.unlink(missing_ok=True)
        self.starts_file.unlink(missing_ok=True)
        return replace(self, status=status, error=error, seconds=round(seconds, 3))

    def to_row(self) -> dict[str, str]:
        """The task as a row of Ray Data."""
        values = asdict(self)
        del values["final"]
        return {"task": json.dumps(values)}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Task":
        """The inverse of `to_row`."""
        return cls(**json.loads(row["task"]))


class EngineActor:
    """One engine in a Ray Data actor: a row in, a result row out, whatever happens between."""

    def __init__(self, config: BatchConfig) -> None:
        self.lock = FolderLock(config.out, WORKERS, "batch", shared=True, wait=WORKERS_SECONDS)
        self.engine: Engine | None = None
        self.refusal = ("", "")
        try:
            self.engine = open_engine(
                config.engine_factory,
                config.model_dir,
                face=config.face,
                pose=config.pose,
                alignment=config.alignment,
            )
        except Exception as error:  # Ray Data would tell the driver no more than that it died
            log.exception("the engine cannot be opened")
            status = "refused" if isinstance(error, ValueError) else "broken"
            self.refusal = (status, sentence(error))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Make one item and publish it, or record why it failed; never raises for the item."""
        task = Task.from_row(row)
        if self.engine is None:
            status, error = self.refusal
            return replace(task, status=status, error=error).to_row()
        if task.is_done():  # the process died after publishing, before it could answer
            return task.ended("done").to_row()
        started = time.time()
        try:
            self._make(self.engine, task)
        except Exception as error:
            if not isinstance(error, ValueError):
                log.exception("%s: failed", task.id)
            return task.ended("failed", sentence(error), time.time() - started).to_row()
        return task.ended("done", seconds=time.time() - started).to_row()

    def _make(self, engine: Engine, task: Task) -> None:
        deaths = task.starts_file.stat().st_size if task.starts_file.exists() else 0
        if deaths >= MAX_DEATHS:
            raise RuntimeError(f"the engine's process died {deaths} times on this item")
        with task.starts_file.open("ab") as stream:
            stream.write(b".")
        staged = task.starts_file.with_name(f"{task.final.stem}.{os.getpid()}.mp4")
        request = AnimationRequest.from_json({**task.request, "output": staged})
        try:
            made = engine.run(request)
            record = {**made, "id": task.id, "output": task.final.name, "identity": task.identity}
            outputs.publish(staged, task.final, outputs.describe(staged, record))
        finally:
            for path in (staged, staged.with_suffix(".json")):
                path.unlink(missing_ok=True)


def sentence(error: BaseException) -> str:
    """The error's first line, with its type where it is no user's mistake."""
    text = str(error).strip().splitlines() or ["no reason given"]
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"{kind}{text[0]}"[:500]
