"""Start a training run: check, start workers, watch, export. Only here Ray Train is started."""

import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pipelines.overrides import config_hash
from training import tracking
from training.config import TrainConfig, binding_settings, describe
from training.metrics import Console, MetricsTail, Progress
from training.output import (
    TrainSummary,
    export_model,
    finished_summary,
    has_failure,
    only_run_in,
    prepare_folder,
    raise_failure,
    write_failure,
)
from training.task import TrainingError


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
            _run_workers(config, out, progress, local=local)
        return export_model(config, task, out, progress)


def _run_workers(config: TrainConfig, out: Path, progress: Progress, *, local: bool) -> None:
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(1))
        opened = None
        if config.run.track:  # opened while Ray starts, since both take seconds
            identity = config_hash(binding_settings(config))
            opened = pool.submit(
                tracking.open_run, out, config.task.name, describe(config), identity
            )
        session = None if local else stack.enter_context(_ray())
        run = opened.result() if opened else None
        stack.enter_context(_following(out / "metrics.jsonl", progress))
        finished = False
        try:
            if local:
                _train_here(config, out, run)
            else:
                _train_on_ray(config, out, run, session)
            finished = True
        finally:
            tracking.close_run(run, finished=finished)


def _train_on_ray(
    config: TrainConfig, out: Path, run: tracking.TrackedRun | None, session: Path | None
) -> None:
    import ray.exceptions
    import ray.train
    from ray.train.torch import TorchTrainer

    use_gpu, cpus = _resources(config)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "config": config,
            "out": out,
            "run": run,
            "folder": Path.cwd(),
            "threads": config.run.threads_per_worker or cpus,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.run.num_workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": 1, "GPU": 1} if use_gpu else {"CPU": 1},
        ),
        run_config=ray.train.RunConfig(
            name="checkpoints",
            storage_path=str(out),
            failure_config=ray.train.FailureConfig(max_failures=config.run.max_failures),
        ),
    )
    try:
        trainer.fit()
    except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
        raise_failure(out)
        raise TrainingError(_sentence(error, out, session)) from None
    raise_failure(out)


def _worker(payload: dict[str, Any]) -> None:
    """One training worker, in its own process."""
    config, out, run = payload["config"], payload["out"], payload["run"]
    if has_failure(out):
        return  # an earlier attempt ended in a way that this one would repeat
    os.chdir(payload["folder"])
    import ray.train.torch
    import torch

    from training.loop import train_loop
    from training.reporter import RayReporter

    torch.set_num_threads(payload["threads"])
    rank = ray.train.get_context().get_world_rank()
    tracker = _tracker(run if rank == 0 else None)
    try:
        train_loop(
            config.build_task(),
            config,
            out,
            reporter=RayReporter(),
            tracker=tracker,
            device=ray.train.torch.get_device(),
        )
    except TrainingError as error:
        write_failure(out, error)  # on every worker alike: none is left waiting for another
    except Exception as error:
        with (out / "errors.log").open("a") as file:
            file.write(f"worker {rank}, {time.ctime()}\n{traceback.format_exc()}\n")
        if isinstance(error, ValueError):
            write_failure(out, error)
        raise
    finally:
        tracker.close()


def _train_here(config: TrainConfig, out: Path, run: tracking.TrackedRun | None) -> None:
    import torch
    import torch.distributed as dist

    from training.loop import train_loop
    from training.reporter import LocalReporter

    use_gpu = torch.cuda.is_available() if config.run.use_gpu is None else config.run.use_gpu
    device = torch.device("cuda", 0) if use_gpu else torch.device("cpu")
    if not dist.is_initialized():
        backend = "nccl" if use_gpu else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if config.run.threads_per_worker:
        torch.set_num_threads(config.run.threads_per_worker)
    tracker = _tracker(run)
    try:
        train_loop(
            config.build_task(),
            config,
            out,
            reporter=LocalReporter(out / "checkpoints"),
            tracker=tracker,
            device=device,
        )
    finally:
        tracker.close()


def _tracker(run: tracking.TrackedRun | None) -> tracking.Tracker:
    return tracking.MlflowTracker(run) if run else tracking.NullTracker()


@contextmanager
def _ray() -> Iterator[Path]:
    """A Ray that workers can start on: the running one, the one of `RAY_ADDRESS`, or our own.

    Gives the folder of its logs and shuts down what it started.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")  # how fast reports return
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # paths mean what they mean here
    import ray

    session = Path("/tmp/ray/session_latest")
    if ray.is_initialized():
        yield session
        return
    for attempts_left in (2, 1, 0):
        try:
            _start_ray()
            break
        except Exception as error:
            ray.shutdown()
            if attempts_left and "timed out" in str(error):
                continue  # Ray gives its processes 30 seconds, which a busy machine exceeds
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise TrainingError(
                f"Ray did not start: {reason} Start again when the machine is less busy, or train "
                f"without Ray in one process. Log: {session}/logs"
            ) from error
    try:
        yield session.resolve()
    finally:
        ray.shutdown()


def _start_ray() -> None:
    import logging

    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address := os.environ.get("RAY_ADDRESS"):
        ray.init(address=address, **quiet)
        return
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes this node
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves it beside other work
    with _modules_of_driver():
        ray.init(
            address="local",
            # Logical CPUs: workers, Ray Train's controller and a data task fit together.
            num_cpus=max(4, os.cpu_count() or 1),
            include_dashboard=False,
            object_store_memory=128 << 20,  # training passes nothing through it
            **quiet,
        )


@contextmanager
def _modules_of_driver() -> Iterator[None]:
    """Let processes that start now import what this one can, such as a task beside a script."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if Path(path).is_dir())
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _resources(config: TrainConfig) -> tuple[bool, int]:
    """Whether workers get a GPU, and how many cores each has.

    Raises:
        ValueError: more workers than this machine has room for. A cluster may grow instead.
    """
    import ray

    workers, total = config.run.num_workers, ray.cluster_resources()
    gpus = int(total.get("GPU", 0))
    use_gpu = gpus > 0 if config.run.use_gpu is None else config.run.use_gpu
    kind, room = ("GPUs", gpus) if use_gpu else ("CPUs", int(total.get("CPU", 0)))
    if workers > room and "RAY_ADDRESS" not in os.environ:
        raise ValueError(
            f"run.num_workers is {workers}, expected at most {room}, the number of {kind} here: "
            f"set run.num_workers={max(room, 1)}{' or run.use_gpu=false' if use_gpu else ''}."
        )
    nodes = max(1, sum(node["Alive"] for node in ray.nodes()))
    return use_gpu, max(1, (os.cpu_count() or 1) * nodes // workers)


@contextmanager
def _following(path: Path, progress: Progress) -> Iterator[None]:
    """Show the steps that workers log while the body runs."""
    tail, over = MetricsTail(path), threading.Event()

    def follow() -> None:
        seen = 0
        while True:
            last = over.wait(0.2)
            for record in tail.new():
                if record["samples_seen"] <= seen:
                    progress.note(f"Went back to step {record['step']} after a lost worker.")
                seen = record["samples_seen"]
                progress.step(record)
            if last:
                return

    thread = threading.Thread(target=follow, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(5)


def _sentence(error: Exception, out: Path, session: Path | None) -> str:
    """One sentence for a failure of Ray Train: the first cause, and where to read more."""
    failures: dict[int, Any] = getattr(error, "worker_failures", {})
    causes = {rank: getattr(cause, "_base_exc", cause) for rank, cause in failures.items()}
    # When one worker goes, the others fail too, in the middle of talking to it.
    echoes = ("Connection reset by peer", "Connection closed by peer", "NCCL", "Broken pipe")
    first = sorted(causes.items(), key=lambda item: any(e in str(item[1]) for e in echoes))
    log = out / "errors.log"
    where = log if log.exists() else f"{session}/logs"
    if not first:
        lines = str(error).strip().splitlines()
        return f"Training failed: {lines[-1] if lines else type(error).__name__}. Log: {where}"
    rank, cause = first[0]
    text = (str(cause).strip().splitlines() or [""])[0]
    return f"Training failed on worker {rank}: {type(cause).__name__}: {text}. Log: {where}"
