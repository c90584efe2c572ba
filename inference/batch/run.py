"""Animate a manifest of requests with Ray Data actors; what is finished stays finished.

`OUT/NAME.mp4` and `OUT/NAME.json` are an item done; the record holds the item's identity (content
of its inputs, options, model, settings), so a rerun skips it, and redoes it where anything changed.
`OUT/NAME.error.json` is an item that failed; the next run tries it again. `OUT/batch.json` has the
settings while a run goes on, and sums up when it has ended.
"""

import json
import os
import secrets
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from inference import outputs
from inference.batch.config import BatchConfig, BatchError, read_settings
from inference.batch.manifest import ManifestItem, read_manifest
from inference.batch.plan import chunks, make_tasks, measure
from inference.batch.progress import Meter, Standing, batch_bar
from inference.batch.task import WORK, Task, sweep
from inference.batch.worker import WORKERS, WORKERS_SECONDS, EngineActor, sentence
from inference.outputs import FolderLock
from pipelines.overrides import differences
from pipelines.progress import polling

__all__ = ["BatchConfig", "BatchError", "animate_batch"]

SUMMARY = "batch.json"
LOCK = ".batch.lock"
SHOWN_ERRORS = 20  # as they come; all are in the summary
EARLIER = 100  # records of former runs that tell the speed

Say = Callable[[str], None]


def animate_batch(
    config: BatchConfig, *, show_progress: bool = True, say: Say | None = None
) -> dict[str, Any]:
    """Run every item that is not done; returns the summary that is also OUT/batch.json.

    Args:
        say: gets a sentence now and then; on stderr by default, where progress is shown.

    Raises:
        RequestError, BatchError, FolderInUseError, FactoryError: nothing was made.
        RuntimeError: Ray lost the workers for good; what is finished stays.
    """
    started = time.time()
    say = say or (_say if show_progress else _be_silent)
    items = read_manifest(config.manifest)
    # Ray's processes need not share our working folder.
    config = BatchConfig(**config.absolute())
    out = config.out
    _protect_inputs(config.manifest, items, out)
    settings = read_settings(config)
    lock = FolderLock(out, LOCK, "animator batch")
    try:
        # Workers of a run that was killed live on for some seconds.
        FolderLock(out, WORKERS, "batch's worker", wait=WORKERS_SECONDS).close()
        tasks = make_tasks(
            items, config, json.dumps(settings, sort_keys=True), secrets.token_hex(8)
        )
        results = {task.id: task.ended("skipped") for task in tasks if task.is_done()}
        pending = [task for task in tasks if task.id not in results]
        sweep(out, pending)
        changed = _changes(out, settings, pending, say)
        head = {"manifest": str(config.manifest), "started_at": int(started), "settings": settings}
        outputs.write_json(out / SUMMARY, {**head, "state": "running"})
        speed: dict[str, Any] = {}
        if pending:
            finished = list(results.values())
            found, speed = _work(
                config, settings["networks"], pending, finished, show_progress, say
            )
            results |= found
        lost = [task.id for task in tasks if task.id not in results]
        if lost:
            raise RuntimeError(f"{len(lost)} item(s) came back without a result: {lost[:5]}")
        ended = [results[task.id] for task in tasks]
        summary = {
            **head,
            "state": "ended",
            "changed": changed,
            "seconds": round(time.time() - started, 3),
            **speed,
            **_sums(ended),
        }
        outputs.write_json(out / SUMMARY, summary)
        shutil.rmtree(out / WORK, ignore_errors=True)
        return summary
    finally:
        lock.close()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _be_silent(text: str) -> None:
    pass


def _protect_inputs(manifest: Path, items: list[ManifestItem], out: Path) -> None:
    """Refuse outputs that would be written over an input."""
    inputs = {manifest.resolve()}
    inputs |= {path.resolve() for item in items for path in (item.reference, item.driving)}
    if (out / SUMMARY).resolve() in inputs:
        raise BatchError(
            f"{out / SUMMARY} is an input, but the summary would be written over it; choose "
            "another --out"
        )
    for item in items:
        final = out / item.output
        for path in (final, final.with_suffix(".json"), final.with_suffix(".error.json")):
            if path.resolve() in inputs:
                raise BatchError(
                    f"line {item.line}: {path.name!r} would be written over an input in {out}; "
                    "choose another 'output' or another --out"
                )


def _changes(out: Path, settings: dict[str, Any], pending: Sequence[Task], say: Say) -> list[str]:
    """What is not as it was in the last run in this folder; it is said, too."""
    before = (outputs.read_json(out / SUMMARY) or {}).get("settings")
    changed = differences(before, settings) if isinstance(before, dict) else []
    outdated = sum(task.is_outdated() for task in pending)
    if outdated:
        why = "; ".join(changed) or "their inputs or options are others"
        say(f"{outdated} finished item(s) are made anew, as something changed: {why}")
    elif changed:
        say(f"not as in the last run in this folder: {'; '.join(changed)}")
    return changed


def _work(
    config: BatchConfig,
    networks: Mapping[str, list[str]],
    pending: list[Task],
    finished: Sequence[Task],
    show_progress: bool,
    say: Say,
) -> tuple[dict[str, Task], dict[str, Any]]:
    """The results of all that is to be done, and how fast it went."""
    results: dict[str, Task] = {}
    with batch_bar(show_progress) as tell:

        def reading(done: int, total: int) -> None:
            tell(Standing(stage="read", done=done, total=total))

        pending = measure(pending, config, reading)
        with closing(_run(config, networks, pending)) as rows:
            engines = next(rows)
            assert isinstance(engines, int)
            earlier = _earlier(finished, config)
            meter = Meter(pending, len(finished), engines, earlier)
            with polling(lambda: tell(meter.standing()), "batch-progress"):
                for result in rows:
                    assert isinstance(result, Task)
                    results[result.id] = result
                    meter.add(result)
                    if result.error and meter.counts["failed"] <= SHOWN_ERRORS:
                        say(f"{result.id}: {result.error}")
    speed = meter.seconds_per_work
    return results, {
        "engines": engines,
        "items_per_hour": round(meter.items_per_hour, 2),
        "seconds_per_frame": None if speed is None else round(speed, 4),
    }


def _earlier(finished: Sequence[Task], config: BatchConfig) -> tuple[float, float]:
    """(work, seconds) of items that former runs made with these very settings."""
    known = []
    for task in finished[:EARLIER]:
        made = (outputs.read_json(task.final.with_suffix(".json")) or {}).get("batch")
        seconds = made.get("seconds") if isinstance(made, dict) else None
        if isinstance(seconds, int | float):
            known.append((task, float(seconds)))
    measured = measure([task for task, _ in known], config, lambda done, total: None)
    return sum(task.work for task in measured), sum(seconds for _, seconds in known)


def _run(
    config: BatchConfig, networks: Mapping[str, list[str]], tasks: Sequence[Task]
) -> Generator[int | Task, None, None]:
    """How many engines there are, then the results as they come, in no order."""
    import ray
    from ray.exceptions import RayError

    from pipelines.ray_pool import pool_rows
    from pipelines.ray_session import session

    # On a cluster the nodes' sizes are not ours to know; 1 CPU fits on any of them.
    local = not (ray.is_initialized() or os.environ.get("RAY_ADDRESS"))
    engines = config.engines or (1 if local else None)
    share = max(1, (os.cpu_count() or 1) // (engines or 1)) if local else 1
    cpus = config.cpus_per_engine or share
    room = session(
        engines, len(tasks) * cpus, per_gpu=1, threads=cpus, options="--engines or --cpus"
    )
    try:
        with room as pool:
            if 0 < pool.gpus < 1:
                raise BatchError(
                    f"{engines} engines have {pool.gpus:g} GPU each, expected one GPU an engine; "
                    "ask for fewer engines"
                )
            yield pool.workers
            portions = chunks(tasks, pool.most or pool.workers)
            rows = [{"tasks": json.dumps([task.to_json() for task in part])} for part in portions]
            given = (config, networks)
            with closing(pool_rows(EngineActor, given, rows, pool, at_once=True)) as found:
                for row in found:
                    result = Task.from_json(row["task"])
                    if result.status == "refused":
                        raise BatchError(f"the engine cannot be opened: {result.error}")
                    if result.status == "broken":
                        raise RuntimeError(f"the engine cannot be opened: {result.error}")
                    yield result
    except RayError as error:
        cause = getattr(error, "cause", None) or error
        raise RuntimeError(sentence(cause)) from None


def _sums(results: Sequence[Task]) -> dict[str, Any]:
    counts = Counter(result.status for result in results)
    reused = sum((Counter(result.reused) for result in results), Counter())
    return {
        **{status: counts[status] for status in ("done", "skipped", "failed")},
        "reused": {kind: reused[kind] for kind in ("driving", "reference", "face")},
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
