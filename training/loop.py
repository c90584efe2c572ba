"""The training loop: the same order every step, all of it a function of `samples_seen`.

A global batch is the positions [s, s + B). Gradients, then a verdict on them, then the weights,
then their average, then the record, then checkpoints. Every decision is taken from numbers that
all workers have: one sum a step carries the means, which samples each took, whether all have
written their part of a checkpoint, and whether any was asked to stop.
"""

from contextlib import ExitStack
from math import isfinite
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from training import checkpoint as ckpt
from training.config import TrainConfig
from training.ema import WeightAverage, ema_decay
from training.engine import Engine, open_engine
from training.guard import FOLDER, Guard, keep_batch
from training.journal import Journal
from training.loader import BatchLoader, spans
from training.metrics import MetricsLog
from training.reporter import Reporter
from training.saving import Saver
from training.step_clock import StepClock
from training.task import Task
from training.throughput import peak_flops
from training.tracking import Tracker


def train_loop(
    task: Task,
    config: TrainConfig,
    out: Path,
    *,
    reporter: Reporter,
    tracker: Tracker,
    device: torch.device,
) -> None:
    """Train to the end, from the newest checkpoint in `out/checkpoints` if there is one.

    Every worker runs it; needs an initialised process group.

    Raises:
        TrainingError: too many steps in a row had to be left out, or the last checkpoint could
            not be written.
        Stopped: it was asked to end early.
        ResumeError: the checkpoint belongs to another run.
    """
    task.prepare(device)
    root, size, world = out / "checkpoints", config.batch.global_batch, dist.get_world_size()
    latest = _agreed_checkpoint(root)
    converted = latest is not None and latest.needs_conversion(world)
    engine = open_engine(task, config, device, converted=converted)
    first = engine.rank == 0
    average, guard = WeightAverage(engine.model, keep=first), Guard(config.guard)

    samples_seen, start = 0, ""
    if latest is not None:
        ckpt.check_resume(latest, config, task.fingerprint)
        engine.load(latest.state_for(world))
        average.load(latest.average() if first else {})
        guard.load(latest.record["guard"])
        samples_seen = latest.samples_seen
        start = latest.record.get("start", "")  # the driver has compared it
    if first:
        start = start or task.start_digest()

    with ExitStack() as stack:
        journal = stack.enter_context(Journal(out, notes=first))
        log = MetricsLog(out / "metrics.jsonl", samples_seen) if first else None
        if log is not None:
            stack.enter_context(log)
        saver = Saver(
            config, root, engine, average,
            about=ckpt.describe_run(config, task.fingerprint, world, start),
            reporter=reporter,
            journal=journal,
            before_commit=log.sync if log is not None else lambda: None,
        )  # fmt: skip
        stack.enter_context(saver)
        engine.barrier()  # what an earlier attempt left is cleared away, and the log is ours
        loader = stack.enter_context(BatchLoader(task, config, engine, samples_seen))
        clock = _clock(task, config, engine, samples_seen)

        while samples_seen < config.optim.samples:
            clock.begin()
            rate = config.optim.learning_rate(samples_seen)
            numbers: dict[str, list[Tensor]] = {}
            firsts: list[int] = []
            for first_sample, batch in loader.step():
                loss, extra = engine.backward(batch, first_sample)
                firsts.append(first_sample)
                for name, value in {**extra, "loss": loss}.items():
                    numbers.setdefault(name, []).append(value)
            notice = reporter.notice()
            means, all_firsts, written, asked = engine.average(
                numbers, firsts, done=saver.done, stop=notice != "none"
            )
            norm = engine.grad_norm()
            clock.lap("compute")

            fault = guard.fault(means["loss"], norm)
            if fault is None:
                engine.step(rate)
            else:
                engine.skip()
            clock.lap("optimiser")

            samples_seen += size
            step = samples_seen // size
            if step % config.ema.every == 0:
                covered, ema = config.ema.every * size, config.ema
                average.update(ema_decay(samples_seen, covered, ema.half_life, ema.ramp))

            record = {
                "samples_seen": samples_seen,
                "step": step,
                "samples": spans(all_firsts, config.batch.micro_batch),
                **{name: _number(value) for name, value in means.items()},
                "lr": rate,
                "grad_norm": _number(norm),
                "skipped": guard.left_out,
                "epoch": samples_seen / task.num_samples,
                **clock.end(loader.waited),
            }
            journal.replaced(samples_seen, task.problems())
            if log is not None:
                log.write(record)
                if step % config.run.log_every == 0:
                    tracker.log(record)

            if fault is not None:
                where = f"step {step} (samples {samples_seen - size} to {samples_seen - 1})"
                journal.note(samples_seen, f"Left out {where}: {fault}.")
                facts = {"reason": fault, "step": step, "guard": guard.state(), "numbers": numbers}
                keep, folder, start = config.guard.keep_batches, out / FOLDER, samples_seen - size
                if lost := keep_batch(folder, start, engine.rank, loader.again, facts, keep):
                    journal.note(samples_seen, f"The batch of {where} is not kept: {lost}.")
                if guard.exhausted:
                    saver.finish(samples_seen)
                    raise guard.exhaustion(where, fault, folder)

            memory = {"guard": guard.state()}
            saver.after_step(samples_seen, memory, written=written, asked=asked, notice=notice)


def _agreed_checkpoint(root: Path) -> ckpt.Checkpoint | None:
    """The newest checkpoint as rank 0 sees it: shared storage may show its name later elsewhere."""
    found = [ckpt.newest_checkpoint(root, thorough=False) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def _clock(task: Task, config: TrainConfig, engine: Engine, samples_seen: int) -> StepClock:
    peak, size = peak_flops(engine.device, config.run.precision), config.batch.global_batch
    return StepClock(
        engine.device,
        steps=config.num_steps - samples_seen // size,
        samples=size,
        flops=task.flops,
        peak=None if peak is None else peak * engine.world,
    )


def _number(value: float) -> float | None:
    return value if isfinite(value) else None
