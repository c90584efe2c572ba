"""The process in which videos are decoded: takes jobs, asks its parent for the models, reports.

It holds no model and no secret. It imports neither Ray nor torch, may use so much memory and
no more, and ends with its parent.
"""

import contextlib
import ctypes
import errno
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

from pipelines.curation.machine import (
    MACHINE_ERRORS,
    OWN_FILE_ERRORS,
    PASSING_ERRORS,
    OwnFileError,
)
from pipelines.curation.wire import Link

_PR_SET_PDEATHSIG = 1


def main(settings: dict[str, Any]) -> None:
    """Work until the parent hangs up."""
    _die_with_parent(settings["parent"])
    # Control-C is for the parent to decide on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import cv2

    from pipelines.curation.source import Job, SourceWork, parse_job

    cv2.setNumThreads(1)
    link = Link(socket.socket(fileno=settings["socket"]))
    threading.Thread(target=_watch, args=(link.fileno(),), daemon=True).start()
    link.send("ready", None)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            message = link.receive()
            assert message is not None
            job: Job = parse_job(message[1])
            try:
                with _limited_memory(settings["max_memory"]):
                    report = SourceWork(job, Parent(link), settings["frames"]).run()
            except (EOFError, ConnectionError):
                return
            except Exception as error:
                link.send("failed", describe_failure(error, job.path))
            else:
                link.send("done", report)


class Parent:
    """The parent as seen from here: it has the models."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def ask(self, kind: str, data: Any) -> Any:
        """What the parent answers. Raises EOFError where it is gone."""
        self._link.send(kind, data)
        message = self._link.receive()
        assert message is not None
        return message[1]


def describe_failure(error: BaseException, path: str) -> dict[str, Any]:
    """An error as plain values, in words that say nothing of where the file lay."""
    if _lacks_memory(error):
        return {"type": "MemoryError", "text": "", "errno": None}
    name = os.path.basename(path)
    text = (" ".join(str(error).split()) or type(error).__name__).removeprefix(f"{path}: ")
    said = {"type": type(error).__name__, "text": text.replace(path, name), "errno": None}
    cause = _system_error(error)
    if cause is None:
        return said
    if cause.errno in (OWN_FILE_ERRORS if isinstance(cause, OwnFileError) else MACHINE_ERRORS):
        return said | {"errno": cause.errno}
    # What is left has been met while the source was read.
    if isinstance(error, OSError) or cause.errno in PASSING_ERRORS:
        return {"type": "unreadable", "text": cause.strerror or "no reason", "errno": None}
    return said


def _system_error(error: BaseException | None) -> OSError | None:
    """What the system said at the bottom of an error. FFmpeg has numbers like it for its own."""
    from av import FFmpegError

    while error is not None:
        if isinstance(error, OSError) and error.errno and not isinstance(error, FFmpegError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _lacks_memory(error: BaseException | None) -> bool:
    while error is not None:
        # OpenCV raises an error of its own, with this number; a library that is loaded late fails
        # to load. Everything else has been loaded before.
        if isinstance(error, MemoryError | ImportError) or getattr(error, "code", None) == -4:
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        error = error.__cause__ or error.__context__
    return False


def _die_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # It may have died before that.
    if os.getppid() != parent:
        os._exit(1)


def _watch(descriptor: int) -> None:
    """End the process when its parent hangs up, whatever it is doing."""
    poll = select.poll()
    poll.register(descriptor, getattr(select, "POLLRDHUP", 0) | select.POLLHUP)
    poll.poll()
    os._exit(1)


@contextlib.contextmanager
def _limited_memory(max_memory: int) -> Iterator[None]:
    """No more address space than that meanwhile; what it then fails with can still be told."""
    import resource

    # A crash is expected now and then; its image would be as large as the memory.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    before = resource.getrlimit(resource.RLIMIT_AS)
    if max_memory:
        resource.setrlimit(resource.RLIMIT_AS, (max_memory, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
