"""How far a run is: read from its journal, drawn as a bar or as a line now and then."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.curation import ledger
from pipelines.curation.ledger import DoneShards, Event
from pipelines.curation.plan import Plan
from pipelines.curation.timings import append_timings
from pipelines.progress import Line, clock, polling, shown

_STAGES = {
    "list": "listing sources",
    "models": "opening models",
    "records": "reading records",
    "duplicates": "looking for duplicates",
    "repack": "repacking shards",
    "report": "writing the report",
}


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands. `stage` is `list`, `models`, `work`, then `records`, `duplicates`,
    `repack` and `report`.

    clips: kept; video_seconds: of the sources done in this run.
    """

    stage: str
    done: int = 0
    total: int = 0
    kept: int = 0
    rejected: int = 0
    failed: int = 0
    clips: int = 0
    video_seconds: float = 0.0
    videos_per_hour: float | None = None
    eta_seconds: float | None = None


class _Count:
    """Counts events; one that is told again, of a shard that was begun anew, counts once."""

    def __init__(self, done: DoneShards, again: frozenset[str]) -> None:
        self.counts = {name: done.totals.get(name, 0) for name in ("kept", "rejected", "failed")}
        if set(done.failed) <= again:
            # These come again, one by one.
            self.counts["failed"] = 0
        self.clips = done.totals.get("clips", 0)
        self.video_seconds = 0.0
        # A number a source: millions of them must fit into the driver's memory.
        self.seen: set[int] = set()

    def add(self, events: Iterable[Event]) -> None:
        for event in events:
            if event.verdict not in self.counts:
                continue
            number = int(event.source, 16)
            if number in self.seen:
                continue
            self.seen.add(number)
            self.counts[event.verdict] += 1
            self.clips += event.clips
            self.video_seconds += event.video_seconds


@contextmanager
def report_progress(
    journal: ledger.RunJournal,
    folder: Path,
    plan: Plan,
    done: DoneShards,
    again: frozenset[str],
    tell: Callable[[Progress], Any],
) -> Iterator[None]:
    """Tell of progress, from a thread, while the body runs; stage times go to the folder."""
    count, began = _Count(done, again), time.monotonic()

    def look() -> None:
        events = journal.new_events()
        append_timings(folder, [(event.source, event.seconds) for event in events])
        count.add(events)
        known, fresh = min(sum(count.counts.values()), plan.num_sources), len(count.seen)
        rate = fresh / max(time.monotonic() - began, 1e-6)
        tell(
            Progress(
                stage="work",
                done=known,
                total=plan.num_sources,
                **count.counts,
                clips=count.clips,
                video_seconds=count.video_seconds,
                videos_per_hour=3600 * rate if fresh else None,
                eta_seconds=(plan.num_sources - known) / rate if fresh else None,
            )
        )

    with polling(look, "curation-progress"):
        yield


def progress_bar() -> AbstractContextManager[Callable[[Progress], None]]:
    """A function to hand to `curate` as `progress`; it draws on stderr."""
    return shown(_line)


def _line(state: Progress) -> Line:
    return Line(
        stage=state.stage,
        title=_STAGES.get(state.stage, "curating"),
        done=state.done,
        total=state.total,
        detail=_detail(state),
        finished=state.stage == "work" and state.done == state.total,
    )


def _detail(state: Progress) -> str:
    if state.stage != "work":
        return ""
    parts = [
        ("green", f"{state.kept} kept ({state.clips} clips)"),
        ("yellow", f"{state.rejected} rejected"),
        ("red", f"{state.failed} failed"),
    ]
    text = " · ".join(f"[{name}]{part}[/]" for name, part in parts)
    if state.videos_per_hour is not None:
        text += f" · {state.video_seconds / 3600:.1f} h of video · {state.videos_per_hour:.0f}/h"
    if state.eta_seconds is None or state.done == state.total:
        return text
    return f"{text} · {clock(state.eta_seconds)} left"
