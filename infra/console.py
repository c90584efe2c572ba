"""What people see in the terminal: results on stdout, everything else on stderr."""

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

DONE, FAILED, WRONG_USE = 0, 1, 2
HOME_PACKAGES = ("animator", "pipelines", "inference", "training", "infra")


def emit(result: Any, *, as_json: bool, show: Callable[[Any], Iterable[str]]) -> None:
    """Print a result: as one JSON document, or as the lines that `show` makes of it."""
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False, default=str))
    else:
        for line in show(result):
            print(line)


def note(text: str) -> None:
    """A remark beside the result; never on stdout."""
    print(text, file=sys.stderr, flush=True)


def stop(text: str, code: int = FAILED) -> NoReturn:
    """End the command with one clear sentence."""
    note(f"animator: {text}")
    raise SystemExit(code)


def table(rows: Sequence[Sequence[object]], *, header: Sequence[str]) -> list[str]:
    """Left-aligned columns as lines of text; numbers keep their own form."""
    cells = [tuple(map(str, row)) for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in cells]
    return [line.rstrip() for line in lines]


def report_error(error: BaseException) -> int:
    """Say what went wrong in one sentence and return the exit code.

    A ValueError that our own code raised is a wrong use, and so is a file that is not there;
    everything else is a failed run. ANIMATOR_DEBUG=1 shows the traceback too.
    """
    if os.environ.get("ANIMATOR_DEBUG"):
        traceback.print_exception(error)
    cause = getattr(error, "cause", None)  # Ray wraps what a worker raised
    if isinstance(cause, Exception):
        error = cause
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError) or (
        isinstance(error, PermissionError)
    ):
        note(f"animator: {error.strerror or error}: {error.filename or ''}".rstrip(": "))
        return WRONG_USE
    if isinstance(error, KeyboardInterrupt):
        note("animator: stopped; the same command continues where the work can be continued")
        return FAILED
    ours = _raised_here(error)
    sentence = str(error).strip() or type(error).__name__
    if isinstance(error, ValueError) and ours:
        note(f"animator: {sentence}")
        return WRONG_USE
    if not ours:
        sentence = f"{type(error).__name__}: {sentence.splitlines()[0]}"
    note(f"animator: failed: {sentence}")
    if not ours and not os.environ.get("ANIMATOR_DEBUG"):
        note("animator: ANIMATOR_DEBUG=1 shows where")
    return FAILED


def _raised_here(error: BaseException) -> bool:
    """Whether the error was raised by a line of this project, or is of a type it defines."""
    if type(error).__module__.split(".")[0] in HOME_PACKAGES:
        return True
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    return str(trace.tb_frame.f_globals.get("__name__", "")).split(".")[0] in HOME_PACKAGES
