"""From a shard of clips to a committed shard of their latents; a clip that fails is recorded."""

import errno
import faulthandler
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipelines import schema, shards
from pipelines.curation.ledger import Event, RunJournal
from pipelines.encode.clip import ClipWork
from pipelines.encode.encoders import Encoders
from pipelines.encode.members import KIND, META
from pipelines.encode.model import EncoderChoice
from pipelines.encode.plan import source_id
from pipelines.schema import ClipRecord, FaceTrack, ShardError, ShardRecord, SourceRecord
from pipelines.versions import versions_of
from pipelines.video import VideoError

# Spot machines vanish and people kill what they do not know; a clip that ends its process thrice
# is the cause of it.
MAX_DEATHS = 3
STALL_SECONDS = 1800.0  # without one more chunk of frames
_ERROR_LENGTH = 300
# The machine's troubles, not the clip's: the run must stop, not write clips off.
_MACHINE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE}
_PACKAGES = ("av", "diffusers", "numpy", "opencv-python", "torch")

Members = dict[str, bytes | Path]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker of a run is told: both folders and what to encode with."""

    source: Path
    out: Path
    choice: EncoderChoice


class SourceShard:
    """A shard of clips, opened after its bytes were found to be those of its record.

    Raises:
        ShardError: it is damaged, or no shard of clips.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.tar = folder / f"{name}.tar"
        self.record = shards.read_record(folder / f"{name}.json")
        if self.record.kind != "clips":
            raise ShardError(f"{name} is a shard of {self.record.kind}, expected clips")
        self._stat = self._seen()
        if problem := shards.tar_problem(self.tar, self.record, deep=True):
            raise ShardError(problem)
        self._index = shards.index_tar(self.tar)

    def read(self, key: str, suffix: str) -> bytes:
        """The bytes of a clip's member. Raises ShardError where there is none."""
        name = f"{key}.{suffix}"
        if name not in self._index:
            raise ShardError(f"{self.tar.name} has no {name}")
        return shards.read_member(self.tar, *self._index[name])

    def faces(self, clip: ClipRecord) -> FaceTrack:
        """The stored faces of a clip. Raises ShardError where they break the contract."""
        what = f"{clip.key}.face.npz"
        arrays = schema.unpack_arrays(self.read(clip.key, "face.npz"), what)
        schema.check_faces(arrays, clip.num_frames, what)
        return FaceTrack(
            boxes=arrays["boxes"], landmarks=arrays["landmarks"], score=arrays["score"]
        )

    def check_unchanged(self) -> None:
        """Raises ShardError where the tar was replaced while it was read."""
        if self._seen() != self._stat:
            raise ShardError(f"{self.tar.name} was replaced while it was read: run again")

    def _seen(self) -> tuple[int, int, int]:
        try:
            stat = self.tar.stat()
        except OSError:
            raise ShardError(f"{self.tar.name} is missing: curate into its folder again") from None
        return stat.st_ino, stat.st_size, stat.st_mtime_ns


def encode_shard(job: Job, name: str, journal: RunJournal, encoders: Encoders) -> ShardRecord:
    """Encode the clips of one shard and commit what came of it."""
    with tempfile.TemporaryDirectory(prefix=f"{name}.", dir=journal.root) as place:
        staging = Path(place)
        try:
            source = SourceShard(job.source, name)
            record, members = _encode_clips(job, source, journal, encoders, staging)
            source.check_unchanged()
        except (ShardError, OSError) as error:
            if _is_of_machine(error):
                raise
            record, members = _unreadable(job, name, _sentence(error)), {}
        tar = staging / f"{name}.tar"
        sizes = shards.write_tar(tar, members)
        clips = record.clips
        committed = ShardRecord(
            name=name,
            config_hash=job.choice.config_hash,
            tar_sha256=shards.sha256_file(tar),
            tar_bytes=tar.stat().st_size,
            members=sizes,
            counts={
                "clips": sum(clip.verdict == "kept" for clip in clips),
                "failed": sum(clip.verdict == "failed" for clip in clips),
                "frames": sum(clip.num_frames for clip in clips if clip.verdict == "kept"),
            },
            sources=(record,),
            models=job.choice.models,
            versions=versions(),
            kind=KIND,
        )
        shards.commit(job.out, tar, committed)
    journal.end(Event(source=name, verdict=record.verdict, reasons=record.reasons, clips=0))
    return committed


def _encode_clips(
    job: Job, source: SourceShard, journal: RunJournal, encoders: Encoders, staging: Path
) -> tuple[SourceRecord, Members]:
    """Encode every kept clip; whatever goes wrong in one stays in it."""
    members: Members = {}
    records, errors = [], {}
    for clip in source.record.kept_clips:
        outcome = ClipRecord(**_carried(clip))
        began, seconds = time.perf_counter(), {}
        deaths = journal.begin(clip.key)
        try:
            _alive()
            if deaths >= MAX_DEATHS:
                raise ShardError(f"ended its worker process {deaths} times (crash or time limit)")
            files, seconds = _encode_clip(job, source, clip, encoders, staging)
            members |= files
        except Exception as problem:
            if _is_of_machine(problem):
                raise
            errors[clip.key] = _sentence(problem)
            outcome = replace(outcome, verdict="failed", reasons=("unreadable",))
        finally:
            faulthandler.cancel_dump_traceback_later()
        records.append(outcome)
        seconds = {**seconds, "total": time.perf_counter() - began}
        event = Event(
            source=clip.key,
            verdict=outcome.verdict,
            reasons=outcome.reasons,
            clips=1,
            seconds={name: round(value, 6) for name, value in seconds.items()},
        )
        journal.end(event, given_up=deaths >= MAX_DEATHS)
    record = SourceRecord(
        id=source_id(source.record.tar_sha256),
        sha256=source.record.tar_sha256,
        bytes=source.record.tar_bytes,
        uris=(source.tar.name,),
        verdict="failed" if errors else "kept",
        reasons=("unreadable",) if errors else (),
        error=f"{len(errors)} of {len(records)} clips failed" if errors else None,
        info={"clips_config_hash": source.record.config_hash, "errors": errors},
        clips=tuple(records),
    )
    return record, members


def _encode_clip(
    job: Job, source: SourceShard, clip: ClipRecord, encoders: Encoders, staging: Path
) -> tuple[Members, dict[str, float]]:
    """A clip's members by their names, and the seconds that each kind of work took."""
    schema.check_key(clip.key)
    if clip.num_frames < 1 or not 0 < clip.fps <= 1000 or min(clip.width, clip.height) < 1:
        raise ShardError(
            f"its record says {clip.num_frames} frames of {clip.width}x{clip.height} at "
            f"{clip.fps} a second, expected all above 0"
        )
    video = staging / f"{clip.key}.mp4"
    video.write_bytes(source.read(clip.key, "mp4"))
    faces = source.faces(clip) if job.choice.config.faces else None
    work = ClipWork(clip, video, faces, job.choice, encoders, staging, _alive)
    try:
        files, about = work.run()
    except VideoError as error:
        text = str(error).removeprefix(f"{video}: ")
        raise VideoError(f"its video does not decode: {text}") from error
    finally:
        video.unlink(missing_ok=True)
    stored = schema.decode_json(source.read(clip.key, "json"), f"{clip.key}.json")
    provenance = stored.get("provenance")
    meta: dict[str, Any] = {
        "key": clip.key,
        "num_frames": clip.num_frames,
        "fps": clip.fps,
        **about,
        "source": {"shard": source.record.name, "tar_sha256": source.record.tar_sha256},
        "licence": provenance.get("licence") if isinstance(provenance, dict) else None,
        "versions": versions(),
    }
    files[META] = schema.encode_json(meta, digits=9)
    return {f"{clip.key}.{suffix}": data for suffix, data in files.items()}, work.clock.seconds


def versions() -> dict[str, str]:
    """Versions of the code and of the libraries that decide what is written."""
    return versions_of(*_PACKAGES)


def _alive() -> None:
    """Put off the end of this process, which comes where a decoder never returns.

    It cannot be interrupted otherwise; another process then begins the shard anew.
    """
    faulthandler.dump_traceback_later(STALL_SECONDS, exit=True, file=2)


def _carried(clip: ClipRecord) -> dict[str, Any]:
    """What an output record takes over of a clip's: which frames it has, not how it was judged."""
    names = ("key", "start", "end", "verdict", "num_frames", "fps", "width", "height")
    return {name: getattr(clip, name) for name in names}


def _unreadable(job: Job, name: str, error: str) -> SourceRecord:
    """The record of a shard of clips that cannot be used; the next run looks at it again."""
    return SourceRecord(
        id=source_id(""),
        sha256="",
        bytes=0,
        uris=(f"{name}.tar",),
        verdict="failed",
        reasons=("unreadable",),
        error=error.replace(f"{job.source}/", ""),
    )


def _is_of_machine(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if getattr(error, "errno", None) in _MACHINE_ERRORS:
            return True
        error = error.__cause__
    return False


def _sentence(error: Exception) -> str:
    """An error as one line, the same wherever and whenever it happens."""
    text = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, ValueError):
        text = f"{type(error).__name__}: {text}"
    return text[:_ERROR_LENGTH]
