"""What a worker has to say besides numbers: notes for the console, and clips that were replaced.

out/notes.jsonl            one line a note, of rank 0
out/left-out/clips.jsonl   one line a clip that could not be read, of every worker
"""

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from training.guard import FOLDER
from training.metrics import Appender, read_lines

NOTES = "notes.jsonl"
CLIPS = Path(FOLDER) / "clips.jsonl"


class Journal:
    """Appends to both files; a full disk delays it and never stops the run.

    Args:
        notes: write notes (rank 0); other workers have none of their own.
    """

    def __init__(self, out: Path, *, notes: bool) -> None:
        self._notes = Appender(out / NOTES) if notes else None
        self._path = out / CLIPS
        self._clips: Appender | None = None
        self._known: set[str] | None = None

    def note(self, samples_seen: int, text: str) -> None:
        """Something the user should know: shown by the driver."""
        if self._notes is not None:
            self._notes.write({"time": time.time(), "samples_seen": samples_seen, "text": text})

    def replaced(self, samples_seen: int, problems: Iterable[tuple[str, str]]) -> None:
        """Name each clip that was replaced, once, over all attempts of the run."""
        for key, reason in problems:
            if self._clips is None or self._known is None:
                self._known = {entry["key"] for entry in read_lines(self._path, "key")}
                self._clips = Appender(self._path)
            if key not in self._known:
                self._known.add(key)
                entry = {"key": key, "reason": reason, "samples_seen": samples_seen}
                self._clips.write({**entry, "time": time.time()})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._notes, self._clips):
            if file is not None:
                file.close()


def say(out: Path, text: str) -> None:
    """Write one note from wherever it comes, such as a thread that talks to a tracker."""
    file = Appender(out / NOTES)
    file.write({"time": time.time(), "text": text})
    file.close()


def describe_note(entry: Mapping[str, Any]) -> str:
    """How a line of either file reads on a console."""
    if "key" in entry:
        return f"Clip {entry['key']} was replaced: {entry['reason']}"
    return entry["text"]
