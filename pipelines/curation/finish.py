"""The end of a run: what only shows over all shards is decided, and the shards follow.

Workers see one shard each. When all are committed, copies and near-duplicates are found over the
whole run (`pipelines.curation.duplicates`) and the shards that hold some are repacked. The outcome
depends on the records alone, not on who is stopped when: finishing a finished run changes nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import shards
from pipelines.curation.duplicates import RunTable
from pipelines.curation.ledger import THUMBS_FOLDER
from pipelines.curation.outcomes import SourceRuling, is_wanted, own_reasons, settle
from pipelines.curation.plan import Plan
from pipelines.curation.progress import Progress
from pipelines.curation.repack import SpareClips, repack, roll_forward
from pipelines.damaged import set_aside
from pipelines.schema import ShardError, ShardRecord

Report = Callable[[Progress], Any]


@dataclass(frozen=True, kw_only=True)
class FinishSummary:
    """What the end of a run changed.

    copies: sources that have the bytes of an earlier one.
    near_duplicates: clips that show what an earlier one shows.
    changed: shards that were repacked.
    again: shards that must be worked on again, since a clip that is now to be kept was never
        stored, or since their tars turned out damaged and were moved aside.
    """

    copies: int = 0
    near_duplicates: int = 0
    changed: int = 0
    again: tuple[str, ...] = ()


def finish_run(folder: Path, plan: Plan, progress: Report | None = None) -> FinishSummary:
    """Decide the duplicates of a run whose shards are all committed, and repack what changes.

    May be stopped at any moment and repeated. The caller holds the folder's lock.

    Raises:
        ShardError: a record is damaged.
        OSError: a shard's record is missing, or the disk is full.
    """
    roll_forward(folder)
    names = [shard.name for shard in plan.shards()]
    table = RunTable(
        folder, names, lambda clip: own_reasons(clip["reasons"]), telling(progress, "records")
    )
    table.decide(plan.config.duplicates, telling(progress, "duplicates"))
    changed, again = table.changed(), []
    tell = telling(progress, "repack")
    for done, number in enumerate(changed):
        tell(done, len(changed))
        record = apply_rulings(folder, names[number], table.rulings(number), plan.config_hash)
        if record is None or any(map(is_wanted, record.sources)):
            again.append(names[number])
    tell(len(changed), len(changed))
    roll_forward(folder)
    for source in table.copies():
        (folder / THUMBS_FOLDER / f"{source}.jpg").unlink(missing_ok=True)
    return FinishSummary(
        copies=table.num_copies,
        near_duplicates=table.num_repeats,
        changed=len(changed),
        again=tuple(again),
    )


def apply_rulings(
    folder: Path,
    name: str,
    rulings: Sequence[SourceRuling],
    config_hash: str,
    *,
    put_aside: bool = False,
) -> ShardRecord | None:
    """Bring one shard to what was decided of its sources; one that is so already stays untouched.

    Args:
        put_aside: whether clips that are taken out go to the spare ones.

    Returns:
        its record afterwards; None if its tar turned out damaged: it is then moved into
        DIR/damaged/, so that it is worked on again.
    """
    before = shards.read_record(folder / f"{name}.json")
    spare = SpareClips(folder, name)
    after = settle(before, rulings, config_hash, spare.find)
    if after == before:
        return after
    try:
        repack(folder, before, after, spare=spare, put_aside=put_aside)
    except ShardError:
        set_aside(folder, name)
        return None
    return after


def telling(progress: Report | None, stage: str) -> Callable[[int, int], None]:
    """A function of done and total that reports a stage of this work."""

    def tell(done: int, total: int) -> None:
        if progress is not None:
            progress(Progress(stage=stage, done=done, total=total))

    return tell
