"""Start a training run: check, start workers, watch, export."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipelines.overrides import config_hash
from training import ray_workers, tracking
from training.config import TrainConfig, binding_settings, describe
from training.journal import CLIPS, NOTES, describe_note
from training.metrics import Console, MetricsTail, Progress
from training.output import TrainSummary, finished_summary, only_run_in, prepare_folder
from training.release import export_model
from training.stop_request import StopRequest, stop_on_signals
from training.validate import watching_checkpoints


def train(
    config: TrainConfig, out: Path, *, progress: Progress | None = None, local: bool = False
) -> TrainSummary:
    """Train to the end and export the model; the same call continues an interrupted run.

    Args:
        progress: what shows the run; a bar and lines on the console by default.
        local: one worker in this process, without Ray.

    Raises:
        ValueError: settings or data that cannot be trained on, or that differ from those of the
            run in `out`.
        TrainingError: training failed; one sentence, and where the log is.
        Stopped: this process was sent SIGTERM, SIGUSR1 or Ctrl-C and the run ended with a
            checkpoint; a second Ctrl-C is a KeyboardInterrupt.
    """
    out = out.resolve()
    world = 1 if local else config.run.num_workers
    config.accumulation(world)
    if not out.exists():
        config.build_task()  # a mistake must not leave an empty folder
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(only_run_in(out))
        if (summary := finished_summary(config, out)) is not None:
            return summary
        task = config.build_task()
        if progress is None:
            progress = stack.enter_context(Console(config.num_steps, config.run.log_every))
        samples_seen = prepare_folder(config, task, out, world, progress)
        if samples_seen < config.optim.samples:
            _run_workers(config, task.fingerprint, out, progress, local=local)
        else:  # a validation may be left, where a kill came after the last step
            run = tracking.tracked_run(out) if config.run.track else None
            with watching_checkpoints(config, out, run, progress, local=True, workers=0):
                pass
        return export_model(config, task, out, progress)


def _run_workers(
    config: TrainConfig, fingerprint: str, out: Path, progress: Progress, *, local: bool
) -> None:
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(1))
        opened = None
        if config.run.track:  # opened while Ray starts, since both take seconds
            identity = config_hash(binding_settings(config))
            about = (out, config.task.name, describe(config), identity)
            more = {"fingerprint": fingerprint, "say": progress.note}
            opened = pool.submit(tracking.open_run, *about, **more)
        session = None if local else stack.enter_context(ray_workers.ray_session())
        run = opened.result() if opened else None
        request = stack.enter_context(stop_on_signals(out))  # after Ray, which takes SIGTERM
        stack.enter_context(_following(out, progress, request))
        finished, workers = False, config.run.num_workers
        try:
            with watching_checkpoints(config, out, run, progress, local=local, workers=workers):
                if session is None:
                    _train_here(config, out, run)
                else:
                    ray_workers.train_on_ray(config, out, run, session)
            finished = True
        finally:
            tracking.close_run(run, finished=finished, say=progress.note)


def _train_here(config: TrainConfig, out: Path, run: tracking.TrackedRun | None) -> None:
    os.environ.update({**ray_workers.ALLOCATOR, **os.environ})
    import torch

    from training.reporter import LocalReporter
    from training.worker import join_alone, run_worker

    use_gpu = torch.cuda.is_available() if config.run.use_gpu is None else config.run.use_gpu
    device = torch.device("cuda", 0) if use_gpu else torch.device("cpu")
    join_alone(device)
    if config.run.threads_per_worker:
        torch.set_num_threads(config.run.threads_per_worker)
    run_worker(config, out, run, reporter=LocalReporter(out), device=device)


@contextmanager
def _following(out: Path, progress: Progress, request: StopRequest) -> Iterator[None]:
    """Show what workers log and note while the body runs."""
    show = _shower(out, progress, request)
    over = threading.Event()

    def follow() -> None:
        while not over.wait(0.2):
            show()
        show()

    thread = threading.Thread(target=follow, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(5)


def _shower(out: Path, progress: Progress, request: StopRequest) -> Callable[[], None]:
    """A function that shows what is new since its last call."""
    steps = MetricsTail(out / "metrics.jsonl")
    notes = [MetricsTail(out / NOTES, "text"), MetricsTail(out / CLIPS, "key")]
    seen, stopping = 0, False

    def show() -> None:
        nonlocal seen, stopping
        if request.made() and not stopping:
            stopping = True
            progress.note("Stopping with a checkpoint after this step; Ctrl-C stops at once.")
        for record in steps.new():
            if record["samples_seen"] <= seen:
                progress.note(f"Went back to step {record['step']} after a lost worker.")
            seen = record["samples_seen"]
            progress.step(record)
        for entry in (entry for tail in notes for entry in tail.new()):
            progress.note(describe_note(entry))

    return show
