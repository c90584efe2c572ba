"""Checkpoints are tried on held-out data while training goes on: in a Ray task or a child process.

The driver sees new checkpoints, keeps their averaged weights by a hard link, has them validated
one after the other and commits each result by a rename. A validation that fails is a note and
never stops training; what a killed driver leaves is taken up by the next one.
"""

import json
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipelines.shards import sync_folder
from training import checkpoint as ckpt
from training.config import TrainConfig
from training.metrics import Progress
from training.outbox import Outbox
from training.registry import Validation, validation_outbox
from training.release import BEST, METRICS
from training.stop_request import StopRequest
from training.tracking import TrackedRun
from training.validate_attempts import Attempt, ChildProcess, RayTask
from training.validate_checkpoint import ABOUT, FOLDER, read_validations

_LOOK = 0.5  # seconds between looks at the checkpoints
_WAITING = 2  # validations that wait for the one that runs; each holds weights on the disk
PATIENCE = 3600.0  # seconds that the end of training waits for what is not validated yet


@contextmanager
def watching_checkpoints(
    config: TrainConfig,
    out: Path,
    run: TrackedRun | None,
    progress: Progress,
    *,
    local: bool,
    workers: int,
    patience: float = PATIENCE,
) -> Iterator[None]:
    """Validate the checkpoints that appear in `out/checkpoints` while the body runs.

    A body that ends well is followed by the validations that are left, the last checkpoint's
    included; one that raises is not.

    Args:
        run: where results are tracked; None: nowhere.
        local: in a child process; otherwise as a task of the Ray that runs.
        workers: training's, which take a GPU each where there are GPUs.
        patience: seconds to wait for at the end.
    """
    if not config.validate.every_samples:
        yield
        return
    watch = _Watch(config, out, run, progress, local=local, workers=workers)
    thread = threading.Thread(target=watch.follow, name="validation", daemon=True)
    thread.start()
    try:
        yield
        watch.last.set()
        deadline, request = time.monotonic() + patience, StopRequest(out)
        while thread.is_alive() and not request.made():
            thread.join(_LOOK)
            if time.monotonic() > deadline:
                progress.note("The last validation takes too long; the model is written without.")
                break
    finally:
        watch.over.set()
        thread.join(10)
        watch.close()


class _Watch:
    """Finds what is due, runs one validation at a time, commits results.

    Attributes:
        last: no more checkpoints will appear; end when everything is validated.
        over: end now.
    """

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        run: TrackedRun | None,
        progress: Progress,
        *,
        local: bool,
        workers: int,
    ) -> None:
        self.last, self.over = threading.Event(), threading.Event()
        self._config, self._out, self._progress = config, out, progress
        self._local, self._workers = local, workers
        self._root = out / FOLDER
        self._outbox: Outbox[Validation] | None = None
        if run is not None:
            self._outbox = validation_outbox(run, progress.note)
        self._waiting: deque[Path] = deque()
        self._current: tuple[Path, Attempt] | None = None
        done = (entry["samples_seen"] for entry in read_validations(out))
        self._seen = max(done, default=0)  # the newest that was looked at
        self._said: set[str] = set()

    def follow(self) -> None:
        """Work until `over`, or until nothing is left after `last`."""
        try:
            self._take_up()
            while not self.over.is_set():
                ending = self.last.is_set()  # before the look, so that it sees all there will be
                self._look()
                self._advance()
                if ending and self._current is None and not self._waiting:
                    return
                self.over.wait(_LOOK)
        except Exception as error:
            self._progress.note(f"Validation has ended: {type(error).__name__}: {error}")
        finally:
            if self._current is not None:
                self._current[1].stop()

    def close(self) -> None:
        if self._outbox is not None:
            self._outbox.close()

    def _take_up(self) -> None:
        """Queue what an earlier driver began."""
        for folder in sorted(self._root.glob(".samples-*")):
            if (folder / METRICS).is_file() or (folder / ckpt.AVERAGE).is_file():
                self._waiting.append(folder)
                self._seen = max(self._seen, _samples(folder))
            else:
                shutil.rmtree(folder, ignore_errors=True)

    def _look(self) -> None:
        """Keep the weights of new checkpoints that are due."""
        every, end = self._config.validate.every_samples, self._config.optim.samples
        for folder in sorted((self._out / "checkpoints").glob("samples-*")):
            samples = _samples(folder)
            if samples <= self._seen:
                continue
            if samples // every == self._seen // every and samples < end:
                continue
            target = self._root / f".{folder.name}"
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
            try:
                _link(folder / ckpt.AVERAGE, target / ckpt.AVERAGE)
            except FileNotFoundError:  # removed in favour of newer ones
                shutil.rmtree(target, ignore_errors=True)
                continue
            self._seen = samples
            self._waiting.append(target)
            while len(self._waiting) > _WAITING:
                late = self._waiting.popleft()
                shutil.rmtree(late, ignore_errors=True)
                self._progress.note(
                    f"{_samples(late)} samples are not validated: the validation before takes "
                    "longer than training to the next; set validate.every_samples higher."
                )

    def _advance(self) -> None:
        if self._current is not None:
            folder, attempt = self._current
            if not attempt.poll():
                return
            self._current = None
            fault = attempt.fault()
            if fault is None and not (folder / METRICS).is_file():
                fault = f"it left no {METRICS}"
            if fault is None:
                self._commit(folder)
            else:
                shutil.rmtree(folder, ignore_errors=True)
                self._progress.note(f"Validation at {_samples(folder)} samples failed: {fault}")
        if self._current is None and self._waiting:
            folder = self._waiting.popleft()
            if (folder / METRICS).is_file():
                self._commit(folder)
            else:
                self._current = folder, self._start(folder)

    def _start(self, folder: Path) -> Attempt:
        if self._local:
            return ChildProcess(self._config, self._out, folder)
        attempt = RayTask(self._config, self._out, folder, self._workers)
        if attempt.slow:
            self._say_once(
                "Validation runs on the CPU, since training has every GPU: leave one free, or add "
                "a machine."
            )
        return attempt

    def _commit(self, folder: Path) -> None:
        """Give a finished validation its name, and its model that of the best."""
        result = json.loads((folder / METRICS).read_text())
        metrics = {name: value for name, value in result.items() if name not in ABOUT}
        model, best = folder / "model", None
        if model.is_dir():
            shutil.copyfile(folder / METRICS, model / METRICS)
            best = self._out / BEST
            shutil.rmtree(best, ignore_errors=True)
            os.replace(model, best)
        (folder / ckpt.AVERAGE).unlink(missing_ok=True)
        target = self._root / folder.name.removeprefix(".")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(folder, target)
        with suppress(OSError):
            sync_folder(self._root)
        self._tell(result["samples_seen"], metrics, best is not None)
        validate = self._config.validate
        if self._outbox is not None and metrics:
            self._outbox.put(
                Validation(
                    task=self._config.task.name,
                    samples_seen=result["samples_seen"],
                    metrics={k: v for k, v in metrics.items() if v is not None},
                    folder=target,
                    fingerprint=result["fingerprint"],
                    metric=validate.metric,
                    higher_is_better=validate.higher_is_better,
                    best=best,
                    time_ms=int(time.time() * 1000),
                )
            )

    def _tell(self, samples: int, metrics: dict[str, Any], best: bool) -> None:
        if not metrics:
            self._say_once("Nothing is validated: this task holds no data out.")
            return
        shown = ", ".join(f"{k} {'–' if v is None else f'{v:.4g}'}" for k, v in metrics.items())
        mark = " (best so far)" if best else ""
        self._progress.note(f"Validation at {samples} samples: {shown}{mark}")
        if (metric := self._config.validate.metric) not in metrics:
            self._say_once(
                f"validate.metric is {metric!r}, expected one of {', '.join(metrics)}: no model is "
                "kept as the best."
            )

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._progress.note(text)


def _samples(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _link(source: Path, target: Path) -> None:
    """The same file under a second name, or a copy where storage has no links."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)
