"""The loop behind the job server: take a job, run the engine, publish the video exactly once."""

import logging
import re
import shutil
import sqlite3
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from inference import outputs
from inference.engine_factory import Engine, Progress
from inference.requests import AnimationRequest
from inference.serving.job import Job, LeaseLostError
from inference.serving.jobs import JobStore

IDLE_SECONDS = 0.2
RENEW_SECONDS = 0.5
STORE_TROUBLE_SECONDS = 5.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobFiles:
    """Where a server keeps what belongs to its jobs; names come from job ids alone."""

    root: Path

    def __post_init__(self) -> None:
        for folder in (self.uploads, self.incoming, self.attempts, self.videos):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    @property
    def database(self) -> Path:
        """The job store's file."""
        return self.root / "jobs.sqlite3"

    @property
    def uploads(self) -> Path:
        """A folder a job: `image` and `video`."""
        return self.root / "uploads"

    @property
    def incoming(self) -> Path:
        """Uploads that are not yet jobs."""
        return self.root / "incoming"

    @property
    def attempts(self) -> Path:
        """Videos in the making."""
        return self.root / "attempts"

    @property
    def videos(self) -> Path:
        """Finished videos and their records."""
        return self.root / "videos"

    def video(self, job_id: str) -> Path:
        """The finished video of a job."""
        return self.videos / f"{job_id}.mp4"

    def staged(self, job: Job) -> Path:
        """Where this attempt, and no other, writes."""
        return self.attempts / f"{job.id}.{job.attempt}.mp4"

    def request(self, job: Job) -> AnimationRequest:
        """The job as the engine sees it."""
        folder = self.uploads / job.id
        return AnimationRequest(
            reference=folder / "image",
            driving=folder / "video",
            output=self.staged(job),
            **asdict(job.options),
        )

    def finished(self, job_id: str) -> bool:
        """Whether a whole video and its record are in place."""
        return outputs.published(self.video(job_id)) is not None

    def remove(self, job_id: str) -> None:
        """Remove everything of a job that nobody holds any more."""
        shutil.rmtree(self.uploads / job_id, ignore_errors=True)
        for path in (self.video(job_id), self.video(job_id).with_suffix(".json")):
            path.unlink(missing_ok=True)
        self.remove_attempts(job_id)

    def remove_attempts(self, job_id: str, last: int | None = None) -> None:
        """Remove what attempts at a job left, of those up to number `last`; of all by default.

        They must hold the job no longer. An engine may be in the midst of one all the same, until
        its next step: the folder that it makes its video in is left to it, and goes with it.
        """
        own = re.compile(rf"\.?{re.escape(job_id)}\.(\d+)\..+")
        for path in list(self.attempts.iterdir()):
            attempt = own.fullmatch(path.name)
            if attempt is None or (last is not None and int(attempt[1]) > last):
                continue
            if path.is_dir():
                outputs.remove_if_dead(path)
            else:
                path.unlink(missing_ok=True)

    def sweep(self, store: JobStore) -> None:
        """Remove what a killed server left: half uploads, dead attempts, files of deleted jobs."""
        for folder in (self.incoming, self.attempts):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(mode=0o700)
        names = {
            path.name.split(".")[0] for path in (*self.uploads.iterdir(), *self.videos.iterdir())
        }
        for job_id in filter(None, names):
            if store.get(job_id) is None:
                self.remove(job_id)


class StopWorkError(Exception):
    """The server is stopping; raised out of the engine between two steps."""


class EngineWorker:
    """Runs jobs one after another until it is told to stop."""

    def __init__(
        self, store: JobStore, files: JobFiles, engine: Engine, *, owner: str, lease_seconds: float
    ) -> None:
        self.store = store
        self.files = files
        self.engine = engine
        self.owner = owner
        self.lease_seconds = lease_seconds
        self._stop = threading.Event()
        # Whoever had this name before is dead; what it held is free again.
        for job in store.recover(owner, files.finished):
            files.remove_attempts(job.id, job.attempt)

    def stop(self) -> None:
        """Give the current job back between two steps and return from `run`."""
        self._stop.set()

    def run(self) -> None:
        """Work until `stop`; returns early where another server has taken over the store."""
        while not self._stop.is_set():
            try:
                job = self.store.claim(self.owner, self.lease_seconds)
            except LeaseLostError as error:
                log.warning("%s", error)
                return
            if job is None:
                self._stop.wait(IDLE_SECONDS)
                continue
            # A half-made video may be what fills the disk that this attempt needs.
            self.files.remove_attempts(job.id, job.attempt - 1)
            try:
                self._work(job)
            except LeaseLostError:
                log.info("%s: attempt %d is void", job.id, job.attempt)
            except sqlite3.Error:  # a full disk, most likely: what is committed stays true
                log.exception("%s: the job store cannot be written", job.id)
                self._stop.wait(STORE_TROUBLE_SECONDS)
                self.store.recover(self.owner, self.files.finished)
            finally:
                self.files.remove_attempts(job.id, job.attempt)

    def _work(self, job: Job) -> None:
        staged = self.files.staged(job)
        try:
            record = self.engine.run(self.files.request(job), self._progress(job))
            record = outputs.describe(staged, {**record, "id": job.id, "output": f"{job.id}.mp4"})
            self.store.complete(
                job, lambda: outputs.publish(staged, self.files.video(job.id), record)
            )
        except (LeaseLostError, sqlite3.Error):
            raise
        except StopWorkError:
            self.store.release(job)
        except ValueError as error:
            self.store.fail(job, "invalid_input", self._public(job, error))
        except Exception as error:
            log.exception("%s: the engine failed", job.id)
            message = f"{type(error).__name__}: {self._public(job, error)}"
            self.store.fail(job, "engine_error", message)

    def _progress(self, job: Job) -> Progress:
        """The callback that keeps the lease, shows progress and ends a run nobody wants."""
        last = [0.0, ""]

        def progress(share: float, stage: str = "") -> None:
            if self._stop.is_set():
                raise StopWorkError
            now = time.monotonic()
            if stage != last[1] or now - last[0] >= RENEW_SECONDS:
                self.store.renew(job, self.lease_seconds, share, stage)
                last[:] = [now, stage]

        return progress

    def _public(self, job: Job, error: Exception) -> str:
        """The error's first line, without the server's own paths."""
        request = self.files.request(job)
        text = str(error).strip() or "no reason given"
        for path, name in ((request.reference, "the image"), (request.driving, "the video")):
            text = text.replace(str(path), name)
        return text.replace(str(self.files.root), "").splitlines()[0][:500]
