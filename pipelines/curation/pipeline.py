"""A curation run: plan, then every shard that is not done, on a fixed pool of Ray actors.

Ray only executes. What is to be done is in the plan, what is done is in the shards, and either
outlives Ray, the driver and the machine.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import shards
from pipelines.curation import ledger, report
from pipelines.curation.annotate import Perception
from pipelines.curation.config import CurationConfig
from pipelines.curation.plan import (
    Plan,
    PlanError,
    PlannedShard,
    find_sources,
    make_plan,
    save_plan,
)
from pipelines.curation.progress import Progress, report_progress
from pipelines.curation.worker import process_shard
from pipelines.schema import ShardRecord

_OBJECT_STORE_BYTES = 256 << 20
_MIN_CPUS = 4


class RunError(RuntimeError):
    """A run that could not finish; the same command goes on with what is left."""


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What a run did, and what its folder now holds (`totals`, as `report.summarise` gives it)."""

    out: str
    seconds: float
    shards_done: int
    shards_resumed: int
    workers: int
    models: dict[str, str]
    notes: tuple[str, ...]
    totals: dict[str, Any] = field(default_factory=dict)


def curate(
    sources: Sequence[str],
    out: Path | str,
    config: CurationConfig | None = None,
    *,
    workers: int | None = None,
    progress: Callable[[Progress], Any] | None = None,
) -> RunSummary:
    """Filter and annotate videos into shards; called again, it goes on where it was stopped.

    Args:
        sources: folders, files, globs, or `.txt` lists of these.
        out: the folder for the shards, `plan.json` and `report.html`.
        workers: processes, each with its own models; by default one a CPU.
        progress: called now and then with the state of the run.

    Raises:
        PlanError: no sources, or `out` belongs to other settings or sources.
        FolderInUseError: another run is writing into `out`.
        RunError: shards are left undone.
    """
    began = time.monotonic()
    folder, config = Path(out), config or CurationConfig()
    if workers is not None and workers < 1:
        raise PlanError(f"got {workers} workers, expected at least 1.")
    tell = progress or (lambda state: None)
    uris = find_sources(sources)
    folder.mkdir(parents=True, exist_ok=True)
    with ledger.folder_lock(folder):
        tell(Progress(stage="models", done=0, total=len(uris)))
        perception = Perception(config)
        models, notes = perception.names(), perception.notes()
        del perception
        plan = make_plan(
            uris, config, models, lambda n: tell(Progress(stage="hash", done=n, total=len(uris)))
        )
        save_plan(folder, plan)
        done = ledger.done_shards(folder, plan)
        ledger.clean_up(folder, plan, done)
        (folder / ledger.THUMBS_FOLDER).mkdir(exist_ok=True)
        todo = [shard for shard in plan.shards if shard.name not in done]
        used = _run(folder, plan, todo, list(done.values()), workers, tell) if todo else 0
        records = _finished(folder, plan)
        tell(Progress(stage="report", done=len(plan.sources), total=len(plan.sources)))
        report.write_report(folder, plan, records)
    return RunSummary(
        out=str(folder),
        seconds=round(time.monotonic() - began, 3),
        shards_done=len(todo),
        shards_resumed=len(done),
        workers=used,
        models=models,
        notes=notes,
        totals=report.summarise(plan, records),
    )


class ShardWorker:
    """A Ray actor: holds the models, takes shards by name, answers when they are committed."""

    def __init__(self, plan: Plan, folder: str, base: str, run: str) -> None:
        self.plan = plan
        self.folder = Path(folder)
        self.base = Path(base)
        self.journal = ledger.RunJournal(self.folder, run)
        self.perception = Perception(plan.config)
        found = self.perception.names()
        if found != plan.models:
            raise RunError(
                f"a worker found the models {found}, the plan has {plan.models}: give every "
                "machine the same ANIMATOR_MODELS."
            )

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Process the shards named in column `shard`."""
        by_name = {shard.name: shard for shard in self.plan.shards}
        for name in batch["shard"]:
            process_shard(
                self.folder,
                self.plan,
                by_name[str(name)],
                self.journal,
                self.perception,
                self.base,
            )
        return {"shard": batch["shard"]}


def _run(
    folder: Path,
    plan: Plan,
    todo: Sequence[PlannedShard],
    done: Sequence[ShardRecord],
    workers: int | None,
    tell: Callable[[Progress], Any],
) -> int:
    """Process the shards on Ray; returns the number of workers used."""
    journal, run = ledger.RunJournal.create(folder)
    try:
        with _ray(workers, len(todo)) as pool, report_progress(journal, plan, done, tell):
            _execute(folder, plan, todo, run, pool)
            return pool
    finally:
        journal.close()


def _execute(folder: Path, plan: Plan, todo: Sequence[PlannedShard], run: str, pool: int) -> None:
    import ray

    slowest = plan.config.video.timeout_seconds * plan.config.output.sources_per_shard
    with _quiet_ray_data(no_progress_seconds=slowest + 600):
        dataset = ray.data.from_items(
            [{"shard": shard.name} for shard in todo], override_num_blocks=len(todo)
        ).map_batches(
            ShardWorker,
            fn_constructor_args=(plan, str(folder.resolve()), os.getcwd(), run),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=pool, max_tasks_in_flight_per_actor=1),
            num_cpus=1,
            num_gpus=_gpu_share(pool),
        )
        finished = {row["shard"] for row in dataset.iter_rows()}
    left = [shard.name for shard in todo if shard.name not in finished]
    if left:
        raise RunError(f"{len(left)} shards were not finished, the first is {left[0]}.")


@contextmanager
def _ray(workers: int | None, shards_todo: int) -> Iterator[int]:
    """A Ray cluster, ours or one that is there, and how many workers fit on it.

    Ray Data waits for ever, without a word, when the actors' CPUs and one more do not fit.
    """
    import ray

    ours = not ray.is_initialized()
    if ours:
        # Its core writes remarks about its own actors to our standard error.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        wanted = min(workers or os.cpu_count() or 1, shards_todo)
        quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
        if os.environ.get("RAY_ADDRESS"):
            ray.init(**quiet)
        else:
            ray.init(
                num_cpus=max(_MIN_CPUS, os.cpu_count() or 1, wanted + 1),
                object_store_memory=_OBJECT_STORE_BYTES,
                include_dashboard=False,
                **quiet,
            )
            workers = wanted
    try:
        cpus = ray.cluster_resources().get("CPU", 0)
        room = int(cpus) - 1
        if room < 1 or (workers or 1) > room:
            raise RunError(
                f"{workers or 1} workers need {(workers or 1) + 1} CPUs, the Ray cluster has "
                f"{cpus:g}: give fewer --workers or a larger cluster."
            )
        yield min(workers or room, room, shards_todo)
    finally:
        if ours:
            ray.shutdown()


@contextmanager
def _quiet_ray_data(no_progress_seconds: float) -> Iterator[None]:
    """Ray Data without its own bars and logs, and with an end to waiting for nothing."""
    import ray

    context = ray.data.DataContext.get_current()
    logger = logging.getLogger("ray.data")
    changes = {
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        "execution_no_progress_timeout_s": int(no_progress_seconds),
    }
    before = {name: getattr(context, name) for name in changes if hasattr(context, name)}
    level = logger.level
    try:
        for name in before:
            setattr(context, name, changes[name])
        logger.setLevel(logging.ERROR)
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        logger.setLevel(level)


def _gpu_share(pool: int) -> float:
    """GPUs for each worker: an equal part of what the cluster has; 0 where it has none."""
    import ray

    gpus = ray.cluster_resources().get("GPU", 0)
    return min(1.0, int(100 * gpus / pool) / 100) if gpus else 0.0


def _finished(folder: Path, plan: Plan) -> list[ShardRecord]:
    """The records of all shards of the plan. Raises RunError where one is missing."""
    by_name = {record.name: record for record in shards.read_records(folder)}
    left = [shard.name for shard in plan.shards if shard.name not in by_name]
    if left:
        raise RunError(f"{len(left)} shards are not committed, the first is {left[0]}: run again.")
    return [by_name[shard.name] for shard in plan.shards]
