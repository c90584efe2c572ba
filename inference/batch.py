"""Animate a manifest of requests with Ray Data actors; what is finished stays finished.

`OUT/NAME.mp4` and `OUT/NAME.json` are an item done; the record holds the item's identity (content
of its inputs, options, model), so a rerun skips it, and redoes it where anything changed.
`OUT/NAME.error.json` is an item that failed; the next run tries it again. `OUT/batch.json` sums up.
"""

import logging
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from inference import outputs
from inference.batch_worker import (
    WORK,
    WORKERS,
    WORKERS_SECONDS,
    BatchConfig,
    BatchError,
    EngineActor,
    Task,
    sentence,
)
from inference.engine_factory import (
    absolute_alignment,
    alignment_fingerprint,
    model_fingerprint,
)
from inference.outputs import FolderLock
from inference.requests import ManifestItem, read_manifest

MAX_BLOCKS = 2000
SUMMARY = "batch.json"
LOCK = ".batch.lock"
OBJECT_STORE_BYTES = 200 << 20  # rows are short texts; videos stay on disk


def animate_batch(config: BatchConfig, *, show_progress: bool = True) -> dict[str, Any]:
    """Run every item that is not done; returns the summary that is also OUT/batch.json.

    Raises:
        RequestError, BatchError, FolderInUseError, FactoryError: nothing was made.
        RuntimeError: Ray lost the workers for good; what is finished stays.
    """
    started = time.time()
    items = read_manifest(config.manifest)
    # Ray's processes need not share our working folder.
    config = replace(
        config,
        out=config.out.absolute(),
        model_dir=config.model_dir.absolute(),
        alignment=absolute_alignment(config.alignment),
    )
    out = config.out
    _protect_inputs(config.manifest, items, out)
    model = model_fingerprint(config.model_dir)
    alignment = alignment_fingerprint(config.alignment)
    lock = FolderLock(out, LOCK, "animator batch")
    try:
        # Workers of a run that was killed live on for some seconds.
        FolderLock(out, WORKERS, "batch's worker", wait=WORKERS_SECONDS).close()
        shutil.rmtree(out / WORK, ignore_errors=True)
        (out / WORK).mkdir()
        tasks = _tasks(items, f"{model} {config.face} {config.pose} {alignment}", out)
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
def _bar(total: int, skipped: int, shown: bool) -> Iterator[Callable[[Task], None]]:
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

        def advance(result: Task) -> None:
            progress.advance(bar)
            if result.error and shown:
                progress.console.print(f"{result.id}: {result.error}", markup=False, soft_wrap=True)

        yield advance


def _tasks(items: list[ManifestItem], model: str, out: Path) -> list[Task]:
    digests: dict[Path, str] = {}
    tasks = []
    for item in items:
        request = item.request(out / item.output).to_json()
        inputs = {
            "reference": str(item.reference.absolute()),
            "driving": str(item.driving.absolute()),
        }
        identity = item.identity(model, digests)
        tasks.append(Task(id=item.id, identity=identity, request={**request, **inputs}))
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


def _run(config: BatchConfig, tasks: list[Task]) -> Iterator[Task]:
    """Results as they come, in no order. One row a block, so that none waits for its neighbours."""
    import ray
    import ray.data
    from ray.exceptions import RayError

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # our bar tells what goes on
    ours = not ray.is_initialized()
    # On a cluster the nodes' sizes are not ours to know; 1 CPU fits on any of them.
    local = ours and not os.environ.get("RAY_ADDRESS")
    share = max(1, (os.cpu_count() or 1) // config.engines) if local else 1
    cpus = config.cpus_per_engine or share
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
            result = Task.from_row(row)
            if result.status == "refused":
                raise BatchError(f"the engine cannot be opened: {result.error}")
            if result.status == "broken":
                raise RuntimeError(f"the engine cannot be opened: {result.error}")
            yield result
    except RayError as error:
        cause = getattr(error, "cause", None) or error
        raise RuntimeError(sentence(cause)) from None
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
    config: BatchConfig, model: str, results: list[Task], started: float
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
