"""An encoding run: every shard of clips that is not encoded yet, on a fixed pool of Ray actors."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import ray_pool, ray_session, schema, shards
from pipelines.curation.ledger import RunJournal, folder_lock
from pipelines.damaged import damaged_notes
from pipelines.encode import plan
from pipelines.encode.config import EncodeConfig, EncodeError
from pipelines.encode.encoders import Encoders
from pipelines.encode.model import EncoderChoice, choose_encoders
from pipelines.encode.progress import Progress, report_progress
from pipelines.encode.worker import Job, encode_shard
from pipelines.ray_session import RunError
from pipelines.schema import ShardError

# A GPU computes for one worker while others decode.
WORKERS_PER_GPU = 4
# Ray Data sees whole shards alone, and one may hold hours of video for a CPU.
_SHARD_SECONDS = 2 * 86400.0
_MAX_LISTED = 50


@dataclass(frozen=True, kw_only=True)
class EncodeSummary:
    """What a run did, or with `dry_run` would do, and what its folder now holds.

    shards_todo: what a dry run would encode.
    shards_changed: of those encoded, the ones whose source is not what it was.
    shards_left: not encoded, because of a limit or since clips of theirs failed before.
    estimate: clips, frames, seconds of video and bytes of latents that were to do.
    shares: of the workers' time in each kind of work.
    failures: clips, or whole shards, that failed, and why (at most 50).
    totals: clips, frames, failed clips and bytes of all committed shards.
    notes: in words, on damaged shards that lie aside.
    """

    out: str
    dry_run: bool
    seconds: float
    shards_todo: int
    shards_done: int
    shards_resumed: int
    shards_changed: int
    shards_left: int
    workers: int
    estimate: dict[str, float]
    settings: dict[str, Any]
    models: dict[str, dict[str, Any]]
    frames_per_second: float = 0.0
    shares: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    totals: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def encode(
    source: Path | str,
    out: Path | str,
    config: EncodeConfig | None = None,
    *,
    model: Path | str | None = None,
    workers: int | None = None,
    limit: int | None = None,
    retry_failed: bool = False,
    dry_run: bool = False,
    progress: Callable[[Progress], Any] | None = None,
) -> EncodeSummary:
    """Encode the clips of every shard; called again, it goes on where it was stopped.

    Args:
        source: a folder that `animator curate` wrote.
        out: the folder for shards of the same names.
        model: a model folder or one of Stable Video Diffusion; None is the tiny preset.
        workers: processes, each with its own encoders; by default one a CPU, or four a GPU.
        limit: of shards to encode now.
        retry_failed: encode shards in which clips failed once more.
        dry_run: only say what would be done; nothing is written.
        progress: called now and then with the state of the run.

    Raises:
        EncodeError: `out` belongs to other settings, another model or other clips.
        FolderInUseError: another run is writing into `out`.
        ValueError: a model that cannot be opened.
        RunError: shards are left undone.
    """
    source, out, config = Path(source), Path(out), config or EncodeConfig()
    for name, value in (("workers", workers), ("limit", limit)):
        if value is not None and value < 1:
            raise EncodeError(f"Got {value} for {name}, but expected at least 1.")
    began = time.monotonic()
    tell = progress or (lambda state: None)
    plan.check_folders(source, out)
    with ray_session.cluster():
        tell(Progress(stage="models"))
        device = "cuda" if ray_session.gpus_there() else "cpu"
        choice = choose_encoders(config, Path(model).resolve() if model else None, device)
        with nullcontext() if dry_run else _own(out):
            plan.check_settings(out, choice)
            seen = plan.survey(source, out, choice)
            todo = seen.todo(retry_failed=retry_failed, limit=limit)
            if todo or dry_run:
                # Fails here, in one clear sentence, and not in every worker.
                Encoders(replace(choice, device="cpu"))
            frames, estimate = _estimate(source, todo, choice)
            work = _Work()
            if not dry_run:
                plan.write_settings(out, choice)
                plan.clean_up(out, seen)
                if todo:
                    job = Job(source=source.resolve(), out=out.resolve(), choice=choice)
                    work = _run(job, todo, frames, int(estimate["clips"]), workers, tell)
            totals, failures = _read_folder(out)
    return EncodeSummary(
        out=str(out),
        dry_run=dry_run,
        seconds=round(time.monotonic() - began, 3),
        shards_done=0 if dry_run else len(todo),
        shards_todo=len(todo) if dry_run else 0,
        shards_resumed=len(seen.done),
        shards_changed=len(set(seen.changed) & set(todo)),
        shards_left=len(seen.sources) - len(seen.done) - len(todo),
        workers=work.workers,
        estimate=estimate,
        settings=choice.settings()["settings"],
        models=choice.models,
        frames_per_second=round(work.frames / work.seconds, 2) if work.seconds else 0.0,
        shares=work.shares,
        failures=failures,
        totals=totals,
        notes=damaged_notes(out),
    )


class ShardEncoder:
    """A Ray actor: holds the encoders, takes shards by name, answers when they are committed."""

    def __init__(self, job: Job, run: str) -> None:
        import cv2
        import torch

        # Workers fill the cores; one thread each also keeps sums in one order.
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        self.job = job
        self.journal = RunJournal(job.out, run)
        self.encoders = Encoders(job.choice)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Encode the shards named in column `item`."""
        for name in batch["item"]:
            encode_shard(self.job, str(name), self.journal, self.encoders)
        return batch


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What the workers did."""

    workers: int = 0
    frames: int = 0
    seconds: float = 0.0
    shares: dict[str, float] = field(default_factory=dict)


@contextmanager
def _own(out: Path) -> Iterator[None]:
    out.mkdir(parents=True, exist_ok=True)
    with folder_lock(out):
        yield


def _run(
    job: Job,
    todo: Sequence[str],
    frames: dict[str, int],
    clips: int,
    workers: int | None,
    tell: Callable[[Progress], Any],
) -> _Work:
    """Encode these shards on Ray."""
    journal, run = RunJournal.create(job.out)
    try:
        with ray_session.session(workers, len(todo), per_gpu=WORKERS_PER_GPU) as pool:
            with report_progress(journal, frames, clips, tell) as spent:
                ray_pool.run_pool(ShardEncoder, (job, run), todo, pool, _SHARD_SECONDS)
    finally:
        journal.close()
    left = [name for name in todo if not (job.out / f"{name}.json").is_file()]
    if left:
        raise RunError(f"{len(left)} shards are not committed, the first is {left[0]}: run again.")
    return _Work(
        workers=pool.workers,
        frames=sum(frames.values()),
        seconds=spent.wall_seconds,
        shares=spent.shares(),
    )


def _estimate(
    source: Path, todo: Sequence[str], choice: EncoderChoice
) -> tuple[dict[str, int], dict[str, float]]:
    """Frames of each shard, and what all of them come to."""
    frames: dict[str, int] = {}
    clips, seconds, latent_bytes = 0, 0.0, 0
    for name in todo:
        frames[name] = 0
        # A damaged record is told of by the worker that meets it.
        with suppress(ShardError, OSError, ValueError, ZeroDivisionError):
            for clip in shards.read_record(source / f"{name}.json").kept_clips:
                clips += 1
                frames[name] += clip.num_frames
                seconds += clip.num_frames / clip.fps
                if choice.config.latents:
                    latent_bytes += choice.latent_bytes((clip.height, clip.width), clip.num_frames)
    return frames, {
        "clips": clips,
        "frames": sum(frames.values()),
        "seconds": round(seconds, 3),
        "latent_bytes": latent_bytes,
    }


def _read_folder(out: Path) -> tuple[dict[str, int], dict[str, str]]:
    """What all committed shards of a folder come to, and what failed in them."""
    totals = {"shards": 0, "clips": 0, "frames": 0, "failed": 0, "bytes": 0}
    failures: dict[str, str] = {}
    for name in plan.shard_names(out):
        # Plain JSON: a record's checks would take longer than all the rest for many shards.
        path = out / f"{name}.json"
        record = schema.decode_json(path.read_bytes(), path.name, schema.MAX_RECORD_BYTES)
        totals["shards"] += 1
        totals["bytes"] += record["tar_bytes"]
        for count in ("clips", "frames", "failed"):
            totals[count] += record["counts"].get(count, 0)
        for made_from in record["sources"]:
            errors = made_from["info"].get("errors", {})
            if not errors and made_from["error"]:
                errors = {name: made_from["error"]}
            failures |= dict(list(errors.items())[: max(0, _MAX_LISTED - len(failures))])
    return totals, failures
