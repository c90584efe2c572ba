"""Clips of another layout into shards: the plan, then every shard that is not committed.

`import.json` in the output folder holds the settings and the items, fixed before anything is
written. Shards are made in order, each committed as a whole, so an import that was stopped goes on
with the same command and the same folder gives the same bytes.
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipelines import shards
from pipelines.curation.ledger import THUMBS_FOLDER, WORK_FOLDER, folder_lock
from pipelines.damaged import damaged_notes, set_aside
from pipelines.exchange.frame_folder import ExchangeError
from pipelines.exchange.import_config import ImportConfig
from pipelines.exchange.import_item import Imported, failed_record, versions
from pipelines.exchange.import_plan import ImportPlan, parts, save_plan
from pipelines.exchange.import_pool import ImportPool
from pipelines.exchange.layouts import Listing, list_source
from pipelines.exchange.scan import ImportItem
from pipelines.schema import ShardRecord, SourceRecord


@dataclass(frozen=True, kw_only=True)
class ImportSummary:
    """What an import did, and what its folder now holds; `errors` counts the failures."""

    out: str
    layout: str
    items: int
    kept: int
    rejected: int
    failed: int
    frames: int
    seconds: float
    bytes: int
    shards_done: int
    shards_resumed: int
    models: dict[str, str]
    notes: tuple[str, ...] = ()
    reasons: dict[str, int] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def import_shards(
    source: Path | str,
    out: Path | str,
    *,
    layout: str = "auto",
    config: ImportConfig | None = None,
    jobs: int = 1,
    progress: Callable[[int, int, str], Any] | None = None,
) -> ImportSummary:
    """Take clips of another layout into shards; called again, it goes on where it was stopped.

    Args:
        source: a folder in one of `layouts.LAYOUTS`, or a .txt list of clip folders in it.
        out: the folder for the shards.
        jobs: worker processes; 0 works in this one, where a clip that ends it ends the import.
        progress: called with clips done, clips in all, and the name of the last one.

    Raises:
        ExchangeError: nothing to import, no pose model where one is needed, or `out` belongs to
            something else; what differs is listed.
        FolderInUseError: another run writes into `out`.
    """
    config, folder = config or ImportConfig(), Path(out)
    if jobs < 0:
        raise ExchangeError(f"got {jobs} jobs, expected 0 or more.")
    listing = list_source(source, layout, config.pictures())
    if folder.resolve().is_relative_to(Path(source).resolve()):
        raise ExchangeError(f"{folder} lies in {source}: give an --out folder outside of it.")
    folder.mkdir(parents=True, exist_ok=True)
    tell = progress or (lambda done, total, name: None)
    with folder_lock(folder), _staging(folder) as staging:
        with ImportPool(listing.root, config, jobs) as pool:
            plan = ImportPlan(
                layout=listing.layout, config=config, models=pool.models(), items=listing.items
            )
            _check_models(plan, pool)
            save_plan(folder, plan)
            pool.begin(plan.config_hash, staging)
            return _run(folder, plan, listing, pool, staging, tell)


def _run(
    folder: Path,
    plan: ImportPlan,
    listing: Listing,
    pool: ImportPool,
    staging: Path,
    tell: Callable[[int, int, str], Any],
) -> ImportSummary:
    divided = parts(plan)
    done = {
        name: record for name in divided if (record := _done(folder, plan, name, divided[name]))
    }
    _clean(folder, divided.keys() - done.keys())
    (folder / THUMBS_FOLDER).mkdir(exist_ok=True)
    todo = [item for name, items in divided.items() if name not in done for item in items]
    results = pool.results(todo)
    seen = _Seen()
    totals = _Totals()
    count = 0
    for name, items in divided.items():
        record = done.get(name)
        if record is None:
            taken = []
            for item in items:
                taken.append(seen.settle(item, next(results)))
                count += 1
                tell(count, len(plan.items), item.uri)
            record = _commit(folder, plan, name, taken, staging, pool.describe())
        else:
            count += len(items)
            tell(count, len(plan.items), items[-1].uri)
            for one in record.sources:
                seen.note(one)
        totals.add(record)
    return totals.summary(folder, plan, listing, len(divided) - len(done), len(done))


class _Seen:
    """The contents and keys of the clips before, in the order of the plan."""

    def __init__(self) -> None:
        self.contents: dict[str, str] = {}
        self.keys: set[str] = set()

    def settle(self, item: ImportItem, result: Imported) -> Imported:
        """The result as it goes into the shard: not where an earlier clip shows the same."""
        record = result.record
        if record.verdict != "failed" and record.sha256 in self.contents:
            record = replace(
                record,
                verdict="rejected",
                reasons=("duplicate",),
                duplicate_of=self.contents[record.sha256],
                clips=(),
            )
            result = Imported(record=record)
        elif any(clip.key in self.keys for clip in record.clips):
            key = record.clips[0].key
            record = failed_record(item, f"its key {key} is that of another clip")
            result = Imported(record=record)
        self.note(record)
        return result

    def note(self, record: SourceRecord) -> None:
        """Remember a clip that is in a shard."""
        if record.sha256 and not record.duplicate_of:
            self.contents.setdefault(record.sha256, record.id)
        self.keys.update(clip.key for clip in record.clips)


class _Totals:
    """Counts over the shards as they go by."""

    def __init__(self) -> None:
        self.verdicts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.failures: dict[str, str] = {}
        self.frames = self.bytes = 0
        self.seconds = 0.0

    def add(self, record: ShardRecord) -> None:
        """Count a shard."""
        self.bytes += record.tar_bytes
        for source in record.sources:
            self.verdicts[source.verdict] += 1
            self.reasons.update(source.reasons)
            if source.error:
                self.failures[source.uris[0]] = source.error
        for clip in record.kept_clips:
            self.frames += clip.num_frames
            self.seconds += clip.end - clip.start

    def summary(
        self, folder: Path, plan: ImportPlan, listing: Listing, done: int, resumed: int
    ) -> ImportSummary:
        """All of it, for people and JSON."""
        return ImportSummary(
            out=str(folder),
            layout=plan.layout,
            items=len(plan.items),
            kept=self.verdicts["kept"],
            rejected=self.verdicts["rejected"],
            failed=self.verdicts["failed"],
            frames=self.frames,
            seconds=round(self.seconds, 3),
            bytes=self.bytes,
            shards_done=done,
            shards_resumed=resumed,
            models=plan.models,
            notes=(*listing.notes, *damaged_notes(folder)),
            reasons=dict(self.reasons),
            failures=self.failures,
        )


def _check_models(plan: ImportPlan, pool: ImportPool) -> None:
    usable = [item for item in plan.items if not item.error]
    without = [item for item in usable if not item.keypoints]
    if usable and len(without) == len(usable) and not pool.finds_people():
        raise ExchangeError(
            f"no pose model was found, and none of the {len(usable)} clips brings keypoints: "
            "`animator models pull dwpose`, or lay NAME.dwpose.npz beside each NAME."
        )


def _done(
    folder: Path, plan: ImportPlan, name: str, items: tuple[ImportItem, ...]
) -> ShardRecord | None:
    record = shards.committed(folder, name)
    if record is None or record.config_hash != plan.config_hash:
        return None
    same = tuple(source.id for source in record.sources) == tuple(item.id for item in items)
    return record if same else None


def _clean(folder: Path, undone: set[str]) -> None:
    """Remove what a run that died left of shards that are not committed; damaged ones go aside."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
    for name in undone:
        set_aside(folder, name)


def _commit(
    folder: Path,
    plan: ImportPlan,
    name: str,
    taken: list[Imported],
    staging: Path,
    models: dict[str, dict[str, Any]],
) -> ShardRecord:
    members = {key: path for one in taken for key, path in one.members.items()}
    sources = tuple(one.record for one in taken)
    tar = staging / f"{name}.tar"
    sizes = shards.write_tar(tar, members)
    verdicts = Counter(source.verdict for source in sources)
    clips = Counter(clip.verdict for source in sources for clip in source.clips)
    record = ShardRecord(
        name=name,
        config_hash=plan.config_hash,
        tar_sha256=shards.sha256_file(tar),
        tar_bytes=tar.stat().st_size,
        members=sizes,
        counts={
            "sources": len(sources),
            **{verdict: verdicts[verdict] for verdict in ("kept", "rejected", "failed")},
            "clips_kept": clips["kept"],
            "clips_rejected": clips["rejected"],
        },
        sources=sources,
        models=models,
        versions=versions(),
    )
    for one in taken:
        if one.thumbnail is not None:
            os.replace(one.thumbnail, folder / THUMBS_FOLDER / f"{one.record.id}.jpg")
    shards.commit(folder, tar, record)
    for path in members.values():
        shutil.rmtree(path.parent, ignore_errors=True)
    return record


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A folder for unfinished work, removed before and after."""
    work = folder / WORK_FOLDER
    shutil.rmtree(work, ignore_errors=True)
    path = work / "import"
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(work, ignore_errors=True)
