"""From a planned shard to a committed one: every source scored, judged, and cut into clips."""

import errno
import faulthandler
import os
from dataclasses import replace
from pathlib import Path

from pipelines import shards
from pipelines.curation.annotate import Perception
from pipelines.curation.ledger import MAX_DEATHS, THUMBS_FOLDER, Event, RunJournal
from pipelines.curation.plan import Plan, PlannedShard, PlannedSource
from pipelines.curation.source import Members, SourceWork, versions
from pipelines.schema import ShardRecord, SourceRecord
from pipelines.video import VideoError

_ERROR_LENGTH = 300
# The machine's troubles, not the source's: the run must stop, not write sources off.
_MACHINE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE}


class SourceError(ValueError):
    """A source that cannot be worked on although its file decodes."""


def process_shard(
    folder: Path,
    plan: Plan,
    shard: PlannedShard,
    journal: RunJournal,
    perception: Perception,
    base: Path,
) -> ShardRecord:
    """Work through a shard's sources and commit it; a source that fails is recorded as failed.

    Args:
        base: the folder that relative names of sources start from.
    """
    with journal.attempt(shard) as staging:
        (staging / THUMBS_FOLDER).mkdir()
        members: Members = {}
        records = []
        for source in plan.shard_sources(shard):
            record, files = _process_safely(source, plan, perception, staging, journal, base)
            members |= files
            records.append(record)
        tar = staging / f"{shard.name}.tar"
        sizes = shards.write_tar(tar, members)
        record = ShardRecord(
            name=shard.name,
            config_hash=plan.config_hash,
            tar_sha256=shards.sha256_file(tar),
            tar_bytes=tar.stat().st_size,
            members=sizes,
            counts=_counts(records),
            sources=tuple(records),
            models=perception.describe(),
            versions=versions(),
        )
        for thumb in sorted((staging / THUMBS_FOLDER).iterdir()):
            os.replace(thumb, folder / THUMBS_FOLDER / thumb.name)
        shards.commit(folder, tar, record)
    return record


def _process_safely(
    source: PlannedSource,
    plan: Plan,
    perception: Perception,
    staging: Path,
    journal: RunJournal,
    base: Path,
) -> tuple[SourceRecord, Members]:
    """One source's record; whatever goes wrong in it stays in it."""
    deaths = journal.begin(source.id)
    blank = SourceRecord(
        id=source.id,
        sha256=source.sha256,
        bytes=source.bytes,
        uris=source.uris,
        verdict="failed",
        reasons=("unreadable",),
    )
    work = SourceWork(source, blank, plan, perception, staging, base)
    members: Members = {}
    # A decoder that never returns cannot be interrupted, so the process ends and is begun anew.
    faulthandler.dump_traceback_later(plan.config.video.timeout_seconds, exit=True, file=2)
    try:
        if deaths >= MAX_DEATHS:
            raise SourceError(f"ended its worker process {deaths} times (crash or time limit)")
        if source.error:
            raise SourceError(source.error)
        record, members = work.run()
    except Exception as error:
        if _is_of_machine(error):
            raise
        record = replace(work.record, verdict="failed", reasons=("unreadable",), clips=())
        record = replace(record, error=_sentence(error, work.path))
    finally:
        faulthandler.cancel_dump_traceback_later()
    clips = sum(clip.verdict == "kept" for clip in record.clips)
    event = Event(source=source.id, verdict=record.verdict, reasons=record.reasons, clips=clips)
    journal.end(event, given_up=deaths >= MAX_DEATHS)
    return record, members


def _counts(records: list[SourceRecord]) -> dict[str, int]:
    clips = [clip for record in records for clip in record.clips]
    return {
        "sources": len(records),
        "kept": sum(record.verdict == "kept" for record in records),
        "rejected": sum(record.verdict == "rejected" for record in records),
        "failed": sum(record.verdict == "failed" for record in records),
        "clips_kept": sum(clip.verdict == "kept" for clip in clips),
        "clips_rejected": sum(clip.verdict == "rejected" for clip in clips),
    }


def _is_of_machine(error: BaseException | None) -> bool:
    while error is not None:
        if getattr(error, "errno", None) in _MACHINE_ERRORS:
            return True
        error = error.__cause__
    return False


def _sentence(error: Exception, path: Path) -> str:
    """An error as one line that says nothing of where the file lay, so that runs compare equal."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text.removeprefix(f"{path}: ").replace(str(path), path.name)
    if not isinstance(error, VideoError | SourceError):
        text = f"{type(error).__name__}: {text}"
    return text[:_ERROR_LENGTH]
