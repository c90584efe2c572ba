"""Workers that take items over, and give them back in order.

Decoders of other people's files may crash or hang; in a process of its own, such a clip costs
that process, and is recorded. A process that dies takes the whole executor with it, so the clips
that were under way are tried again, one at a time.
"""

import multiprocessing
import os
import resource
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipelines.exchange.import_config import ImportConfig
from pipelines.exchange.import_item import Imported, Importer, failed_record
from pipelines.exchange.scan import ImportItem

_arguments: tuple[Path, ImportConfig] | None = None
_importer: Importer | None = None


class ImportPool:
    """`jobs` processes with an `Importer` each, or this very process for 0 jobs."""

    def __init__(self, root: Path, config: ImportConfig, jobs: int) -> None:
        self.root = root
        self.config = config
        self.jobs = jobs
        self._hash = ""
        self._staging = Path()
        self._pool: ProcessPoolExecutor | None = None
        self._here: Importer | None = None

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def models(self) -> dict[str, str]:
        """The name of each model."""
        return self._ask(_models)

    def describe(self) -> dict[str, dict[str, Any]]:
        """Name and licence of each model, for the records."""
        return self._ask(_describe)

    def finds_people(self) -> bool:
        """Whether there is a pose network, not only a reader of files."""
        return self.models()["pose"].find("no pose models were found") < 0

    def begin(self, config_hash: str, staging: Path) -> None:
        """What the records carry, and where unfinished clips are laid."""
        self._hash, self._staging = config_hash, staging

    def results(self, items: Sequence[ImportItem]) -> Iterator[Imported]:
        """What becomes of each item, in order; a few are under way ahead of the one asked for."""
        if self._here is not None:
            self._here.config_hash = self._hash
            for number, item in enumerate(items):
                yield self._here.run(item, self._staging / str(number))
            return
        waiting = deque(enumerate(items))
        ahead: deque[tuple[int, ImportItem, Future[Imported]]] = deque()
        tries = 0
        while waiting or ahead:
            while waiting and len(ahead) < 2 * self.jobs:
                number, item = waiting.popleft()
                ahead.append((number, item, self._submit(item, number, tries)))
            number, item, future = ahead.popleft()
            try:
                yield future.result()
            except BrokenProcessPool:
                yield self._alone(item, number, tries := tries + 1)
                for later, other, _ in reversed(ahead):
                    waiting.appendleft((later, other))
                ahead.clear()

    def _alone(self, item: ImportItem, number: int, tries: int) -> Imported:
        """One item in a fresh process: if this one dies as well, the item is to blame."""
        self._reopen()
        try:
            return self._submit(item, number, tries).result()
        except BrokenProcessPool:
            self._reopen()
            error = "ended its process twice (a crash, or more than timeout_seconds)"
            return Imported(record=failed_record(item, error))

    def _submit(self, item: ImportItem, number: int, tries: int) -> Future[Imported]:
        if self._pool is None:
            raise RuntimeError("the pool of workers is not open")
        place = self._staging / f"{number}.{tries}"
        try:
            return self._pool.submit(_work, item, place, self._hash)
        except BrokenProcessPool as error:
            future: Future[Imported] = Future()
            future.set_exception(error)
            return future

    def _ask(self, question: Callable[[Importer], Any]) -> Any:
        if self._here is not None:
            return question(self._here)
        if self._pool is None:
            raise RuntimeError("the pool of workers is not open")
        return self._pool.submit(_answer, question).result()

    def _open(self) -> None:
        if self.jobs == 0:
            self._here = Importer(self.root, self.config, "")
            return
        self._pool = ProcessPoolExecutor(
            self.jobs,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start,
            initargs=(self.root, self.config),
        )

    def _reopen(self) -> None:
        self._close()
        self._open()

    def _close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def _start(root: Path, config: ImportConfig) -> None:
    global _arguments
    _arguments = root, config
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
    if config.max_memory:
        # Of data, not of addresses: CUDA reserves more of those than any machine has memory.
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        most = config.max_memory if hard == resource.RLIM_INFINITY else min(config.max_memory, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _end_with_parent() -> None:
    """End this process when the one that started it is gone, which otherwise it never notices."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _answer(question: Callable[[Importer], Any]) -> Any:
    return question(_worker())


def _work(item: ImportItem, staging: Path, config_hash: str) -> Imported:
    worker = _worker()
    worker.config_hash = config_hash
    return worker.run(item, staging)


def _worker() -> Importer:
    # What an executor's process keeps between calls can only lie here. The models are opened by
    # the first call and not at the start, so that an error in it arrives as itself.
    global _importer
    if _importer is None:
        if _arguments is None:
            raise RuntimeError("the worker was not started")
        _importer = Importer(*_arguments, "")
    return _importer


def _models(importer: Importer) -> dict[str, str]:
    return importer.models()


def _describe(importer: Importer) -> dict[str, dict[str, Any]]:
    return importer.describe()
