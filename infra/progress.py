"""Progress bars on stderr, plain lines where it is no terminal."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[float, str], None]
PLAIN_SECONDS = 15.0  # between lines where a bar cannot be drawn


@contextmanager
def stage_bar(title: str) -> Iterator[Report]:
    """A bar fed by `report(share 0..1, stage)`."""
    if not sys.stderr.isatty():
        yield _plain(title)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:28}"), BarColumn(40), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=1.0)
        yield lambda share, stage: progress.update(
            task, completed=share, description=f"{title}: {stage}" if stage else title
        )


def _plain(title: str) -> Report:
    last = [-PLAIN_SECONDS, ""]

    def report(share: float, stage: str) -> None:
        now = time.monotonic()
        if stage != last[1] or now - float(last[0]) >= PLAIN_SECONDS:
            last[:] = [now, stage]
            print(f"{title}: {stage} {share:.0%}", file=sys.stderr, flush=True)

    return report
