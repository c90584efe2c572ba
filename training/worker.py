"""One worker of a run, in whatever process it was started."""

from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from training import tracking
from training.config import TrainConfig
from training.journal import say
from training.loop import train_loop
from training.node_monitor import NodeMonitor
from training.reporter import Reporter


def run_worker(
    config: TrainConfig,
    out: Path,
    run: tracking.TrackedRun | None,
    *,
    reporter: Reporter,
    device: torch.device,
    rank: int = 0,
    local_rank: int = 0,
    node_rank: int = 0,
) -> None:
    """Train to the end as one of the workers; needs an initialised process group.

    Args:
        run: where numbers go besides the run's folder; None: nowhere.
        rank: among all workers; the first one speaks for all.
        local_rank: among those of this node; the first one watches the node.

    Raises:
        TrainingError, Stopped, ValueError: as `train_loop`.
    """
    with ExitStack() as stack:
        tell = partial(say, out)
        if local_rank == 0:
            stack.enter_context(NodeMonitor(run, out, node=f"node-{node_rank}", say=tell))
        tracker = tracking.NullTracker()
        if run is not None and rank == 0:
            tracker = tracking.MlflowTracker(run, say=tell)
        stack.callback(tracker.close)
        task = config.build_task()
        train_loop(task, config, out, reporter=reporter, tracker=tracker, device=device)


def join_alone(device: torch.device) -> None:
    """Make this process a group of one, where it is in none.

    The group stays: DeepSpeed keeps the first one that it sees for the life of the process.
    """
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
