"""Stages of the demonstration that are done once: their results and times survive a restart."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infra.console import note


class Stages:
    """Results by name in `stages.json`. A stage that is there is not run again.

    Raises ValueError where the folder holds a demonstration with other settings.
    """

    def __init__(self, folder: Path, *, settings: dict[str, Any], total: int) -> None:
        self._path = folder / "stages.json"
        self._total = total
        self._number = 0
        self._state: dict[str, Any] = {"settings": settings, "stages": {}}
        if self._path.exists():
            self._state = json.loads(self._path.read_text(encoding="utf-8"))
            if self._state["settings"] != settings:
                raise ValueError(
                    f"{folder} holds a demonstration with the settings "
                    f"{self._state['settings']}, expected {settings}; choose another --out "
                    "or delete the folder"
                )

    def run(self, name: str, title: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of a stage: that of `work`, or the one that an earlier run left."""
        self._number += 1
        label = f"[{self._number}/{self._total}] {title}"
        if name in self._state["stages"]:
            note(f"{label}: done before")
            return self._state["stages"][name]["result"]
        note(label)
        started = time.monotonic()
        result = work()
        seconds = time.monotonic() - started
        note(f"      {seconds:.1f} s")
        self._state["stages"][name] = {"seconds": seconds, "title": title, "result": result}
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._state, indent=1, default=str), encoding="utf-8")
        os.replace(temporary, self._path)
        return json.loads(json.dumps(result, default=str))

    def seconds(self) -> dict[str, tuple[str, float]]:
        """Title and duration of every finished stage, by name, in order."""
        return {
            name: (stage["title"], stage["seconds"])
            for name, stage in self._state["stages"].items()
        }
