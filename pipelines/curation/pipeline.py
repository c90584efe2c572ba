"""A curation run: plan, then every shard that is not done, on a pool of Ray actors.

Ray only executes. What is to be done is in the plan, what is done is in the shards, and either
outlives Ray, the driver and the machine.
"""

import os
import queue
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import schema, shards
from pipelines.curation import ledger, report
from pipelines.curation.annotate import Perception
from pipelines.curation.config import CurationConfig
from pipelines.curation.finish import finish_run
from pipelines.curation.ledger import DoneShards
from pipelines.curation.plan import Plan, PlanError, load_plan, make_plan, save_plan
from pipelines.curation.progress import Progress, report_progress
from pipelines.curation.repack import roll_shard_forward
from pipelines.curation.revise import resume_revision
from pipelines.curation.sources import read_sources
from pipelines.curation.worker import DOWNLOADS_FOLDER, ShardWork, versions
from pipelines.damaged import damaged_notes
from pipelines.ray_pool import run_pool
from pipelines.ray_session import PATIENCE_SECONDS, Pool, RunError, session
from pipelines.schema import ShardError

__all__ = ["Progress", "RunError", "RunSummary", "ShardWorker", "curate"]

_SPARE_SECONDS = 600.0
# Of working on what the end of a run finds missing, which after one round is nothing.
_MOST_ROUNDS = 4
# A shared file system may take a while to show a folder that was just made.
_SHARED_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What a run did, and what its folder now holds (`totals`, as `report.summarise` gives it).

    workers: there was room for at first; decoders: of each of them.
    """

    out: str
    seconds: float
    shards_done: int
    shards_resumed: int
    workers: int
    decoders: int
    models: dict[str, str]
    notes: tuple[str, ...]
    totals: dict[str, Any] = field(default_factory=dict)


def curate(
    sources: Sequence[str],
    out: Path | str,
    config: CurationConfig | None = None,
    *,
    workers: int | None = None,
    decoders: int | None = None,
    progress: Callable[[Progress], Any] | None = None,
    retry_failed: bool = False,
    limit: int | None = None,
    patience: float = PATIENCE_SECONDS,
) -> RunSummary:
    """Filter and annotate videos into shards; called again, it goes on where it was stopped.

    Args:
        sources: folders, files, globs, addresses, or manifests of these.
        out: the folder for the shards, the plan and `report.html`.
        workers: processes, each with its own models; by default one a GPU, where there are none
            one a CPU, and on a cluster that grows more with it.
        decoders: processes that decode for one worker; by default the CPUs that its GPU has on its
            machine, one where there are no GPUs.
        progress: called now and then with the state of the run.
        retry_failed: work once more on the sources that failed.
        limit: take only the first so many sources.
        patience: seconds to wait for machines of a cluster that has none free.

    Raises:
        PlanError: no sources, or `out` belongs to other settings or sources.
        FolderInUseError: another run is writing into `out`.
        RunError: shards are left undone.
    """
    began = time.monotonic()
    folder, config = Path(out), config or CurationConfig()
    for name, value in (("workers", workers), ("decoders", decoders)):
        if value is not None and value < 1:
            raise PlanError(f"got {value} {name}, expected at least 1.")
    tell = progress or (lambda state: None)
    table = read_sources(
        sources, limit=limit, progress=lambda count: tell(Progress(stage="list", done=count))
    )
    folder.mkdir(parents=True, exist_ok=True)
    with ledger.folder_lock(folder):
        resume_revision(folder, tell)
        tell(Progress(stage="models", total=table.num_rows))
        perception = Perception(config)
        models, notes = perception.names(), perception.notes()
        del perception
        plan = save_plan(folder, make_plan(table, config, models))
        del table
        done = ledger.clean_up(folder, plan, ledger.scan_done(folder, plan))
        (folder / ledger.THUMBS_FOLDER).mkdir(exist_ok=True)
        again = _again(done, retry_failed=retry_failed)
        todo = [shard.name for shard in plan.shards() if _is_due(shard.name, done, again)]
        worked, used = set(todo), Pool(0, 0.0, 0)
        for _ in range(_MOST_ROUNDS):
            if todo:
                with session(workers, len(todo), threads=decoders, patience=patience) as pool:
                    _run(folder, plan, todo, again, done, pool, patience, tell)
                used = max(used, pool, key=lambda pool: pool.workers)
            _check_all_committed(folder, plan)
            finished = finish_run(folder, plan, tell)
            if not finished.again:
                break
            # A clip was the copy of one that is no more, and was never stored itself.
            todo, again, done = list(finished.again), frozenset(finished.again), DoneShards()
            worked.update(todo)
        else:
            raise RunError(f"{todo[0]} is not settled after {_MOST_ROUNDS} rounds: run again.")
        # Of what the end moved, too.
        _check_all_committed(folder, plan)
        # Of shards that were committed, by workers that died before they could tidy up.
        shutil.rmtree(folder / DOWNLOADS_FOLDER, ignore_errors=True)
        tell(Progress(stage="report", done=plan.num_sources, total=plan.num_sources))
        totals = report.write_report(folder)["summary"]
    return RunSummary(
        out=str(folder),
        seconds=round(time.monotonic() - began, 3),
        shards_done=len(worked),
        shards_resumed=plan.num_shards - len(worked),
        workers=used.workers,
        decoders=used.threads,
        models=models,
        notes=(*notes, *damaged_notes(folder)),
        totals=totals,
    )


class ShardWorker:
    """A Ray actor: holds the models, takes shards by name, answers when they are committed.

    Args:
        run: of the journal that the driver made in the folder.
        again: the shards of which what was committed before is to be taken over.
        threads: shards to work on at once, each with a decoder of its own.
        expected: the driver's `versions()`.
    """

    def __init__(
        self,
        folder: str,
        base: str,
        run: str,
        again: frozenset[str],
        threads: int,
        expected: Mapping[str, str],
    ) -> None:
        self.folder = Path(folder)
        self.again = again
        self.refusal = None
        try:
            self._open(Path(base), run, threads, expected)
        except (RunError, ValueError, OSError) as error:
            # Told by the first call: a worker that dies here is begun again and again.
            self.refusal = f"the worker on {socket.gethostname()} {error}"

    def _open(self, base: Path, run: str, threads: int, expected: Mapping[str, str]) -> None:
        _check_folder(self.folder, run)
        _check_versions(expected)
        # Read from the folder: a plan of millions of sources never travels.
        self.plan = load_plan(self.folder)
        perception = Perception(self.plan.config)
        found = perception.names()
        if found != self.plan.models:
            raise RunError(
                f"found the models {found}, the plan has {self.plan.models}: give every "
                "machine the same ANIMATOR_MODELS."
            )
        self.idle: queue.SimpleQueue[ShardWork] = queue.SimpleQueue()
        for _ in range(threads):
            journal = ledger.RunJournal(self.folder, run)
            self.idle.put(ShardWork(self.folder, self.plan, journal, perception, base))
        # Its threads last; those that Ray calls from need not, and decoders die with theirs.
        self.threads = ThreadPoolExecutor(threads)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Process the shards named in column `item`."""
        if self.refusal is not None:
            return {"item": batch["item"], "refusal": np.array([self.refusal] * len(batch["item"]))}
        try:
            for name in map(str, batch["item"]):
                self.threads.submit(self._process, name).result()
        except (OSError, ShardError) as error:
            # Of the machine or the folder, and told by a sentence, not by Ray's stacks.
            said = f"the worker on {socket.gethostname()} had to stop: {error}"
            return {"item": batch["item"], "refusal": np.array([said] * len(batch["item"]))}
        return {"item": batch["item"]}

    def _process(self, name: str) -> None:
        previous = None
        if name in self.again:
            roll_shard_forward(self.folder, name)
            previous = shards.committed(self.folder, name)
        work = self.idle.get()
        try:
            work.process(self.plan.shard(schema.shard_index(name)), previous)
        finally:
            self.idle.put(work)


def _check_folder(folder: Path, run: str) -> None:
    """Raises RunError where the folder is not the one that the driver sees."""
    deadline = time.monotonic() + _SHARED_SECONDS
    while not ledger.RunJournal(folder, run).is_there():
        if time.monotonic() > deadline:
            raise RunError(
                f"does not see what the driver wrote into {folder}: give --out a folder on storage "
                "that all machines of the cluster see under the same name."
            )
        time.sleep(0.5)


def _check_versions(expected: Mapping[str, str]) -> None:
    """Raises RunError where this machine has other software than the driver's."""
    found = versions()
    other = [name for name in expected if found.get(name) != expected[name]]
    if other:
        raise RunError(
            "has "
            + ", ".join(f"{name} {found.get(name)}" for name in other)
            + ", the driver "
            + ", ".join(f"{name} {expected[name]}" for name in other)
            + ": install the same versions on all machines, or the shards would differ."
        )


def _again(done: DoneShards, *, retry_failed: bool) -> frozenset[str]:
    """The shards that are there but not as they should be."""
    return done.stale | {*done.not_stored, *(done.failed if retry_failed else ())}


def _is_due(name: str, done: DoneShards, again: frozenset[str]) -> bool:
    return name in again or name not in done.names


def _run(
    folder: Path,
    plan: Plan,
    todo: Sequence[str],
    again: frozenset[str],
    done: DoneShards,
    pool: Pool,
    patience: float,
    tell: Callable[[Progress], Any],
) -> None:
    """Process the shards on Ray."""
    journal, run = ledger.RunJournal.create(folder)
    slowest = (
        plan.config.video.most_seconds + plan.config.download.timeout_seconds
    ) * plan.sources_per_shard
    arguments = (str(folder.resolve()), os.getcwd(), run, again, pool.threads, versions())
    try:
        with report_progress(journal, folder, plan, done, again, tell):
            limit = slowest + _SPARE_SECONDS
            run_pool(ShardWorker, arguments, todo, pool, limit, patience=patience)
    finally:
        journal.close()


def _check_all_committed(folder: Path, plan: Plan) -> None:
    """Raises RunError where a shard is missing."""
    left = ledger.scan_done(folder, plan).todo(plan)
    if left:
        raise RunError(
            f"{len(left)} shards are not committed, the first is {left[0].name}: run again."
        )
