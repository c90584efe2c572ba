"""A run's progress in the terminal: a bar where there is one, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipelines.curation.pipeline import Progress

_LINE_SECONDS = 15.0
_STAGES = {"models": "opening models", "hash": "reading files", "report": "writing the report"}


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
