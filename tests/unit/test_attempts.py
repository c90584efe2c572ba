"""What dead attempts at a server's job left on the disk goes; what a living engine makes stays."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from inference import outputs
from inference.engine_factory import Progress
from inference.requests import AnimationOptions, AnimationRequest
from inference.serving.job import Job, new_job_id
from inference.serving.jobs import JobStore
from inference.serving.worker import EngineWorker, JobFiles

OWNER = "boot/engine-0"


@pytest.fixture
def files(tmp_path: Path) -> JobFiles:
    return JobFiles(tmp_path / "data")


@pytest.fixture
def store(files: JobFiles) -> Iterator[JobStore]:
    store = JobStore(files.database, max_attempts=2)
    yield store
    store.close()


def start(store: JobStore, owner: str = OWNER) -> Job:
    """A new job's first attempt."""
    store.create(new_job_id(), AnimationOptions(), "f")
    return again(store, owner)


def again(store: JobStore, owner: str = OWNER) -> Job:
    """The next attempt at the job that waits."""
    job = store.claim(owner, 60)
    assert job is not None
    return job


def die(files: JobFiles, job: Job) -> list[Path]:
    """What an engine leaves that is killed after it encoded the attempt, or while it did."""
    staged = files.staged(job)
    with outputs.making(staged) as folder:
        (folder / "video.mp4").write_bytes(b"half a video")
        shutil.copytree(folder, files.root / "left")
    left = [(files.root / "left").rename(folder), staged, staged.with_suffix(".json")]
    left += [staged.with_name(f".{staged.stem}.json.77.tmp")]
    for path in left[1:]:
        path.write_bytes(b"left over")
    return left


class Engine:
    """Notes what lies among the attempts when it begins, then does as it is told.

    `over` is called at the end of every run.
    """

    def __init__(self, act: Callable[[AnimationRequest], None] = lambda request: None) -> None:
        self.act = act
        self.seen: list[Path] = []
        self.over: Callable[[], None] = lambda: None

    def run(
        self, request: AnimationRequest, progress: Progress | None = None, **_: Any
    ) -> dict[str, Any]:
        self.seen = sorted(request.output.parent.iterdir())
        self.act(request)
        try:
            assert progress is not None
            progress(0.5, "sampling")
            request.output.write_bytes(b"a video")
        finally:
            self.over()
        return {"warnings": []}


def work_once(store: JobStore, files: JobFiles, engine: Engine) -> None:
    """Run a worker until its first job is over."""
    worker = EngineWorker(store, files, engine, owner=OWNER, lease_seconds=60)
    engine.over = worker.stop
    worker.run()


def test_a_deleted_job_takes_along_what_dead_engines_left(store: JobStore, files: JobFiles) -> None:
    job, other = start(store), start(store)
    die(files, job)
    kept = die(files, other)
    store.delete(job.id)
    files.remove(job.id)
    assert sorted(files.attempts.iterdir()) == sorted(kept)


def test_a_job_deleted_while_an_engine_encodes_it_leaves_the_engine_its_folder(
    store: JobStore, files: JobFiles
) -> None:
    job = start(store)
    with outputs.making(files.staged(job)) as folder:
        store.delete(job.id)
        files.remove(job.id)
        (folder / "video.mp4").write_bytes(b"the engine goes on to its next step")
    assert not list(files.attempts.iterdir())


def test_the_next_attempt_begins_without_what_the_last_left(
    store: JobStore, files: JobFiles
) -> None:
    job = start(store, "boot/engine-1")
    die(files, job)
    store.recover("boot/engine-1")
    engine = Engine()
    work_once(store, files, engine)
    assert engine.seen == []
    assert store.history(job.id)[-1] == ("completed", 2)


def test_an_engine_begun_again_removes_what_it_left_of_a_job_that_is_given_up(
    store: JobStore, files: JobFiles
) -> None:
    start(store)
    store.recover(OWNER)
    job = again(store)
    die(files, job)
    EngineWorker(store, files, Engine(), owner=OWNER, lease_seconds=60)
    row = store.get(job.id)
    assert row is not None
    assert row.status == "failed"
    assert not list(files.attempts.iterdir())


def test_an_attempt_that_lost_its_lease_leaves_the_next_ones_files(
    store: JobStore, files: JobFiles
) -> None:
    store.create(new_job_id(), AnimationOptions(), "f")
    kept: list[Path] = []

    def lose_the_lease(request: AnimationRequest) -> None:
        request.output.write_bytes(b"void")
        store.recover(OWNER)
        kept.extend(die(files, again(store, "boot/engine-1")))

    work_once(store, files, Engine(lose_the_lease))
    assert kept
    assert sorted(files.attempts.iterdir()) == sorted(kept)
