"""A pool of Ray Data actors that work is handed to; a dead one is replaced."""

import logging
import math
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, redirect_stdout
from typing import Any

from pipelines.ray_session import FIRST_WAIT_SECONDS, PATIENCE_SECONDS, nodes
from pipelines.ray_sizes import Pool, RunError, places

# Ray Data plans every block before it starts: more of them cost the driver memory and minutes.
_MAX_BLOCKS = 4_000
# For as many workers as that leaves short: one that has no more to do is idle till the end.
_BLOCKS_A_THREAD = 4
# Workers may die while they start, with their nodes, and are replaced; one that can never start
# says why instead of dying.
_STARTS_THAT_MAY_DIE = 32


def run_pool(
    actor: type,
    arguments: tuple[Any, ...],
    items: Sequence[str],
    pool: Pool,
    no_progress: float,
    *,
    patience: float = PATIENCE_SECONDS,
) -> None:
    """Hand every item, by name, to a pool of actors.

    Args:
        actor: a class whose `__call__` takes a batch with the column `item` and returns one with
            the column, or with a sentence in the column `refusal` where it cannot work at all. It
            is called from `pool.threads` threads at once.
        arguments: of its constructor.
        no_progress: seconds without one finished item after which the run is given up.
        patience: seconds without a machine that has room for a worker, likewise.

    Raises:
        RunError: items are left undone.
    """
    finished: set[str] = set()
    rows = [{"item": item} for item in items]
    with closing(
        pool_rows(
            actor,
            arguments,
            rows,
            pool,
            no_progress=no_progress,
            patience=patience,
            calls=pool.threads,
        )
    ) as results:
        for row in results:
            if row.get("refusal"):
                raise RunError(row["refusal"])
            finished.add(row["item"])
    left = [item for item in items if item not in finished]
    if left:
        raise RunError(f"{len(left)} of {len(items)} were not finished, the first is {left[0]}.")


def pool_rows(
    actor: type,
    arguments: tuple[Any, ...],
    rows: Sequence[Mapping[str, Any]],
    pool: Pool,
    *,
    no_progress: float | None = None,
    patience: float = PATIENCE_SECONDS,
    calls: int = 1,
    at_once: bool = False,
) -> Generator[dict[str, Any], None, None]:
    """Hand rows to a pool of actors, a row a call; gives the rows that come back, in any order.

    The pool grows with the cluster where it may (`pool.most`), and gives back what it does not
    need. Standard output goes to standard error as long as this is not closed.

    Args:
        calls: that an actor takes at the same time, each in a thread.
        no_progress: seconds without a finished row after which the run is given up; None: never.
        at_once: give each row that an actor yields when it is yielded, not when its call ends.

    Raises:
        RunError: no machine has room any more.
        RayError: an actor ended for good.
    """
    import ray
    from ray.exceptions import RayError

    blocks = min(len(rows), max(_MAX_BLOCKS, _BLOCKS_A_THREAD * pool.workers * calls))
    # Ray sees whole blocks alone.
    limit = None if no_progress is None else no_progress * math.ceil(len(rows) / blocks)
    # Ray prints its remarks about dead workers to standard output, which is for results.
    with _data_settings(pool, limit, patience, at_once), redirect_stdout(sys.stderr):
        dataset = ray.data.from_items(
            [dict(row) for row in rows],
            override_num_blocks=blocks,
        ).map_batches(
            actor,
            fn_constructor_args=arguments,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                min_size=1,
                initial_size=pool.workers,
                max_size=pool.most or pool.workers,
                max_tasks_in_flight_per_actor=calls,
                max_concurrent_calls_per_actor=calls,
                enable_true_multi_threading=calls > 1,
            ),
            num_cpus=pool.threads,
            num_gpus=pool.gpus,
        )
        try:
            yield from dataset.iter_rows()
        except RayError as error:
            # Where it was raised among Ray's threads is of no use to anyone.
            if isinstance(error.__cause__, RunError):
                raise error.__cause__ from None
            raise


@contextmanager
def _data_settings(
    pool: Pool, no_progress: float | None, patience: float, at_once: bool
) -> Iterator[None]:
    """Ray Data without its own bars and logs, and with an end to waiting for nothing."""
    import ray

    context = ray.data.DataContext.get_current()
    scaling, logger = context.autoscaling_config, logging.getLogger("ray.data")
    changes = {
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        "execution_no_progress_timeout_s": -1 if no_progress is None else int(no_progress),
        "max_consecutive_actor_init_deaths": _STARTS_THAT_MAY_DIE,
        "custom_execution_callback_classes": [_watch(pool, patience)],
    }
    if at_once:
        changes["target_max_block_size"] = 1
    before = {name: getattr(context, name) for name in changes if hasattr(context, name)}
    level, threshold = logger.level, scaling.actor_pool_util_upscaling_threshold
    try:
        for name in before:
            setattr(context, name, changes[name])
        # Workers get no work to queue up, so a pool all of whose workers are busy is to grow.
        scaling.actor_pool_util_upscaling_threshold = 1.0
        logger.setLevel(logging.ERROR)
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        scaling.actor_pool_util_upscaling_threshold = threshold
        logger.setLevel(level)


def _watch(pool: Pool, patience: float) -> type:
    """What Ray Data calls at every step: gives the run up when no machine is left for it."""

    class Watch:
        def __init__(self) -> None:
            self.looked = self.seen = time.monotonic()

        def before_execution_starts(self, executor: Any) -> None: ...

        def after_execution_succeeds(self, executor: Any) -> None: ...

        def after_execution_fails(self, executor: Any, error: Exception) -> None: ...

        def on_execution_step(self, executor: Any) -> None:
            now = time.monotonic()
            if now - self.looked < min(FIRST_WAIT_SECONDS, patience):
                return
            self.looked = now
            if any(places(node, pool.threads, pool.gpus) for node in nodes()):
                self.seen = now
            elif now - self.seen >= patience:
                raise RunError(
                    f"no machine of the Ray cluster has had room for a worker for {patience:.0f} s:"
                    " add machines and run again; what is committed is not done again."
                )

    return Watch
