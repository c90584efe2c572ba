"""How far a batch is: items done, items an hour, and the time that is left."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from inference.batch.task import Task
from pipelines.progress import Line, clock, shown


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a batch stands; `left_seconds` is None as long as nothing tells how long a frame takes.

    stage: "read" (clips), "open" (engines) or "animate".
    """

    stage: str
    done: int = 0
    total: int = 0
    failed: int = 0
    items_per_hour: float = 0.0
    left_seconds: float | None = None


class Meter:
    """Measures a run by what its items cost, not by their number: a clip may be long or short.

    Args:
        pending: the tasks to be done, measured.
        finished: how many were done before.
        engines: at work at the same time.
        earlier: (work, seconds of an engine) of items done before, for as long as there is nothing
            else to tell the speed from.
        now: a clock, in seconds.
    """

    def __init__(
        self,
        pending: Sequence[Task],
        finished: int,
        engines: int,
        earlier: tuple[float, float] = (0.0, 0.0),
        now: Callable[[], float] = time.monotonic,
    ):
        self._now, self._engines = now, engines
        self._finished, self._total = finished, finished + len(pending)
        self._left = {task.id: task.work for task in pending}
        self._earlier = earlier
        self._work = self._seconds = self._spent = 0.0
        self._began: float | None = None
        self.counts: Counter[str] = Counter()

    def add(self, result: Task) -> None:
        """Count a finished item."""
        if self._began is None:
            # Opening the engines is no part of the speed.
            self._began = self._now() - result.seconds
        work = self._left.pop(result.id, 0.0)
        self._spent += result.seconds
        if result.status == "done" and result.seconds:
            self._work += work
            self._seconds += result.seconds
        self.counts[result.status] += 1

    @property
    def seconds_per_work(self) -> float | None:
        """Seconds that an engine takes for a frame of the model's own size and steps."""
        work, seconds = (self._work, self._seconds) if self._work else self._earlier
        return seconds / work if work else None

    @property
    def items_per_hour(self) -> float:
        """Finished in this run, of all engines together."""
        elapsed = 0.0 if self._began is None else self._now() - self._began
        return 3600 * self.counts["done"] / elapsed if elapsed > 0 else 0.0

    def left_seconds(self) -> float | None:
        """Until all is done; None as long as there is nothing to tell it from."""
        speed = self.seconds_per_work
        if not self._left:
            return 0.0
        if speed is None:
            return None
        engines = min(self._engines, len(self._left))
        costs = [work * speed for work in self._left.values()]
        # What the engines have done so far of the items that they are at.
        at_work = 0.0
        if self._began is not None:
            at_work = self._engines * (self._now() - self._began) - self._spent
        at_work = min(max(0.0, at_work), engines * sum(costs) / len(costs))
        return max((sum(costs) - at_work) / engines, 0.0)

    def standing(self) -> Standing:
        """For the bar."""
        return Standing(
            stage="open" if self._began is None else "animate",
            done=self._finished + sum(self.counts.values()),
            total=self._total,
            failed=self.counts["failed"],
            items_per_hour=self.items_per_hour,
            left_seconds=self.left_seconds(),
        )


def batch_bar(visible: bool) -> AbstractContextManager[Callable[[Standing], None]]:
    """A function that draws where a batch stands on stderr."""
    return shown(_line) if visible else nullcontext(lambda standing: None)


def _line(standing: Standing) -> Line:
    titles = {"read": "reading clips", "open": "opening engines", "animate": "animating"}
    return Line(
        stage=standing.stage,
        title=titles[standing.stage],
        done=standing.done,
        total=standing.total,
        detail=_detail(standing),
        finished=standing.stage == "animate" and standing.done == standing.total,
    )


def _detail(standing: Standing) -> str:
    parts = []
    if standing.items_per_hour:
        parts.append(
            f"{standing.items_per_hour:.{0 if standing.items_per_hour >= 10 else 1}f} items/h"
        )
    if standing.failed:
        parts.append(f"{standing.failed} failed")
    if standing.left_seconds is not None and standing.done < standing.total:
        parts.append(f"{clock(standing.left_seconds)} left")
    return " · ".join(parts)
