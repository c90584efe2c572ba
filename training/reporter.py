"""What a worker hears of a coming end, and tells of its checkpoints: with Ray Train or without."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from training.stop_request import StopRequest

Notice = Literal["none", "save", "stop"]


class Reporter(Protocol):
    """The ties of one worker to what runs it."""

    def notice(self) -> Notice:
        """What this worker has been asked: to save now, or to save and stop. Cheap."""
        ...

    def heeded(self) -> None:
        """A checkpoint answers what any worker has been asked; called on every worker."""
        ...

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Tell of a checkpoint that is there; every worker calls it the same number of times."""
        ...


class LocalReporter:
    """One process, without Ray."""

    def __init__(self, out: Path) -> None:
        self._stop = StopRequest(out)

    def notice(self) -> Notice:
        return "stop" if self._stop.made() else "none"

    def heeded(self) -> None: ...

    def report(self, metrics: Mapping[str, Any]) -> None: ...


class RayReporter:
    """Sees a node that Ray is about to lose, and shows progress in Ray's dashboard.

    A lost node asks for a checkpoint only: Ray Train starts the workers again elsewhere, and they
    go on from it.
    """

    def __init__(self, out: Path) -> None:
        self._stop = StopRequest(out)
        self._saved = False  # for the node that is about to be lost

    def notice(self) -> Notice:
        if self._stop.made():
            return "stop"
        return "save" if not self._saved and _losing_node() else "none"

    def heeded(self) -> None:
        self._saved = True

    def report(self, metrics: Mapping[str, Any]) -> None:
        import ray.train

        # Up to two seconds where the one before has not been taken yet, hence not for every step.
        ray.train.report(dict(metrics))


def _losing_node() -> bool:
    """Whether Ray has said that a node with our workers goes away.

    The worker's own knowledge: `ray.train.get_preemption_info` asks all workers to agree, which
    the loop does with a sum that it takes anyway.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None
