"""How far an encoding run is: read from its journal, drawn as a bar or as a line now and then."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from pipelines.curation.ledger import RunJournal
from pipelines.progress import Line, clock, polling, shown


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
    spent = Spent()
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

    with polling(look, "encode-progress"):
        yield spent


def progress_bar() -> AbstractContextManager[Callable[[Progress], None]]:
    """A function to hand to `encode` as `progress`; it draws on stderr."""
    return shown(_line)


def _line(state: Progress) -> Line:
    working = state.stage == "encode"
    return Line(
        stage=state.stage,
        title="encoding" if working else "opening models",
        done=state.clips,
        total=state.total_clips if working else 0,
        detail=_detail(state),
        finished=working and state.clips == state.total_clips,
    )


def _detail(state: Progress) -> str:
    if state.stage != "encode" or not state.clips:
        return ""
    parts = [f"{state.clips_per_second:.1f} clips/s"]
    if state.frames:
        parts.append(f"{state.frames_per_second:.0f} frames/s")
    if state.failed:
        parts.append(f"{state.failed} failed")
    if state.eta_seconds is not None and state.clips < state.total_clips:
        parts.append(f"{clock(state.eta_seconds)} left")
    return " · ".join(parts)
