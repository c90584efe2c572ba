"""The worker's side of a batch: one engine, one item after another, each done or recorded.

No Ray in here: `inference/batch/run.py` has Ray Data call `EngineActor`.
"""

import json
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from inference import outputs
from inference.batch.config import BatchConfig, BatchError, chosen_networks, found_networks
from inference.batch.task import Task
from inference.engine_factory import Engine, open_engine
from inference.outputs import FolderLock
from inference.requests import AnimationRequest
from pipelines.models import cache_folder

MAX_DEATHS = 3
WORKERS = ".batch.workers"  # held by every worker, so that a run never overlaps a killed one's
WORKERS_SECONDS = 60.0
RESUMED_FRAMES = 64  # longer items are continued where they were, shorter ones begun again
REMEMBERED = 48  # pictures and clips that an engine's perception keeps in mind

log = logging.getLogger(__name__)


class EngineActor:
    """One engine in a Ray Data actor: tasks in, results out, whatever happens between.

    Args:
        networks: what the driver found of them (see `found_networks`), as the items' identities
            have it: an engine that sees by others would make other videos. Networks that it does
            not see by may differ.
    """

    def __init__(self, config: BatchConfig, networks: Mapping[str, list[str]]) -> None:
        self.lock = FolderLock(config.out, WORKERS, "batch", shared=True, wait=WORKERS_SECONDS)
        self.engine: Engine | None = None
        self.refusal = ("", "")
        try:
            _check_networks(config, networks)
            self.engine = open_engine(
                config.engine_factory,
                config.model_dir,
                **config.engine_options(),
                remember=REMEMBERED,
            )
        except Exception as error:  # Ray Data would tell the driver no more than that it died
            log.exception("the engine cannot be opened")
            status = "refused" if isinstance(error, ValueError) else "broken"
            self.refusal = (status, sentence(error))

    def __call__(self, batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The result of each task of a chunk as soon as it is there."""
        for chunk in batch["tasks"]:
            for text in json.loads(chunk):
                yield {"task": [self.run(Task.from_json(text)).to_json()]}

    def run(self, task: Task) -> Task:
        """Make one item and publish it, or record why it failed; never raises for the item."""
        if self.engine is None:
            status, error = self.refusal
            return replace(task, status=status, error=error)
        # A process died after this item, before its chunk was finished.
        if task.is_done():
            return task.ended("done")
        if error := task.failure():
            return replace(task, status="failed", error=error)
        started, before = time.time(), _hits(self.engine)
        try:
            self._make(self.engine, task)
        except Exception as error:
            if _is_poison(error):
                _die(task, error)
            if not isinstance(error, ValueError):
                log.exception("%s: failed", task.id)
            return task.ended("failed", sentence(error), time.time() - started)
        reused = dict(_hits(self.engine) - before)
        return task.ended("done", seconds=time.time() - started, reused=reused)

    def _make(self, engine: Engine, task: Task) -> None:
        if task.starts >= MAX_DEATHS:
            raise RuntimeError(f"the engine's process died {task.starts} times on this item")
        with task.starts_file.open("ab") as stream:
            stream.write(b".")
        started = time.time()
        staged = task.starts_file.with_name(f"{task.final.stem}.{os.getpid()}.mp4")
        request = AnimationRequest.from_json({**task.request, "output": staged})
        shape = dict(task.shape)
        if task.frames > RESUMED_FRAMES:
            # What it holds may be of another precision, made on another kind of node.
            shape |= {"work": task.states, "replace_work": True}
        try:
            made = engine.run(request, **shape)
            record = {
                **made,
                "id": task.id,
                "output": task.final.name,
                "identity": task.identity,
                "batch": {"starts": task.starts, "seconds": round(time.time() - started, 3)},
            }
            outputs.publish(staged, task.final, outputs.describe(staged, record))
        finally:
            for path in (staged, staged.with_suffix(".json")):
                path.unlink(missing_ok=True)


def _check_networks(config: BatchConfig, networks: Mapping[str, list[str]]) -> None:
    own = chosen_networks(config, found_networks(config))
    expected = chosen_networks(config, networks)
    if own != expected:
        raise BatchError(
            f"the worker on {socket.gethostname()} would see by the networks {_names(own)}, but "
            f"the batch was started with {_names(expected)}: give every machine the same "
            f"ANIMATOR_MODELS and the same models in the cache folder ({cache_folder()}); "
            "`animator models list` shows what a machine has."
        )


def _names(networks: Mapping[str, list[str]]) -> str:
    return "; ".join(f"{kind}: {', '.join(names) or 'none'}" for kind, names in networks.items())


def _hits(engine: Engine) -> Counter[str]:
    return Counter(getattr(getattr(engine, "perception", None), "hits", None) or {})


def _is_poison(error: Exception) -> bool:
    """Whether no later item can succeed in this process: a GPU's context is lost for good."""
    return type(error).__name__ == "AcceleratorError"


def _die(task: Task, error: Exception) -> None:
    """End the process; Ray starts another, which tries the item again."""
    log.error("%s: the device is lost: %s", task.id, sentence(error))
    logging.shutdown()
    os._exit(1)


def sentence(error: BaseException) -> str:
    """The error's first line, with its type where it is no user's mistake."""
    text = str(error).strip().splitlines() or ["no reason given"]
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"{kind}{text[0]}"[:500]
