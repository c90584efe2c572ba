"""How far an encoding run is: read from its journal, drawn as a bar or as a line now and then."""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pipelines.curation.ledger import RunJournal

_POLL_SECONDS = 0.5
_LINE_SECONDS = 15.0


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands; frames are counted as their shards are committed, ETA is in seconds."""

    stage: str  # "models" or "encode"
    clips: int = 0
    total_clips: int = 0
    failed: int = 0
    frames: int = 0
    seconds: float = 0.0
    eta_seconds: float | None = None

    @property
    def clips_per_second(self) -> float:
        return self.clips / self.seconds if self.seconds else 0.0

    @property
    def frames_per_second(self) -> float:
        return self.frames / self.seconds if self.seconds else 0.0


@dataclass
class Spent:
    """Seconds of all workers by kind of work, and those that went by since the first clip."""

    seconds: dict[str, float] = field(default_factory=dict)
    wall_seconds: float = 0.0

    def add(self, seconds: Mapping[str, float]) -> None:
        """Count the seconds of one clip."""
        for name, value in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value

    def shares(self) -> dict[str, float]:
        """Share of the workers' time in each kind of work; `rest` is what no kind took."""
        total = self.seconds.get("total", 0.0)
        if not total:
            return {}
        kinds = {name: value for name, value in self.seconds.items() if name != "total"}
        shares = {name: round(value / total, 4) for name, value in sorted(kinds.items())}
        return shares | {"rest": round(max(0.0, 1 - sum(kinds.values()) / total), 4)}


@contextmanager
def report_progress(
    journal: RunJournal, frames: Mapping[str, int], clips: int, tell: Callable[[Progress], Any]
) -> Iterator[Spent]:
    """Tell of progress, from a thread, while the body runs; gives where the time went.

    Args:
        frames: of each shard to be encoded, by its name.
        clips: to be encoded.
    """
    stop, spent = threading.Event(), Spent()
    # Speed is that of the work: opening encoders takes longer than a short run.
    began: list[float] = []
    done: dict[str, bool] = {}
    committed: set[str] = set()

    def look() -> None:
        for event in journal.new_events():
            if event.source in frames:
                committed.add(event.source)
            else:
                if not began:
                    began.append(time.monotonic() - event.seconds.get("total", 0.0))
                done[event.source] = event.verdict == "kept"
                spent.add(event.seconds)
        seconds = spent.wall_seconds = time.monotonic() - began[0] if began else 0.0
        left = clips - len(done)
        tell(
            Progress(
                stage="encode",
                clips=len(done),
                total_clips=clips,
                failed=sum(not kept for kept in done.values()),
                frames=sum(frames[name] for name in committed),
                seconds=seconds,
                eta_seconds=seconds / len(done) * left if done else None,
            )
        )

    def watch() -> None:
        while not stop.wait(_POLL_SECONDS):
            look()

    thread = threading.Thread(target=watch, name="encode-progress", daemon=True)
    thread.start()
    try:
        yield spent
    finally:
        stop.set()
        thread.join()
        look()


@contextmanager
def progress_bar() -> Iterator[Callable[[Progress], None]]:
    """A function to hand to `encode` as `progress`; it draws on stderr."""
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
        task = bar.add_task("encoding", total=None, detail="")

        def show(state: Progress) -> None:
            bar.update(
                task,
                description=_title(state),
                completed=state.clips,
                total=state.total_clips or None,
                detail=_detail(state),
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
        finished = state.stage == "encode" and state.clips == state.total_clips
        stage = f"{state.stage} done" if finished else state.stage
        if stage == self.stage and (finished or now - self.last < _LINE_SECONDS):
            return
        self.stage, self.last = stage, now
        counted = f" {state.clips}/{state.total_clips}" if state.stage == "encode" else ""
        print(f"{_title(state)}{counted} {_detail(state)}".rstrip(), file=sys.stderr, flush=True)


def _title(state: Progress) -> str:
    return "encoding" if state.stage == "encode" else "opening models"


def _detail(state: Progress) -> str:
    if state.stage != "encode" or not state.clips:
        return ""
    parts = [f"{state.clips_per_second:.1f} clips/s"]
    if state.frames:
        parts.append(f"{state.frames_per_second:.0f} frames/s")
    if state.failed:
        parts.append(f"{state.failed} failed")
    if state.eta_seconds is not None and state.clips < state.total_clips:
        minutes, seconds = divmod(round(state.eta_seconds), 60)
        hours, minutes = divmod(minutes, 60)
        left = f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
        parts.append(f"{left} left")
    return " · ".join(parts)
