"""An end to work that hangs, even in a library that holds Python's lock: the process ends.

There is one timer in a process, which several threads share.
"""

import faulthandler
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_deadlines: dict[object, float] = {}


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """End the process, with the stacks of all threads on standard error, if the body lasts longer.

    The exit code is 1; nothing is cleaned up.
    """
    mark = object()
    _set(mark, time.monotonic() + seconds)
    try:
        yield
    finally:
        _set(mark, None)


def _set(mark: object, deadline: float | None) -> None:
    with _lock:
        if deadline is None:
            del _deadlines[mark]
        else:
            _deadlines[mark] = deadline
        if _deadlines:
            left = max(0.001, min(_deadlines.values()) - time.monotonic())
            faulthandler.dump_traceback_later(left, exit=True, file=2)
        else:
            faulthandler.cancel_dump_traceback_later()
