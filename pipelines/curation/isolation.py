"""Hostile videos are decoded in a process of their own, which may crash, hang or grow.

The decoder (`pipelines.curation.decoder`) works on one source after another. Its parent serves what
it asks for, and ends it where it takes too long or too much memory; the next source gets a new one.
It dies with its parent, whatever the parent dies of.
"""

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from pipelines.curation.wire import Link, WireError

# What a decoder may leak, it leaks for this many sources.
_SOURCES_PER_CHILD = 64
_START_SECONDS = 120.0
_POLL_SECONDS = 0.2
_EXIT_SECONDS = 10.0
_ERROR_LENGTH = 300
# A death that need not be the video's fault: something killed the process from outside, or the one
# before had damaged its memory. Each kind is tried again this often.
_ATTEMPTS = {"killed": 3, "crash": 2}
# What a Python and its libraries need to start: of the rest, much is secret.
_ENVIRONMENT = ("LD_LIBRARY_PATH", "PYTHONHOME", "OMP_NUM_THREADS", "TMPDIR", "TZ")
NAME = "curation_decoder"  # by which its processes are known in lists of processes

Serve = Callable[[str, Any], Any]


class SourceError(ValueError):
    """A source that cannot be worked on; the message is one sentence for its record.

    kind: `permanent` or `transient` where it cannot be had or read, `crash`, `timeout` or `memory`
        where its decoder had to be given up.
    """

    def __init__(self, message: str, kind: str = "permanent") -> None:
        super().__init__(message)
        self.kind = kind


class _DeathError(Exception):
    """The decoder is gone. kind: `crash` by itself, `killed` from outside."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


class IsolatedWorker:
    """The parent's side of a decoder, which is started when it is first needed.

    Args:
        folder: of this machine, where the file for frames is made, without a name; by default the
            machine's temporary one (TMPDIR).
        timeout_seconds: of wall time for one source, with all that is served for it; `run` may
            allow more.
        max_memory: bytes that the decoder may have; 0 for no limit.
    """

    def __init__(
        self, folder: Path | None = None, *, timeout_seconds: float, max_memory: int
    ) -> None:
        self.timeout_seconds = timeout_seconds
        self.max_memory = max_memory
        # It is read while it is written, so not where the output is, which many machines share;
        # the system takes it back with the process.
        self._file = tempfile.TemporaryFile(dir=folder)
        self._child: _Child | None = None

    @property
    def frames(self) -> int:
        """The descriptor of the file in which the decoder sets frames down."""
        return self._file.fileno()

    @property
    def pid(self) -> int | None:
        """The decoder's process number, while there is one."""
        return self._child.process.pid if self._child else None

    def run(self, job: Any, serve: Serve, allowance: Callable[[], float] = lambda: 0.0) -> Any:
        """Let the decoder work on a job; `serve(kind, data)` answers what it asks meanwhile.

        Args:
            allowance: seconds that the source may take beyond `timeout_seconds`, as far as is
                known by now.

        Returns:
            what the decoder says when it is done.

        Raises:
            SourceError: the source cannot be worked on, or its decoder had to be given up.
            OSError: the machine is in trouble, such as a full disk.
        """
        self._first_child()
        began = time.monotonic()

        def left() -> float:
            return began + self.timeout_seconds + allowance() - time.monotonic()

        tried: dict[str, int] = {}
        while True:
            try:
                return self._attempt(job, serve, left)
            except _DeathError as death:
                tried[death.kind] = tried.get(death.kind, 0) + 1
                if tried[death.kind] >= _ATTEMPTS[death.kind]:
                    raise SourceError(str(death), "crash") from None

    def close(self) -> None:
        """End the decoder for good, and give its frames up."""
        self.close_child()
        self._file.close()

    def _first_child(self) -> None:
        """A decoder that has started, so that starting does not count as a source's time."""
        with contextlib.suppress(_DeathError):
            self._ready_child()

    def _attempt(self, job: Any, serve: Serve, left: Callable[[], float]) -> Any:
        child = self._ready_child()
        try:
            result = self._converse(child, job, serve, left)
        except BaseException:
            self.close_child()
            raise
        child.sources += 1
        if child.sources >= _SOURCES_PER_CHILD:
            self.close_child()
        kind, data = result
        if kind == "failed":
            raise _failure(data, self.max_memory)
        return data

    def _converse(
        self, child: "_Child", job: Any, serve: Serve, left: Callable[[], float]
    ) -> tuple[str, Any]:
        os.ftruncate(self._file.fileno(), 0)
        try:
            child.link.send("job", job)
            while True:
                if (seconds := left()) <= 0:
                    raise self._too_long()
                message = child.link.receive(min(seconds, _POLL_SECONDS))
                if self.max_memory and child.memory() > self.max_memory:
                    raise _needs_memory(self.max_memory)
                if message is None:
                    continue
                if message[0] in ("done", "failed"):
                    return message
                self._answer(child, serve(*message), left)
        except (EOFError, ConnectionError):
            raise child.death() from None
        except WireError as error:
            raise SourceError(f"its decoder sent {error}", "crash") from None

    def _answer(self, child: "_Child", reply: Any, left: Callable[[], float]) -> None:
        try:
            child.link.send("reply", reply, max(left(), _POLL_SECONDS))
        except TimeoutError:
            raise self._too_long() from None

    def _too_long(self) -> SourceError:
        return SourceError(
            f"took longer than {self.timeout_seconds:g} s and what its length allows: leave it out "
            "or raise video.seconds_per_video_second",
            "timeout",
        )

    def _ready_child(self) -> "_Child":
        if self._child is not None and self._child.process.poll() is not None:
            self.close_child()
        if self._child is None:
            self._child = _Child(self._file.fileno(), self.max_memory)
        return self._child

    def close_child(self) -> None:
        """End the decoder; the next source gets another."""
        child, self._child = self._child, None
        if child is not None:
            child.end()


class _Child:
    """A decoder that is running."""

    def __init__(self, frames: int, max_memory: int) -> None:
        self.sources = 0
        ours, theirs = socket.socketpair()
        with theirs:
            settings = {
                "path": sys.path,
                "parent": os.getpid(),
                "socket": theirs.fileno(),
                "frames": frames,
                "max_memory": max_memory,
            }
            # Not multiprocessing: that would import the parent's main module, and Ray with it.
            code = (
                "import json, sys; settings = json.loads(sys.argv[2]); "
                "sys.path[:] = settings['path']; "
                "from pipelines.curation.decoder import main; main(settings)"
            )
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, NAME, json.dumps(settings)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), frames),
                env=_environment(),
            )
        self.link = Link(ours)
        try:
            if self.link.receive(_START_SECONDS) != ("ready", None):
                raise EOFError
        except (EOFError, ConnectionError, WireError):
            code = self._ended()
            self.end()
            if code == -signal.SIGKILL:
                raise _DeathError("had its decoder killed as it started", "killed") from None
            # Of the machine, whatever the source: the run must stop, not write sources off.
            raise OSError(
                errno.EIO,
                f"the process that decodes videos did not start within {_START_SECONDS:g} s "
                f"(exit code {code}); look at its messages above",
            ) from None
        except BaseException:
            self.end()
            raise

    def _ended(self) -> int | None:
        """Its exit code, where it is ending; None where it goes on."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(1.0)
        return None

    def memory(self) -> int:
        """Bytes of memory in use; 0 once it is gone."""
        try:
            return psutil.Process(self.process.pid).memory_info().rss
        except psutil.Error:
            return 0

    def death(self) -> Exception:
        """How it ended, which it has."""
        try:
            code = self.process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            return _DeathError("ended its talk with its parent", "crash")
        if code == -signal.SIGKILL:
            return _DeathError("had its decoder killed again and again (signal KILL)", "killed")
        if code < 0:
            with contextlib.suppress(ValueError):
                name = signal.Signals(-code).name.removeprefix("SIG")
                return _DeathError(f"crashed its decoder (signal {name})", "crash")
        return _DeathError(f"crashed its decoder (exit code {code})", "crash")

    def end(self) -> None:
        """Kill it and wait until it is gone."""
        self.link.close()
        self.process.kill()
        self.process.wait()


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    return kept | {"LANG": "C.UTF-8", "PYTHONUTF8": "1", "MALLOC_ARENA_MAX": "2"}


def _needs_memory(max_memory: int) -> SourceError:
    return SourceError(
        f"needs more than {max_memory} bytes of memory to decode: "
        "leave it out or raise video.max_memory",
        "memory",
    )


def _failure(data: Any, max_memory: int) -> Exception:
    """What a decoder's own report of a failure means."""
    try:
        kind, text, number = str(data["type"]), str(data["text"]), data["errno"]
    except (TypeError, KeyError):
        return SourceError("its decoder failed without a reason", "crash")
    if kind == "MemoryError":
        return _needs_memory(max_memory)
    if isinstance(number, int):
        return OSError(number, text[:_ERROR_LENGTH])
    text = "".join(sign for sign in " ".join(text.split()) if sign.isprintable())
    if kind == "unreadable":
        return SourceError(f"cannot be read ({text[:_ERROR_LENGTH]})", "transient")
    if kind != "VideoError":
        text = f"{kind}: {text}"
    return SourceError(text[:_ERROR_LENGTH])
