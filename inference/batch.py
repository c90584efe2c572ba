"""Animate a manifest of requests with Ray Data actors; what is finished stays finished.

`OUT/NAME.mp4` and `OUT/NAME.json` are an item done; the record holds the item's identity (content
of its inputs, options, model), so a rerun skips it, and redoes it where anything changed.
`OUT/NAME.error.json` is an item that failed; the next run tries it again. `OUT/batch.json` sums up.
"""

import json
import logging
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from inference import outputs
from inference.engine_factory import DEFAULT_FACTORY, Engine, model_fingerprint, open_engine
from inference.outputs import FolderLock
from inference.requests import AnimationRequest, ManifestItem, read_manifest

MAX_DEATHS = 3
MAX_BLOCKS = 2000
SUMMARY = "batch.json"
WORK = ".batch"
LOCK = ".batch.lock"
WORKERS = ".batch.workers"  # held by every worker, so that a run never overlaps a killed one's
WORKERS_SECONDS = 60.0
OBJECT_STORE_BYTES = 200 << 20  # rows are short texts; videos stay on disk

log = logging.getLogger(__name__)


class BatchError(ValueError):
    """A batch that cannot be started as asked; the message says what to change."""


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """What to run, on how many engines of how many CPUs each (None: the machine's, shared out)."""

    manifest: Path
    out: Path
    model_dir: Path
    engines: int = 1
    cpus_per_engine: int | None = None
    face: str = "auto"
    pose: str = "auto"
    engine_factory: str = DEFAULT_FACTORY

    def __post_init__(self) -> None:
        for name in ("engines", "cpus_per_engine"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BatchError(f"{name} is {value}, expected 1 or more")


@dataclass(frozen=True, kw_only=True)
class _Task:
    """One item on its way to a worker and back; travels as JSON text in a row of Ray Data."""

    id: str
    identity: str
    request: dict[str, Any]
    status: str = "pending"
    error: str = ""
    seconds: float = 0.0
    final: Path = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "final", Path(self.request["output"]))

    @property
    def error_file(self) -> Path:
        return self.final.with_suffix(".error.json")

    @property
    def starts_file(self) -> Path:
        """One byte for every start: how often a process died on the item."""
        return self.final.parent / WORK / f"{self.final.stem}.starts"

    def is_done(self) -> bool:
        record = outputs.published(self.final)
        return record is not None and record.get("identity") == self.identity

    def ended(self, status: str, error: str = "", seconds: float = 0.0) -> "_Task":
        """The result; an error file is there exactly if the item failed."""
        if error:
            record = {"id": self.id, "identity": self.identity, "error": error}
            outputs.write_json(self.error_file, {**record, "request": self.request})
        else:
            self.error_file.unlink(missing_ok=True)
        self.starts_file.unlink(missing_ok=True)
        return replace(self, status=status, error=error, seconds=round(seconds, 3))

    def to_row(self) -> dict[str, str]:
        values = asdict(self)
        del values["final"]
        return {"task": json.dumps(values)}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "_Task":
        return cls(**json.loads(row["task"]))


class EngineActor:
    """One engine in a Ray Data actor: a row in, a result row out, whatever happens between."""

    def __init__(self, config: BatchConfig) -> None:
        self.lock = FolderLock(config.out, WORKERS, "batch", shared=True, wait=WORKERS_SECONDS)
        self.engine: Engine | None = None
        self.refusal = ("", "")
        try:
            self.engine = open_engine(
                config.engine_factory, config.model_dir, face=config.face, pose=config.pose
            )
        except Exception as error:  # Ray Data would tell the driver no more than that it died
            log.exception("the engine cannot be opened")
            status = "refused" if isinstance(error, ValueError) else "broken"
            self.refusal = (status, _sentence(error))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Make one item and publish it, or record why it failed; never raises for the item."""
        task = _Task.from_row(row)
        if self.engine is None:
            status, error = self.refusal
            return replace(task, status=status, error=error).to_row()
        if task.is_done():  # the process died after publishing, before it could answer
            return task.ended("done").to_row()
        started = time.time()
        try:
            self._make(self.engine, task)
        except Exception as error:
            if not isinstance(error, ValueError):
                log.exception("%s: failed", task.id)
            return task.ended("failed", _sentence(error), time.time() - started).to_row()
        return task.ended("done", seconds=time.time() - started).to_row()

    def _make(self, engine: Engine, task: _Task) -> None:
        deaths = task.starts_file.stat().st_size if task.starts_file.exists() else 0
        if deaths >= MAX_DEATHS:
            raise RuntimeError(f"the engine's process died {deaths} times on this item")
        with task.starts_file.open("ab") as stream:
            stream.write(b".")
        staged = task.starts_file.with_name(f"{task.final.stem}.{os.getpid()}.mp4")
        request = AnimationRequest.from_json({**task.request, "output": staged})
        try:
            made = engine.run(request)
            record = {**made, "id": task.id, "output": task.final.name, "identity": task.identity}
            outputs.publish(staged, task.final, outputs.describe(staged, record))
        finally:
            for path in (staged, staged.with_suffix(".json")):
                path.unlink(missing_ok=True)


def animate_batch(config: BatchConfig, *, show_progress: bool = True) -> dict[str, Any]:
    """Run every item that is not done; returns the summary that is also OUT/batch.json.

    Raises:
        RequestError, BatchError, FolderInUseError, FactoryError: nothing was made.
        RuntimeError: Ray lost the workers for good; what is finished stays.
    """
    started = time.time()
    items = read_manifest(config.manifest)
    # Ray's processes need not share our working folder.
    config = replace(config, out=config.out.absolute(), model_dir=config.model_dir.absolute())
    out = config.out
    _protect_inputs(config.manifest, items, out)
    model = model_fingerprint(config.model_dir)
    lock = FolderLock(out, LOCK, "animator batch")
    try:
        # Workers of a run that was killed live on for some seconds.
        FolderLock(out, WORKERS, "batch's worker", wait=WORKERS_SECONDS).close()
        shutil.rmtree(out / WORK, ignore_errors=True)
        (out / WORK).mkdir()
        tasks = _tasks(items, f"{model} {config.face} {config.pose}", out)
        results = {task.id: task.ended("skipped") for task in tasks if task.is_done()}
        pending = [task for task in tasks if task.id not in results]
        with _bar(len(tasks), len(results), show_progress) as advance:
            for result in _run(config, pending) if pending else ():
                results[result.id] = result
                advance(result)
        lost = [task.id for task in tasks if task.id not in results]
        if lost:
            raise RuntimeError(f"{len(lost)} item(s) came back without a result: {lost[:5]}")
        summary = _summary(config, model, [results[task.id] for task in tasks], started)
        outputs.write_json(out / SUMMARY, summary)
        shutil.rmtree(out / WORK, ignore_errors=True)
        return summary
    finally:
        lock.close()


@contextmanager
def _bar(total: int, skipped: int, shown: bool) -> Iterator[Callable[[_Task], None]]:
    """A progress bar on stderr; what it yields is called with each result."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("animating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr), disable=not shown) as progress:
        bar = progress.add_task("animating", total=total, completed=skipped)

        def advance(result: _Task) -> None:
            progress.advance(bar)
            if result.error and shown:
                progress.console.print(f"{result.id}: {result.error}", markup=False, soft_wrap=True)

        yield advance


def _tasks(items: list[ManifestItem], model: str, out: Path) -> list[_Task]:
    digests: dict[Path, str] = {}
    tasks = []
    for item in items:
        request = item.request(out / item.output).to_json()
        inputs = {
            "reference": str(item.reference.absolute()),
            "driving": str(item.driving.absolute()),
        }
        identity = item.identity(model, digests)
        tasks.append(_Task(id=item.id, identity=identity, request={**request, **inputs}))
    return tasks


def _protect_inputs(manifest: Path, items: list[ManifestItem], out: Path) -> None:
    """Refuse outputs that would be written over an input."""
    inputs = {manifest.resolve()}
    inputs |= {path.resolve() for item in items for path in (item.reference, item.driving)}
    for item in items:
        final = out / item.output
        for path in (final, final.with_suffix(".json"), final.with_suffix(".error.json")):
            if path.resolve() in inputs:
                raise BatchError(
                    f"line {item.line}: {path.name!r} would be written over an input in {out}; "
                    "choose another 'output' or another --out"
                )


def _run(config: BatchConfig, tasks: list[_Task]) -> Iterator[_Task]:
    """Results as they come, in no order. One row a block, so that none waits for its neighbours."""
    import ray
    import ray.data
    from ray.exceptions import RayError

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # our bar tells what goes on
    cpus = config.cpus_per_engine or max(1, (os.cpu_count() or 1) // config.engines)
    ours = not ray.is_initialized()
    if ours:
        _start_ray(config.engines * cpus + 1)
    try:
        gpus = _check_budget(config, cpus, ray.cluster_resources())
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.execution_no_progress_timeout_s = -1  # one item may take hours
        rows = [task.to_row() for task in tasks]
        dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS)).map(
            cast(Any, EngineActor),
            fn_constructor_args=(config,),
            compute=ray.data.ActorPoolStrategy(size=config.engines),
            num_cpus=cpus,
            num_gpus=gpus,
        )
        for row in dataset.iter_rows():
            result = _Task.from_row(row)
            if result.status == "refused":
                raise BatchError(f"the engine cannot be opened: {result.error}")
            if result.status == "broken":
                raise RuntimeError(f"the engine cannot be opened: {result.error}")
            yield result
    except RayError as error:
        cause = getattr(error, "cause", None) or error
        raise RuntimeError(_sentence(cause)) from None
    finally:
        if ours:
            ray.shutdown()


def _start_ray(num_cpus: int) -> None:
    import ray

    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.ERROR)
        return
    ray.init(
        address="local",
        num_cpus=max(4, num_cpus),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",
    )


def _check_budget(config: BatchConfig, cpus: int, resources: Mapping[str, float]) -> int:
    """GPUs an engine. Ray Data waits for ever, and says nothing, for what a cluster lacks."""
    have, need = int(resources.get("CPU", 0)), config.engines * cpus + 1
    if have < need:
        raise BatchError(
            f"{config.engines} engine(s) of {cpus} CPU(s) and one for the reader need {need} CPUs, "
            f"the cluster has {have}; ask for fewer engines or fewer CPUs each"
        )
    gpus = int(resources.get("GPU", 0))
    if 0 < gpus < config.engines:
        raise BatchError(
            f"{config.engines} engines on {gpus} GPU(s), expected one GPU an engine; "
            f"ask for {gpus} engine(s)"
        )
    return 1 if gpus else 0


def _summary(
    config: BatchConfig, model: str, results: list[_Task], started: float
) -> dict[str, Any]:
    counts = Counter(result.status for result in results)
    return {
        "manifest": str(config.manifest),
        "model": model,
        "started_at": int(started),
        "seconds": round(time.time() - started, 3),
        **{status: counts[status] for status in ("done", "skipped", "failed")},
        "items": [
            {
                "id": result.id,
                "output": result.final.name,
                "status": result.status,
                "seconds": result.seconds,
                **({"error": result.error} if result.error else {}),
            }
            for result in results
        ],
    }


def _sentence(error: BaseException) -> str:
    text = str(error).strip().splitlines() or ["no reason given"]
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"{kind}{text[0]}"[:500]
