"""Training workers under Ray Train: start Ray, start the workers, say in a sentence what failed."""

import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

from pipelines.ray_session import PATIENCE_SECONDS
from pipelines.ray_sizes import amounts
from training import tracking
from training.config import TrainConfig
from training.journal import say
from training.output import enter_folder, has_failure, raise_failure, write_failure
from training.stop_request import StopRequest
from training.task import Stopped, TrainingError

# Before torch allocates: memory that was split up for one shape can then serve another.
ALLOCATOR = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
_STATE = ".ray"  # Ray Train's own files, in the run's folder
_TELL_SECONDS = 30.0  # between sentences about waiting
_LOOK_SECONDS = 1.0
_NO_START = "WorkerGroupStartupTimeoutError"  # Ray Train's, for workers without a place
# Ray Train gives its workers a minute to start and would try for ever where a lost machine does
# not come back; each loss that a run survives is allowed so many minutes.
_STARTS_A_LOSS = int(PATIENCE_SECONDS // 60)


def train_on_ray(
    config: TrainConfig, out: Path, run: tracking.TrackedRun | None, session: Path | None
) -> None:
    """Train on the workers of a running Ray.

    Args:
        session: the folder of Ray's logs, for the message of a failure.

    Raises:
        TrainingError, Stopped, ValueError: what a worker ended with.
    """
    import ray.exceptions
    import ray.train

    use_gpu, cpus = _resources(config, out)
    # Ray's own list of what it has seen; our checkpoints say for themselves what they are, and a
    # list that a kill left torn would keep Ray from starting.
    shutil.rmtree(out / _STATE, ignore_errors=True)
    trainer = _trainer_class()(
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
            resources_per_worker=_share(use_gpu),
        ),
        run_config=ray.train.RunConfig(
            name=_STATE,
            storage_path=str(out),
            failure_config=ray.train.FailureConfig(
                max_failures=config.run.max_failures,
                controller_failure_limit=_STARTS_A_LOSS * (config.run.max_failures + 1),
            ),
            worker_runtime_env={"env_vars": ALLOCATOR} if use_gpu else None,
        ),
    )
    try:
        _fit(trainer)
    except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
        raise_failure(out)
        raise TrainingError(_sentence(error, out, session)) from None
    raise_failure(out)


def _fit(trainer: Any) -> None:
    """Run in a thread of its own: in the main one Ray would take over Ctrl-C, which asks our
    workers to stop with a checkpoint, and the main thread must be free to see signals."""
    outcome: Future[None] = Future()

    def run() -> None:
        try:
            outcome.set_result(trainer.fit())
        except BaseException as error:
            outcome.set_exception(error)

    Thread(target=run, name="ray-train", daemon=True).start()
    outcome.result()


def _worker(payload: dict[str, Any]) -> None:
    """One training worker, in its own process."""
    config, out, run = payload["config"], payload["out"], payload["run"]
    if has_failure(out):
        return  # an earlier attempt ended in a way that this one would repeat
    import ray.train.torch
    import torch

    torch.set_num_threads(payload["threads"])
    context = ray.train.get_context()
    rank = context.get_world_rank()
    try:
        enter_folder(payload["folder"])
        from training.reporter import RayReporter
        from training.worker import run_worker

        run_worker(
            config,
            out,
            run,
            reporter=RayReporter(out),
            device=ray.train.torch.get_device(),
            rank=rank,
            local_rank=context.get_local_rank(),
            node_rank=context.get_node_rank(),
        )
    except (TrainingError, Stopped) as error:
        write_failure(out, error)  # on every worker alike: none is left waiting for another
    except Exception as error:
        with (out / "errors.log").open("a") as file:
            file.write(f"worker {rank}, {time.ctime()}\n{traceback.format_exc()}\n")
        if isinstance(error, ValueError):
            write_failure(out, error)
        raise


def _trainer_class() -> Any:
    """Ray Train's trainer; on a cluster of our own, without the actor that outlives its controller.

    That actor takes the workers' places away once Ray's state API does not know the controller.
    It asks the cluster that was started last on the machine, which need not be this one, and then
    takes them from a run that is well. A cluster of our own ends with the driver anyway.
    """
    from ray.train.torch import TorchTrainer

    if "RAY_ADDRESS" in os.environ:
        return TorchTrainer

    class OwnClusterTrainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            made = super()._create_default_callbacks()
            return [c for c in made if type(c).__name__ != "PlacementGroupCleanerCallback"]

    return OwnClusterTrainer


@contextmanager
def ray_session() -> Iterator[Path]:
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


def _share(use_gpu: bool) -> dict[str, float]:
    """What one worker takes of a machine."""
    return {"CPU": 1, "GPU": 1} if use_gpu else {"CPU": 1}


def _resources(config: TrainConfig, out: Path) -> tuple[bool, int]:
    """Whether workers get a GPU, and how many cores each has.

    Raises:
        ValueError: more workers than this machine has room for.
        TrainingError, Stopped: as `_wait_for_room`, on a cluster, which may grow.
    """
    import ray

    workers, total = config.run.num_workers, ray.cluster_resources()
    gpus = int(total.get("GPU", 0))
    use_gpu = gpus > 0 if config.run.use_gpu is None else config.run.use_gpu
    kind, room = ("GPUs", gpus) if use_gpu else ("CPUs", int(total.get("CPU", 0)))
    if "RAY_ADDRESS" in os.environ:
        _wait_for_room(workers, use_gpu, out)
    elif workers > room:
        raise ValueError(
            f"run.num_workers is {workers}, expected at most {room}, the number of {kind} here: "
            f"set run.num_workers={max(room, 1)}{' or run.use_gpu=false' if use_gpu else ''}."
        )
    nodes = max(1, sum(node["Alive"] for node in ray.nodes()))
    return use_gpu, max(1, (os.cpu_count() or 1) * nodes // workers)


def _wait_for_room(
    workers: int, use_gpu: bool, out: Path, patience: float = PATIENCE_SECONDS
) -> None:
    """Wait until a cluster has room for all workers; asking for it makes an autoscaler add nodes.

    Ray Train would wait without a word and without an end.

    Args:
        patience: seconds.

    Raises:
        TrainingError: there is still no room; what is needed, what is there and what is free.
        Stopped: the run was asked to end.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    share = _share(use_gpu)
    several = f"{workers} worker{'s' * (workers != 1)}"
    need = f"the Ray cluster has no room for {several} with {amounts(share)} each"
    request, began, told = StopRequest(out), time.monotonic(), -_TELL_SECONDS
    group = placement_group([share] * workers)
    try:
        while not group.wait(min(_LOOK_SECONDS, max(0.1, patience))):
            waited = time.monotonic() - began
            there, free = ray.cluster_resources(), ray.available_resources()
            of_it = [amounts({k: found.get(k, 0.0) for k in share}) for found in (there, free)]
            now = f"it has {of_it[0]}, of which {of_it[1]} are free"
            if request.made():
                raise Stopped(f"Stopped before the start: {need} ({now}).")
            if waited >= patience:
                raise TrainingError(
                    f"{need}: {now} after {waited:.0f} s. Add machines, wait for other work, or "
                    "set run.num_workers lower."
                )
            if waited - told >= _TELL_SECONDS:
                told = waited
                say(out, f"Waiting: {need} ({now}).")
    finally:
        remove_placement_group(group)


def _sentence(error: Exception, out: Path, session: Path | None) -> str:
    """One sentence for a failure of Ray Train: the first cause, and where to read more."""
    failures: dict[int, Any] = getattr(error, "worker_failures", {})
    causes = {rank: getattr(cause, "_base_exc", cause) for rank, cause in failures.items()}
    # When one worker goes, the others fail too, in the middle of talking to it.
    echoes = ("Connection reset by peer", "Connection closed by peer", "NCCL", "Broken pipe")
    first = sorted(causes.items(), key=lambda item: any(e in str(item[1]) for e in echoes))
    log = out / "errors.log"
    where = log if log.exists() else f"{session}/logs"
    if type(getattr(error, "controller_failure", None)).__name__ == _NO_START:
        return (
            "Training failed: its workers found no room on the Ray cluster again. The same command "
            f"continues from the last checkpoint once machines are there. Log: {where}"
        )
    if not first:
        lines = str(error).strip().splitlines()
        return f"Training failed: {lines[-1] if lines else type(error).__name__}. Log: {where}"
    rank, cause = first[0]
    text = (str(cause).strip().splitlines() or [""])[0]
    return f"Training failed on worker {rank}: {type(cause).__name__}: {text}. Log: {where}"
