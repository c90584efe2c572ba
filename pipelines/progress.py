"""How far long work is, shown: a bar where somebody looks on, a line now and then in a log."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

_POLL_SECONDS = 0.5
_LINE_SECONDS = 15.0

State = TypeVar("State")


@dataclass(frozen=True, kw_only=True)
class Line:
    """What is shown of a state of the work.

    detail: may be coloured, in rich's markup.
    finished: nothing more comes in this stage.
    """

    stage: str
    title: str
    done: int = 0
    total: int = 0
    detail: str = ""
    finished: bool = False


def clock(seconds: float) -> str:
    """`4:05` or `1:04:05`."""
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"


@contextmanager
def polling(look: Callable[[], None], name: str) -> Iterator[None]:
    """Call `look` twice a second, from a thread, while the body runs, and once at its end."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(_POLL_SECONDS):
            look()

    thread = threading.Thread(target=watch, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        look()


@contextmanager
def shown(describe: Callable[[State], Line]) -> Iterator[Callable[[State], None]]:
    """A function that shows a state of the work on stderr.

    Args:
        describe: what to show of a state.
    """
    if not sys.stderr.isatty():
        lines = _Lines()
        yield lambda state: lines.show(describe(state))
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("starting", total=None, detail="")

        def show(state: State) -> None:
            line = describe(state)
            bar.update(
                task,
                description=line.title,
                completed=line.done,
                total=line.total or None,
                detail=line.detail,
            )

        yield show


class _Lines:
    """Plain lines for logs, a quarter of a minute apart, and one for each stage."""

    def __init__(self) -> None:
        self.stage = ""
        self.last = 0.0

    def show(self, line: Line) -> None:
        """Print the line if it is time to."""
        from rich.text import Text

        now = time.monotonic()
        stage = f"{line.stage} done" if line.finished else line.stage
        if stage == self.stage and (line.finished or now - self.last < _LINE_SECONDS):
            return
        self.stage, self.last = stage, now
        counted = f" {line.done}/{line.total}" if line.total else ""
        text = f"{line.title}{counted} {Text.from_markup(line.detail).plain}"
        print(text.rstrip(), file=sys.stderr, flush=True)
