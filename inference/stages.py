"""Wall-clock seconds of the stages of a run."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")


class Timings:
    """Seconds by stage; a stage within another takes its time away from the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time spent inside for this stage."""
        self._turn()
        self._running.append(name)
        self.seconds.setdefault(name, 0.0)
        try:
            yield
        finally:
            self._turn()
            self._running.pop()

    def each(self, name: str, items: Iterator[Item]) -> Iterator[Item]:
        """The items; the time spent on making them is this stage's, that on using them not."""
        while True:
            with self.stage(name):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def record(self) -> dict[str, float]:
        """For the JSON beside an output."""
        return {name: round(value, 3) for name, value in self.seconds.items()}

    def _turn(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now
