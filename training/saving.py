"""When a checkpoint is made, what becomes of older ones, and what is said where one fails."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch.distributed as dist

from training import checkpoint as ckpt
from training.checkpoint_writer import CheckpointWriter
from training.config import TrainConfig
from training.ema import WeightAverage
from training.engine import Engine
from training.journal import Journal
from training.reporter import Notice, Reporter
from training.task import Stopped, TrainingError


class Saver:
    """The checkpoints of a run on one worker; all its methods are collective.

    A checkpoint is written while training goes on (`checkpoint.background`) and is finished by the
    first step at which every worker's part is on the disk. Nothing comes after the last one, or
    after one that was asked for, so those are waited for. One that cannot be written is given up
    and said; only the last one must not fail.

    Args:
        about: what `train.json` says of the run at any position.
        before_commit: what must be on the disk before a checkpoint counts.
    """

    def __init__(
        self,
        config: TrainConfig,
        root: Path,
        engine: Engine,
        average: WeightAverage,
        *,
        about: Mapping[str, Any],
        reporter: Reporter,
        journal: Journal,
        before_commit: Callable[[], None],
    ) -> None:
        self._config, self._root = config, root
        self._engine, self._average, self._about = engine, average, about
        self._reporter, self._journal, self._before = reporter, journal, before_commit
        self._writer = CheckpointWriter(root, engine, self._tidy)

    @property
    def done(self) -> bool:
        """Whether this worker has written all that was asked of it; not collective."""
        return self._writer.done

    def after_step(
        self,
        samples_seen: int,
        memory: Mapping[str, Any],
        *,
        written: bool,
        asked: bool,
        notice: Notice,
    ) -> None:
        """Finish and start what is due after the step that ended here.

        Args:
            memory: what `train.json` keeps besides the position.
            written: every worker's `done`, as of this step.
            asked: whether any worker has a notice.
            notice: this worker's.

        Raises:
            TrainingError: the run's last checkpoint could not be written.
            Stopped: the run was asked to stop; the checkpoint is there, or it is said why not.
        """
        ended = samples_seen >= self._config.optim.samples
        due = asked or self._due(samples_seen)
        if written or due:
            self.finish(samples_seen)
        if not due:
            return
        record = {**self._about, **memory, "samples_seen": samples_seen}
        self._writer.start(self._average.state(), record)
        if self._config.checkpoint.background and not ended and not asked:
            return
        fault = self._finish(samples_seen)
        if ended and fault:
            raise TrainingError(f"The last checkpoint {self._given_up(fault)} {_MEND}")
        if asked and not ended and self._agree(notice) == "stop":
            where = f"Stopped at {samples_seen} samples"
            if fault:
                raise Stopped(f"{where}; the checkpoint {self._given_up(fault)} {_MEND}")
            raise Stopped(f"{where}, with a checkpoint: the same command continues.")
        self._say(samples_seen, fault)
        self._reporter.heeded()

    def finish(self, samples_seen: int) -> None:
        """Wait for the checkpoint that is being written, if one is; say where it is given up."""
        self._say(samples_seen, self._finish(samples_seen))

    def _finish(self, samples_seen: int) -> str | None:
        if not self._writer.pending:
            return None
        self._before()
        fault = self._writer.finish()
        if fault is None:
            self._reporter.report({"samples_seen": samples_seen})
        return fault

    def _say(self, samples_seen: int, fault: str | None) -> None:
        if fault is not None:
            text = f"A checkpoint {self._given_up(fault)} Training goes on."
            self._journal.note(samples_seen, text)

    def _due(self, samples_seen: int) -> bool:
        """Whether the step that ended here crossed a multiple of the interval, or ended the run."""
        config = self._config
        every, size = config.checkpoint.every_samples, config.batch.global_batch
        crossed = samples_seen // every > (samples_seen - size) // every
        return crossed or samples_seen >= config.optim.samples

    def _agree(self, notice: Notice) -> Notice:
        """What the workers were asked, where at least one was: to stop, before to save."""
        notices: list[Notice] = [notice] * self._engine.world
        dist.all_gather_object(notices, notice)
        return "stop" if "stop" in notices else "save"

    def _tidy(self) -> None:
        """Remove what a new checkpoint makes superfluous."""
        keep, validate = self._config.checkpoint, self._config.validate
        best = ckpt.best_checkpoints(
            self._root,
            validate.metric,
            keep.keep_best,
            higher_is_better=validate.higher_is_better,
        )
        ckpt.prune(self._root, keep.keep, best)
        ckpt.remove_converted(self._root)

    def _given_up(self, reason: str) -> str:
        good = ckpt.newest_checkpoint(self._root, thorough=False)
        where = f"the newest good one is {good.folder.name}" if good else "there is none before it"
        return f"could not be written ({reason}); {where}."

    def __enter__(self) -> Self:
        self._writer.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.__exit__(*error)


_MEND = "Make room, then start the same command again."
