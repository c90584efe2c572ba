"""From a planned shard to a committed one: every source fetched, judged, and cut into clips."""

import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipelines import schema, shards
from pipelines.curation import fetch
from pipelines.curation.annotate import Perception
from pipelines.curation.fetch import Fetched, FetchError
from pipelines.curation.isolation import IsolatedWorker, SourceError
from pipelines.curation.ledger import MAX_DEATHS, THUMBS_FOLDER, Event, RunJournal
from pipelines.curation.machine import MACHINE_ERRORS, is_of_machine
from pipelines.curation.members import clip_json, judged_source
from pipelines.curation.outcomes import copy_of, count_verdicts, is_wanted
from pipelines.curation.plan import Plan, PlannedShard, PlannedSource
from pipelines.curation.repack import drop_staged, repack
from pipelines.curation.service import SourceService
from pipelines.curation.source import Clock, Job
from pipelines.curation.time_limit import time_limit
from pipelines.overrides import to_dict
from pipelines.schema import ShardRecord, SourceRecord
from pipelines.tars import Content
from pipelines.versions import versions_of
from pipelines.video import VideoError

DOWNLOADS_FOLDER = ".downloads"
_PACKAGES = ("av", "numpy", "opencv-python", "onnxruntime", "scenedetect")
_ERROR_LENGTH = 300
# For models that hang on one question: the decoder's own time for a source is up before.
_GRACE_SECONDS = 300.0

Members = dict[str, Content]


def versions() -> dict[str, str]:
    """Versions of the code and of the libraries that decide what is written."""
    return versions_of(*_PACKAGES)


@dataclass(kw_only=True)
class _Outcome:
    """What became of one source so far."""

    record: SourceRecord
    members: Members


class ShardWork:
    """Works through the shards of a run, one at a time, in a process that holds the models.

    Several of them may share a process and its models, each in a thread that lasts as long as the
    process: a decoder dies with the thread that started it.

    Args:
        base: the folder that relative names of sources start from.
    """

    def __init__(
        self, folder: Path, plan: Plan, journal: RunJournal, perception: Perception, base: Path
    ) -> None:
        self.folder = folder
        self.plan = plan
        self.config = plan.config
        self.journal = journal
        self.perception = perception
        self.base = base
        video = self.config.video
        self.isolated = IsolatedWorker(
            timeout_seconds=video.timeout_seconds, max_memory=video.max_memory
        )

    def close(self) -> None:
        """End the decoder."""
        self.isolated.close()

    def process(self, shard: PlannedShard, previous: ShardRecord | None = None) -> ShardRecord:
        """Work through a shard's sources and commit it; one that fails is recorded as failed.

        Args:
            previous: the shard as it was committed before; of that, sources which did not fail and
                whose clips are all stored are taken over.

        Raises:
            OSError: the machine is in trouble, such as a full disk.
        """
        if previous is None:
            there = shards.committed(self.folder, shard.name)
            if there is not None and there.config_hash == self.plan.config_hash:
                # A worker that died right after its commit has left them.
                self._discard_downloads(shard)
                return there
        clock = Clock()
        with self.journal.attempt(shard) as staging:
            (staging / THUMBS_FOLDER).mkdir()
            rows = self.plan.shard_rows(shard.index)
            taken = self._reusable(previous)
            outcomes: list[_Outcome] = []
            firsts: dict[str, SourceRecord] = {}
            for row in rows:
                outcome = taken.get(row.id) or self._work(row, staging, firsts)
                record = outcome.record
                first = firsts.setdefault(record.sha256, record)
                if record.verdict == "failed":
                    # Others with the same bytes must say themselves what they are.
                    firsts.pop(record.sha256, None)
                elif first is not record and record.duplicate_of is None:
                    outcome = _Outcome(record=copy_of(record, first.id), members={})
                outcomes.append(outcome)
            with clock.stage("pack"):
                record = self._commit(shard, outcomes, staging, previous)
        self._discard_downloads(shard)
        self.journal.end(
            Event(source=shard.name, verdict="packed", reasons=(), clips=0, seconds=clock.seconds)
        )
        return record

    def _discard_downloads(self, shard: PlannedShard) -> None:
        for source in self.plan.shard_ids(shard.index):
            fetch.discard(self.folder / DOWNLOADS_FOLDER, source)

    def _commit(
        self,
        shard: PlannedShard,
        outcomes: list[_Outcome],
        staging: Path,
        previous: ShardRecord | None,
    ) -> ShardRecord:
        records = [outcome.record for outcome in outcomes]
        models, members = self.perception.describe(), self._members(outcomes)
        record = ShardRecord(
            name=shard.name,
            config_hash=self.plan.config_hash,
            tar_sha256="",
            tar_bytes=0,
            members={},
            counts=count_verdicts(records),
            sources=tuple(records),
            models=models,
            versions=versions(),
        )
        for thumb in sorted((staging / THUMBS_FOLDER).iterdir()):
            os.replace(thumb, self.folder / THUMBS_FOLDER / thumb.name)
        if previous is not None:
            repack(self.folder, previous, record, members)
            return record
        drop_staged(self.folder, shard.name)
        tar = staging / f"{shard.name}.tar"
        sizes = shards.write_tar(tar, members)
        record = replace(
            record,
            tar_sha256=shards.sha256_file(tar),
            tar_bytes=tar.stat().st_size,
            members=sizes,
        )
        shards.commit(self.folder, tar, record)
        return record

    def _members(self, outcomes: list[_Outcome]) -> Members:
        """All members of the kept clips that were worked on."""
        members: Members = {}
        models = self.perception.describe()
        for outcome in outcomes:
            for clip in outcome.record.clips:
                if f"{clip.key}.mp4" in outcome.members:
                    members[f"{clip.key}.json"] = clip_json(
                        outcome.record, clip, models, self.plan.config_hash, versions()
                    )
            members |= outcome.members
        return members

    def _reusable(self, previous: ShardRecord | None) -> dict[str, _Outcome]:
        """Sources of a committed shard that need no more work; its tar has their members."""
        if previous is None or previous.config_hash != self.plan.config_hash:
            return {}
        return {
            record.id: _Outcome(record=record, members={})
            for record in previous.sources
            if record.verdict != "failed" and not is_wanted(record)
        }

    def _work(self, row: PlannedSource, staging: Path, firsts: dict[str, SourceRecord]) -> _Outcome:
        """One source's record and members; whatever goes wrong in it stays in it."""
        deaths, clock = self.journal.begin(row.id), Clock()
        blank = SourceRecord(
            id=row.id,
            sha256="",
            bytes=0,
            uris=(fetch.published(row.uri),),
            verdict="failed",
            reasons=("unreadable",),
            provenance=_provenance(row),
        )
        attempt = _Attempt(self, row, staging, blank, clock)
        kind = None
        try:
            if deaths >= MAX_DEATHS:
                died = f"ended its worker process {deaths} times (crash or time limit)"
                raise SourceError(died, "crash")
            members = attempt.run(firsts)
            record = attempt.record
        except Exception as error:
            if is_of_machine(error):
                raise
            kind, members = getattr(error, "kind", "permanent"), {}
            record = replace(
                attempt.record,
                verdict="failed",
                reasons=("unreadable",),
                error=_sentence(error, attempt.path),
                info=attempt.record.info | {"failure": kind},
                clips=(),
            )
        self.journal.end(
            Event(
                source=record.id,
                verdict=record.verdict,
                reasons=record.reasons,
                clips=sum(clip.verdict == "kept" for clip in record.clips),
                kind=kind,
                seconds=clock.seconds,
                video_seconds=float(record.info.get("seconds") or 0.0),
            ),
            given_up=deaths >= MAX_DEATHS,
        )
        return _Outcome(record=record, members=members)


class _Attempt:
    """One source on its way; `record` holds what is known so far, should the rest fail."""

    def __init__(
        self,
        work: ShardWork,
        row: PlannedSource,
        staging: Path,
        record: SourceRecord,
        clock: Clock,
    ) -> None:
        self.work = work
        self.row = row
        self.staging = staging
        self.record = record
        self.clock = clock
        self.path = Path(row.uri)

    def run(self, firsts: dict[str, SourceRecord]) -> Members:
        """Fetch, and unless an earlier source of the shard has the same bytes, judge and cut."""
        with self.clock.stage("fetch"):
            fetched = fetch.fetch(
                self.row.uri,
                self.work.folder / DOWNLOADS_FOLDER,
                self.work.config.download,
                base=self.work.base,
                expected_sha256=self.row.expected_sha256,
            )
        self.path = fetched.path
        self.record = replace(
            self.record,
            bytes=fetched.bytes,
            provenance=_provenance(self.row, fetched),
        )
        most = self.work.config.video.max_bytes
        if fetched.bytes > most:
            raise SourceError(
                f"has {fetched.bytes} bytes, expected at most {most}: "
                "cut the video or raise video.max_bytes"
            )
        with self.clock.stage("hash"):
            sha256 = fetched.sha256 or _hash(fetched.path)
        self.record = replace(self.record, sha256=sha256)
        first = firsts.get(sha256)
        if first is not None:
            self.record = copy_of(self.record, first.id)
            return {}
        return self._isolated()

    def _isolated(self) -> Members:
        """The work that is done apart, and what comes of it."""
        work, staging, sha256 = self.work, self.staging, self.record.sha256
        service = SourceService(work.perception, self.path, sha256, staging, work.isolated.frames)
        job = Job(
            id=self.row.id,
            sha256=sha256,
            path=str(self.path),
            staging=str(staging),
            config=work.config,
            camera=work.perception.camera.name,
        )

        def serve(kind: str, data: Any) -> Any:
            # For models that never return: the process ends and is begun anew.
            with time_limit(work.config.video.timeout_seconds + _GRACE_SECONDS):
                return service(kind, data)

        try:
            report = service.parse(work.isolated.run(to_dict(job), serve, service.allowance))
            thumbnail = service.thumbnail(report)
        finally:
            self.record = replace(self.record, info=service.info)
        (staging / THUMBS_FOLDER / f"{self.row.id}.jpg").write_bytes(thumbnail)
        for stage, seconds in report.seconds.items():
            self.clock.seconds[stage] = self.clock.seconds.get(stage, 0.0) + seconds
        self.record = judged_source(replace(self.record, info=report.info), report.clips)
        return {
            f"{clip.key}.{suffix}": staging / f"{clip.key}.{suffix}"
            for clip in report.clips
            if clip.verdict == "kept"
            for suffix in schema.CLIP_MEMBERS
            if suffix != "json"
        }


def _provenance(row: PlannedSource, fetched: Fetched | None = None) -> dict[str, Any]:
    """What is known of where a source is from: the list's word before the site's."""
    listed = {"licence": row.licence, "uploader": row.uploader, "title": row.title}
    found: dict[str, Any] = {"uri": row.uri, "licence": "unknown", "uploader": None}
    found |= fetched.provenance if fetched else {}
    for name in ("uri", "page_url"):
        if found.get(name):
            found[name] = fetch.published(str(found[name]))
    return found | {name: value for name, value in listed.items() if value is not None}


def _hash(path: Path) -> str:
    """The SHA-256 of a file's bytes. Raises SourceError where they cannot be read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise SourceError("is no regular file, expected a video file")
        return shards.sha256_file(path)
    except OSError as error:
        if error.errno in MACHINE_ERRORS:
            raise
        raise SourceError(f"cannot be read ({error.strerror})", "transient") from None


def _sentence(error: Exception, path: Path) -> str:
    """An error as one line that says nothing of where the file lay, so that runs compare equal."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text.removeprefix(f"{path}: ").replace(str(path), path.name)
    if not isinstance(error, VideoError | SourceError | FetchError):
        text = f"{type(error).__name__}: {text}"
    return text[:_ERROR_LENGTH]
