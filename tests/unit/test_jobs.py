"""The job store and the worker: leases, fencing, recovery, and exactly one video for every job."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from inference import outputs
from inference.requests import AnimationOptions, AnimationRequest
from inference.serving.job import IdempotencyError, Job, LeaseLostError, StoreError, new_job_id
from inference.serving.jobs import JobStore
from inference.serving.worker import EngineWorker, JobFiles

OPTIONS = AnimationOptions()


@pytest.fixture
def files(tmp_path: Path) -> JobFiles:
    return JobFiles(tmp_path / "data")


@pytest.fixture
def store(files: JobFiles) -> Iterator[JobStore]:
    store = JobStore(files.database, max_attempts=3)
    yield store
    store.close()


def add(store: JobStore, key: str | None = None, fingerprint: str = "f") -> Job:
    return store.create(new_job_id(), OPTIONS, fingerprint, key)[0]


def claim(store: JobStore, owner: str = "boot/engine-0", seconds: float = 60.0) -> Job:
    job = store.claim(owner, seconds)
    assert job is not None
    return job


class Engine:
    """Writes a few bytes; `before` is called between its two steps."""

    def __init__(self, before=lambda request: None) -> None:
        self.before = before
        self.runs: list[str] = []

    def run(self, request: AnimationRequest, progress=None) -> dict:
        assert progress is not None
        self.runs.append(request.output.name)
        progress(0.0, "first")
        self.before(request)
        progress(0.5, "second")
        request.output.write_bytes(b"a video")
        return {"warnings": []}


def work(store: JobStore, files: JobFiles, engine: Engine, until=None) -> EngineWorker:
    """Run a worker until no job waits or runs (or `until` holds)."""
    worker = EngineWorker(store, files, engine, owner="boot/engine-0", lease_seconds=60)
    thread = threading.Thread(target=worker.run)
    thread.start()
    deadline = time.monotonic() + 8
    idle = until or (lambda: not any(store.counts()[name] for name in ("queued", "in_progress")))
    while not idle() and time.monotonic() < deadline:
        time.sleep(0.01)
    worker.stop()
    thread.join(8)
    assert not thread.is_alive()
    return worker


def test_jobs_are_claimed_in_order_and_once(store: JobStore) -> None:
    jobs = [add(store) for _ in range(3)]
    taken = [claim(store).id for _ in jobs]
    assert taken == [job.id for job in jobs]
    assert store.claim("boot/engine-1", 60) is None


def test_workers_never_claim_the_same_job(store: JobStore, files: JobFiles) -> None:
    ids = {add(store).id for _ in range(40)}
    taken: list[str] = []

    def drain(owner: str) -> None:
        other = JobStore(files.database)
        while job := other.claim(owner, 60):
            taken.append(job.id)
        other.close()

    threads = [threading.Thread(target=drain, args=(f"boot/{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(ids)


def test_a_worker_whose_lease_was_taken_can_write_nothing(store: JobStore) -> None:
    add(store)
    old = claim(store, seconds=-1)
    store.recover()
    new = claim(store)
    assert (old.attempt, new.attempt) == (1, 2)
    published = []
    for write in (
        lambda: store.renew(old, 60, 0.5, "sampling"),
        lambda: store.complete(old, lambda: published.append("old")),
        lambda: store.fail(old, "engine_error", "late"),
        lambda: store.release(old),
    ):
        with pytest.raises(LeaseLostError):
            write()
    assert not published
    store.complete(new, lambda: published.append("new"))
    assert published == ["new"]
    assert store.history(new.id) == [
        ("created", 0),
        ("started", 1),
        ("lost", 1),
        ("started", 2),
        ("completed", 2),
    ]


def test_a_failed_publication_leaves_the_job_unfinished(store: JobStore) -> None:
    add(store)
    job = claim(store)

    def full_disk() -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        store.complete(job, full_disk)
    row = store.get(job.id)
    assert row is not None
    assert row.status == "in_progress"


def test_a_new_server_takes_over_and_the_old_ones_workers_start_nothing(
    store: JobStore, files: JobFiles
) -> None:
    first, second = add(store), add(store)
    store.take_over("old", files.finished)
    claim(store, "old/engine-0")
    assert [job.id for job in store.take_over("new", files.finished)] == [first.id]
    with pytest.raises(LeaseLostError, match="server new has taken over"):
        store.claim("old/engine-0", 60)
    assert claim(store, "new/engine-0").id == first.id
    assert claim(store, "new/engine-1").id == second.id
    assert store.recover() == []
    assert [job.id for job in store.recover("new/engine-1")] == [second.id]


def test_a_job_that_kills_its_engine_is_given_up_with_a_reason(store: JobStore) -> None:
    job = add(store)
    for _ in range(3):
        claim(store, seconds=-1)
        store.recover()
    row = store.get(job.id)
    assert row is not None
    assert (row.status, row.error_code) == ("failed", "engine_lost")
    assert "3 times" in (row.error_message or "")
    assert store.claim("boot/engine-0", 60) is None


def test_a_job_given_back_in_peace_is_not_blamed(store: JobStore) -> None:
    job = add(store)
    for _ in range(5):
        store.release(claim(store))
    row = store.get(job.id)
    assert row is not None
    assert (row.status, row.lost, row.attempt) == ("queued", 0, 5)


def test_the_same_idempotency_key_gives_the_same_job(store: JobStore) -> None:
    first = add(store, "key")
    again, created = store.create(new_job_id(), OPTIONS, "f", "key")
    assert (again.id, created) == (first.id, False)
    with pytest.raises(IdempotencyError, match="send a new key"):
        store.create(new_job_id(), OPTIONS, "other", "key")
    assert store.delete(first.id)
    assert add(store, "key").id != first.id


def test_pages_go_through_all_jobs_without_gap_or_repeat(store: JobStore) -> None:
    ids = [add(store).id for _ in range(7)]
    for ascending, expected in ((True, ids), (False, ids[::-1])):
        seen: list[str] = []
        after = None
        while page := store.page(limit=3, after=after, ascending=ascending):
            seen += [job.id for job in page]
            after = page[-1]
        assert seen == expected


def test_a_foreign_or_newer_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("this is no database, and long enough to tell" * 9)
    with pytest.raises(StoreError, match="no job store"):
        JobStore(tmp_path / "text")
    with sqlite3.connect(tmp_path / "newer") as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreError, match="schema 99, expected 1"):
        JobStore(tmp_path / "newer")


def test_acknowledged_jobs_outlive_a_killed_process(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from inference.serving.job import new_job_id\n"
        "from inference.serving.jobs import JobStore\n"
        "from inference.requests import AnimationOptions\n"
        f"store = JobStore(Path({str(tmp_path / 'db')!r}))\n"
        "while True:\n"
        "    job, _ = store.create(new_job_id(), AnimationOptions(), 'f')\n"
        "    print(job.id, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    acknowledged = [process.stdout.readline().strip() for _ in range(20)]
    process.send_signal(signal.SIGKILL)
    acknowledged += [line.strip() for line in process.stdout if line.endswith("\n")]
    process.wait()
    store = JobStore(tmp_path / "db")
    assert all(store.get(job_id) for job_id in acknowledged)
    assert store.claim("boot/engine-0", 60) is not None


def test_the_worker_publishes_a_video_with_its_record(store: JobStore, files: JobFiles) -> None:
    job = add(store)
    work(store, files, Engine())
    row = store.get(job.id)
    assert row is not None
    assert (row.status, row.progress) == ("completed", 1.0)
    record = outputs.published(files.video(job.id))
    assert record is not None
    assert record["id"] == job.id
    assert not list(files.attempts.iterdir())


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("{reference}: no person"), "invalid_input", "the image: no person"),
        (RuntimeError("out of memory"), "engine_error", "RuntimeError: out of memory"),
    ],
)
def test_a_failure_is_told_without_the_servers_paths(
    store: JobStore, files: JobFiles, error: Exception, code: str, message: str
) -> None:
    def fail(request: AnimationRequest) -> None:
        raise type(error)(str(error).format(reference=request.reference))

    first, second = add(store), add(store)
    work(store, files, Engine(fail))
    for job in (first, second):  # a failure does not stop the worker
        row = store.get(job.id)
        assert row is not None
        assert (row.status, row.error_code, row.error_message) == ("failed", code, message)


def test_a_deleted_job_stops_between_steps_and_leaves_nothing(
    store: JobStore, files: JobFiles
) -> None:
    job = add(store)

    def delete(request: AnimationRequest) -> None:
        store.delete(job.id)
        files.remove(job.id)

    engine = Engine(delete)
    work(store, files, engine, until=lambda: store.get(job.id) is None)
    assert len(engine.runs) == 1
    assert not list(files.videos.iterdir())
    assert not list(files.attempts.iterdir())
    assert store.history(job.id)[-1] == ("deleted", 1)


def test_stopping_gives_the_job_back_and_the_next_worker_finishes_it(
    store: JobStore, files: JobFiles
) -> None:
    job = add(store)
    holder: list[EngineWorker] = []
    engine = Engine(lambda request: holder[0].stop())
    holder.append(EngineWorker(store, files, engine, owner="boot/engine-0", lease_seconds=60))
    holder[0].run()
    assert store.history(job.id)[-1] == ("released", 1)
    work(store, files, Engine())
    assert store.history(job.id)[-1] == ("completed", 2)


def test_a_video_published_before_the_crash_is_adopted_not_made_again(
    store: JobStore, files: JobFiles
) -> None:
    add(store)
    job = claim(store, "old/engine-0")
    files.staged(job).write_bytes(b"a video")
    record = outputs.describe(files.staged(job), {"id": job.id})
    outputs.publish(files.staged(job), files.video(job.id), record)  # then the power goes
    store.take_over("new", files.finished)
    assert store.history(job.id)[-1] == ("completed", 1)


def test_a_sweep_removes_leftovers_and_keeps_jobs(store: JobStore, files: JobFiles) -> None:
    job = add(store)
    kept = files.uploads / job.id
    kept.mkdir()
    for path in (files.uploads / "video_gone", files.incoming / "video_half"):
        path.mkdir()
    for path in (files.videos / "video_gone.mp4", files.attempts / f"{job.id}.1.mp4"):
        path.write_bytes(b"left over")
    files.sweep(store)
    assert [p for p in files.root.rglob("video_*") if os.path.exists(p)] == [kept]
