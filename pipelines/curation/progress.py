"""How far a run is: read from its journal, drawn as a bar or as a line now and then."""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipelines.curation import ledger
from pipelines.curation.plan import Plan
from pipelines.schema import ShardRecord

_POLL_SECONDS = 0.5
_LINE_SECONDS = 15.0
_STAGES = {"models": "opening models", "hash": "reading files", "report": "writing the report"}


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands. `stage` is `hash`, `models`, `work` or `report`; ETA in seconds."""

    stage: str
    done: int
    total: int
    kept: int = 0
    rejected: int = 0
    failed: int = 0
    clips: int = 0
    eta_seconds: float | None = None


@contextmanager
def report_progress(
    journal: ledger.RunJournal,
    plan: Plan,
    done: Sequence[ShardRecord],
    tell: Callable[[Progress], Any],
) -> Iterator[None]:
    """Tell of progress, from a thread, while the body runs."""
    stop = threading.Event()
    verdicts = {
        source.id: (source.verdict, sum(clip.verdict == "kept" for clip in source.clips))
        for record in done
        for source in record.sources
    }
    before, began = len(verdicts), time.monotonic()

    def look() -> None:
        for event in journal.new_events():
            verdicts[event.source] = (event.verdict, event.clips)
        counts = [verdict for verdict, _ in verdicts.values()]
        fresh, left = len(verdicts) - before, len(plan.sources) - len(verdicts)
        eta = (time.monotonic() - began) / fresh * left if fresh else None
        tell(
            Progress(
                stage="work",
                done=len(verdicts),
                total=len(plan.sources),
                kept=counts.count("kept"),
                rejected=counts.count("rejected"),
                failed=counts.count("failed"),
                clips=sum(clips for _, clips in verdicts.values()),
                eta_seconds=eta,
            )
        )

    def watch() -> None:
        while not stop.wait(_POLL_SECONDS):
            look()

    thread = threading.Thread(target=watch, name="curation-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        look()


@contextmanager
def progress_bar() -> Iterator[Callable[[Progress], None]]:
    """A function to hand to `curate` as `progress`; it draws on stderr."""
    if not sys.stderr.isatty():
        yield _Lines().show
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("curating", total=None, detail="")

        def show(state: Progress) -> None:
            bar.update(
                task,
                description=_STAGES.get(state.stage, "curating"),
                completed=state.done,
                total=state.total,
                detail=_detail(state, colour=True),
            )

        yield show


class _Lines:
    """Plain lines for logs, a quarter of a minute apart, and one for each stage."""

    def __init__(self) -> None:
        self.stage = ""
        self.last = 0.0

    def show(self, state: Progress) -> None:
        """Print the state if it is time to."""
        now = time.monotonic()
        finished = state.stage == "work" and state.done == state.total
        stage = f"{state.stage} done" if finished else state.stage
        if stage == self.stage and (finished or now - self.last < _LINE_SECONDS):
            return
        self.stage, self.last = stage, now
        name = _STAGES.get(state.stage, "curating")
        print(f"{name} {state.done}/{state.total} {_detail(state)}".rstrip(), file=sys.stderr)


def _detail(state: Progress, *, colour: bool = False) -> str:
    if state.stage != "work":
        return ""
    parts = [
        ("green", f"{state.kept} kept ({state.clips} clips)"),
        ("yellow", f"{state.rejected} rejected"),
        ("red", f"{state.failed} failed"),
    ]
    text = " · ".join(f"[{name}]{part}[/]" if colour else part for name, part in parts)
    if state.eta_seconds is None or state.done == state.total:
        return text
    minutes, seconds = divmod(round(state.eta_seconds), 60)
    hours, minutes = divmod(minutes, 60)
    left = f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
    return f"{text} · {left} left"
