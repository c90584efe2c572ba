"""A worker on real videos without Ray: what a death leaves, and what the next one makes of it."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from skimage import data

from pipelines import shards
from pipelines.curation import ledger
from pipelines.curation.annotate import Perception
from pipelines.curation.config import CurationConfig
from pipelines.curation.finish import finish_run
from pipelines.curation.pipeline import ShardWorker
from pipelines.curation.plan import Plan, make_plan, save_plan
from pipelines.curation.sources import read_sources
from pipelines.curation.worker import DOWNLOADS_FOLDER, versions
from pipelines.overrides import apply_overrides
from pipelines.video import encode
from tests.unit.fetch_server import Answer, WebServer

NAME = "shard-000000"
SETTINGS = ["faces.backend=cascade", "pose.backend=file", "camera.backend=flow"]
SETTINGS += ["output.preset=ultrafast", "samples.side=256"]
FRAMES = FPS = 4


def film(path: Path, *, flipped: bool = False) -> Path:
    portrait = cv2.resize(data.astronaut(), (256, 256), interpolation=cv2.INTER_AREA)
    encode(path, [np.fliplr(portrait) if flipped else portrait] * FRAMES, fps=FPS)
    points = np.full((FRAMES, 1, 18, 2), 0.4, np.float32)
    score = np.full((FRAMES, 1, 18), 0.9, np.float32)
    np.savez(path.with_suffix(".pose.npz"), keypoints=points, score=score, fps=FPS)
    return path


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    film(folder / "a.mp4")
    (folder / "b.mp4").write_bytes(b"no video")
    return folder


def planned(folder: Path, sources: list[str], *settings: str) -> Plan:
    """The folder as a run finds it when its workers start."""
    folder.mkdir(exist_ok=True)
    config = apply_overrides(CurationConfig(), [*SETTINGS, *settings])
    (folder / ledger.THUMBS_FOLDER).mkdir(exist_ok=True)
    return save_plan(folder, make_plan(read_sources(sources), config, Perception(config).names()))


def work(folder: Path, again: frozenset[str] = frozenset()) -> str | None:
    """Let a fresh worker do the one shard; the sentence with which it gives up, if it does."""
    journal, run = ledger.RunJournal.create(folder)
    try:
        worker = ShardWorker(str(folder), os.getcwd(), run, again, 1, versions())
        answer = worker({"item": np.array([NAME])})
        return str(answer["refusal"][0]) if "refusal" in answer else None
    finally:
        journal.close()


def dies_after_moving(end: str, action: Callable[[], Any]) -> None:
    """Do it in a process that is killed as soon as it has moved a file to a path with that end."""
    child = os.fork()
    if child == 0:
        move = os.replace

        def replace(source: Any, target: Any) -> None:
            move(source, target)
            if str(target).endswith(end):
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = replace
        action()
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_death_between_tar_and_record_of_a_retry_is_put_right_by_the_next_worker(tmp_path, videos):
    folder = tmp_path / "out"
    plan = planned(folder, [str(videos)])
    assert work(folder) is None
    again = frozenset({NAME})
    film(videos / "b.mp4", flipped=True)
    dies_after_moving(f"out/{NAME}.tar", lambda: work(folder, again))
    assert shards.committed(folder, NAME) is None
    # What the source says now is not what the dead worker read.
    (videos / "b.mp4").write_bytes(b"no video any more")
    assert work(folder, again) is None
    finish_run(folder, plan)
    assert shards.verify(folder).problems == ()
    (record,) = shards.read_records(folder)
    assert [source.verdict for source in record.sources] == ["kept", "kept"]
    assert not (folder / ledger.WORK_FOLDER / "repack").exists()


def test_a_repack_that_a_whole_commit_made_stale_never_returns(tmp_path, videos):
    folder = tmp_path / "out"
    plan = planned(folder, [str(videos)])
    work(folder)
    film(videos / "b.mp4", flipped=True)
    dies_after_moving("/ready", lambda: work(folder, frozenset({NAME})))
    for suffix in ("tar", "json"):
        (folder / f"{NAME}.{suffix}").unlink()
    (videos / "b.mp4").write_bytes(b"no video any more")
    assert work(folder) is None
    made = (folder / f"{NAME}.json").read_bytes()
    finish_run(folder, plan)
    assert (folder / f"{NAME}.json").read_bytes() == made
    assert shards.verify(folder).problems == ()


def test_downloads_of_a_worker_that_died_after_its_commit_are_removed(tmp_path, videos):
    server = WebServer()
    try:
        url = server.serve("/a.mp4", Answer((videos / "a.mp4").read_bytes(), type="video/mp4"))
        folder = tmp_path / "out"
        signed = f"{url}?v=1&X-Amz-Signature=abc"
        server.answers["/a.mp4?v=1&X-Amz-Signature=abc"] = server.answers["/a.mp4"]
        planned(folder, [signed], f'download.allow_hosts=["{server.host}"]')
        dies_after_moving(f"out/{NAME}.json", lambda: work(folder))
        downloads = folder / DOWNLOADS_FOLDER
        assert {path.suffix for path in downloads.iterdir()} == {".bin", ".json"}
        assert work(folder) is None
        assert list(downloads.iterdir()) == []
        (record,) = shards.read_records(folder)
        assert [source.provenance["uri"] for source in record.sources] == [f"{url}?v=1"]
        written = [path.read_bytes() for path in folder.glob("shard-*")]
        assert written
        assert not any(b"Signature" in data for data in written)
    finally:
        server.close()


def test_frames_lie_on_the_machines_own_disk_and_go_with_the_worker(tmp_path, videos, monkeypatch):
    local, out = tmp_path / "local", tmp_path / "out"
    local.mkdir()
    planned(out, [str(videos)])
    monkeypatch.setenv("TMPDIR", str(local))
    code = (
        "import os, sys; from pathlib import Path\n"
        "from pipelines.curation import ledger\n"
        "from pipelines.curation.pipeline import ShardWorker\n"
        "from pipelines.curation.worker import versions\n"
        "journal, run = ledger.RunJournal.create(Path(sys.argv[1]))\n"
        "worker = ShardWorker(sys.argv[1], os.getcwd(), run, frozenset(), 1, versions())\n"
        "work = worker.idle.get()\n"
        "print(os.readlink(f'/proc/self/fd/{work.isolated.frames}'), flush=True)\n"
        "input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        place = process.stdout.readline()
        process.kill()
    assert place.startswith(str(local))
    assert list(local.iterdir()) == []
