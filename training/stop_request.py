"""A request to end a run early, with a checkpoint: a flag in its folder that the workers see.

The driver raises it where it is sent SIGTERM (a scheduler or a cloud takes the machine), SIGUSR1
(Slurm's `--signal`) or SIGINT (Ctrl-C; a second one stops at once).
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_LOOK = 0.5  # seconds between looks at the flag


class StopRequest:
    """The flag of one run; `out/.stop`."""

    def __init__(self, out: Path) -> None:
        self._path = out / ".stop"
        self._seen, self._looked = False, -_LOOK

    def make(self) -> None:
        self._path.touch()

    def clear(self) -> None:
        """Forget a request that an earlier start of the run has followed."""
        self._path.unlink(missing_ok=True)

    def made(self) -> bool:
        """Whether somebody asks the run to end; cheap enough for every step."""
        now = time.monotonic()
        if not self._seen and now - self._looked >= _LOOK:
            self._seen, self._looked = self._path.exists(), now
        return self._seen


@contextmanager
def stop_on_signals(out: Path) -> Iterator[StopRequest]:
    """Turn the signals that ask this process to end into a request while the body runs.

    Does nothing outside the main thread, where Python takes no signals.
    """
    request = StopRequest(out)
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True
        request.make()

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, ask) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            # None: not set from Python, as Ray does
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
