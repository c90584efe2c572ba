"""One item of a batch on its way from the manifest to a worker and back."""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from inference import outputs

WORK = ".batch"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One item; travels as JSON text in a row of Ray Data.

    request: the item as `AnimationRequest.to_json` has it.
    shape: how the engine is to work on it where that is not the default: size, framing, align.
    run: which run of the batch this is.
    frames: of its driving clip; 0 where it cannot be read.
    work: what it costs, in frames of the model's own size at its own number of steps.
    shares: what is computed once for all items of an engine that have it: its driving clip and its
        reference, by content.
    seconds: that an engine spent on it.
    reused: how often perception did not look again, by kind.
    """

    id: str
    identity: str
    request: dict[str, Any]
    shape: dict[str, Any] = field(default_factory=dict)
    run: str = ""
    frames: int = 0
    work: float = 0.0
    shares: tuple[str, str] = ("", "")
    status: str = "pending"
    error: str = ""
    seconds: float = 0.0
    reused: Mapping[str, int] = field(default_factory=dict)
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

    @property
    def states(self) -> Path:
        """Where a long item keeps what has been computed of it, for whoever goes on with it."""
        return self.final.parent / WORK / f"{self.identity}.states"

    @property
    def starts(self) -> int:
        """How often the item was begun in this run without coming to an end."""
        try:
            return self.starts_file.stat().st_size
        except FileNotFoundError:
            return 0

    def is_done(self) -> bool:
        """Whether this very item is published, whole."""
        record = outputs.published(self.final)
        return record is not None and record.get("identity") == self.identity

    def is_outdated(self) -> bool:
        """Whether something else is published under the item's name."""
        record = outputs.read_json(self.final.with_suffix(".json"))
        return record is not None and record.get("identity") not in (None, self.identity)

    def failure(self) -> str | None:
        """Why the item failed in this very run, or None."""
        record = outputs.read_json(self.error_file) or {}
        same = record.get("run") == self.run and record.get("identity") == self.identity
        return str(record.get("error")) if same and self.run else None

    def ended(self, status: str, error: str = "", seconds: float = 0.0, **values: Any) -> "Task":
        """The result; an error file is there exactly if the item failed."""
        if error:
            record = {"id": self.id, "identity": self.identity, "run": self.run, "error": error}
            outputs.write_json(self.error_file, {**record, "request": self.request})
        else:
            self.error_file.unlink(missing_ok=True)
        self.starts_file.unlink(missing_ok=True)
        return replace(self, status=status, error=error, seconds=round(seconds, 3), **values)

    def to_json(self) -> str:
        """The task as text."""
        values = asdict(self)
        del values["final"]
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> "Task":
        """The inverse of `to_json`."""
        values = json.loads(text)
        values["shares"] = tuple(values["shares"])
        if "size" in values["shape"]:
            values["shape"]["size"] = tuple(values["shape"]["size"])
        return cls(**values)


def sweep(out: Path, pending: Iterable[Task]) -> None:
    """Remove what a killed run left half made, but for long items that can be continued."""
    (out / WORK).mkdir(parents=True, exist_ok=True)
    kept = {task.states for task in pending}
    for path in {*(out / WORK).iterdir(), *out.glob(".*.json.*.tmp")} - kept:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
