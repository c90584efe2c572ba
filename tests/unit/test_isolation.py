"""The process that decodes: it may crash, hang, grow or be killed, and its parent goes on."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import pytest
from skimage import data

from pipelines.curation.annotate import Perception
from pipelines.curation.config import CurationConfig
from pipelines.curation.isolation import NAME, IsolatedWorker, SourceError
from pipelines.curation.service import SourceService
from pipelines.curation.source import Job, Report
from pipelines.curation.wire import WireError
from pipelines.overrides import apply_overrides, to_dict
from pipelines.shards import sha256_file
from pipelines.video import encode

SETTINGS = ["faces.backend=cascade", "pose.backend=file", "camera.backend=flow"]
SETTINGS += ["output.preset=ultrafast", "samples.side=256", "video.seconds_per_video_second=3"]
CONFIG = apply_overrides(CurationConfig(), SETTINGS)
FRAMES = FPS = 4


def decoders() -> list[psutil.Process]:
    """Decoders below this process; what other tests have left is none of theirs."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            # What has ended and was not waited for has no command line any more.
            if child.status() == psutil.STATUS_ZOMBIE or NAME in " ".join(child.cmdline()):
                found.append(child)
    return found


@pytest.fixture(scope="module")
def perception() -> Perception:
    return Perception(CONFIG)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "portrait.mp4"
    portrait = cv2.resize(data.astronaut(), (256, 256), interpolation=cv2.INTER_AREA)
    encode(path, [portrait] * FRAMES, fps=FPS)
    points = np.full((FRAMES, 1, 18, 2), 0.4, np.float32)
    score = np.full((FRAMES, 1, 18), 0.9, np.float32)
    np.savez(path.with_suffix(".pose.npz"), keypoints=points, score=score, fps=FPS)
    return path


class Setting:
    """A worker, and what happens to it while it asks for something."""

    def __init__(self, perception: Perception, folder: Path, video: Path) -> None:
        self.perception, self.folder, self.video = perception, folder, video
        self.worker = IsolatedWorker(folder, timeout_seconds=60, max_memory=4 << 30)
        self.length_counts = False

    def run(self, happens: Callable[[int], Any] = lambda pid: None) -> Report:
        sha256 = sha256_file(self.video)
        service = SourceService(
            self.perception, self.video, sha256, self.folder, self.worker.frames
        )

        def serve(kind: str, data: Any) -> Any:
            if kind == "see":
                assert self.worker.pid is not None
                happens(self.worker.pid)
            return service(kind, data)

        job = Job(
            id="id",
            sha256=sha256,
            path=str(self.video),
            staging=str(self.folder),
            config=CONFIG,
        )
        allowance = service.allowance if self.length_counts else (lambda: 0.0)
        return service.parse(self.worker.run(to_dict(job), serve, allowance))


@pytest.fixture(scope="module")
def shared(
    perception: Perception, video: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Setting]:
    made = Setting(perception, tmp_path_factory.mktemp("staging"), video)
    yield made
    made.worker.close()
    assert not decoders(), "a decoder or its remains are left"


@pytest.fixture
def setting(shared: Setting, video: Path) -> Setting:
    """The same worker for all tests: it must come through each of them."""
    shared.video = video
    shared.worker.timeout_seconds, shared.worker.max_memory = 60, 4 << 30
    return shared


def test_source_is_scored_cut_and_annotated(setting):
    report = setting.run()
    (clip,) = report.clips
    assert (clip.verdict, clip.num_frames) == ("kept", FRAMES)
    assert clip.series["face_score"] == [1.0] * FRAMES
    names = {path.name for path in setting.folder.iterdir()}
    assert names == {f"{clip.key}.{suffix}" for suffix in ("mp4", "pose.npz", "face.npz")}
    assert set(report.seconds) >= {"probe", "scan", "quality", "camera", "models", "encode"}


def test_one_process_serves_many_sources(setting):
    pids = set()
    first = setting.run(pids.add)
    assert setting.run(pids.add).clips == first.clips
    assert len(pids) == 1


def test_decoder_holds_neither_models_nor_ray(setting):
    loaded = []
    setting.run(lambda pid: loaded.append(Path(f"/proc/{pid}/maps").read_text()))
    assert "libavcodec" in loaded[0]
    for heavy in ("libtorch", "onnxruntime", "_raylet"):
        assert heavy not in loaded[0]


def test_decoder_knows_no_secret_of_its_parent(setting, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "do not tell")
    setting.worker.close_child()
    known = []
    setting.run(lambda pid: known.append(Path(f"/proc/{pid}/environ").read_bytes()))
    assert b"MALLOC_ARENA_MAX=2" in known[0]
    assert b"do not tell" not in known[0]


def test_crash_is_recorded_and_the_next_source_gets_a_new_process(setting):
    with pytest.raises(SourceError, match=r"crashed its decoder \(signal SEGV\)") as caught:
        setting.run(lambda pid: os.kill(pid, signal.SIGSEGV))
    assert caught.value.kind == "crash"
    assert setting.run().clips


def test_crash_that_an_earlier_source_prepared_is_not_blamed_on_this_one(setting):
    pids: list[int] = []

    def once(pid: int) -> None:
        if not pids:
            os.kill(pid, signal.SIGABRT)
        pids.append(pid)

    assert setting.run(once).clips
    assert len(set(pids)) == 2


def test_process_that_is_killed_from_outside_is_begun_anew(setting):
    pids: list[int] = []

    def twice(pid: int) -> None:
        if len(pids) < 2:
            os.kill(pid, signal.SIGKILL)
        pids.append(pid)

    assert setting.run(twice).clips
    assert len(set(pids)) == 3


def test_process_that_is_killed_as_it_starts_is_begun_anew(setting):
    killed: list[int] = []

    def kill_the_first() -> None:
        while not killed:
            for child in psutil.Process().children():
                with contextlib.suppress(psutil.Error):
                    if NAME in " ".join(child.cmdline()):
                        child.kill()
                        killed.append(child.pid)

    thread = threading.Thread(target=kill_the_first, daemon=True)
    thread.start()
    assert setting.run(lambda pid: None).clips
    thread.join()
    assert killed != [setting.worker.pid]


def test_hang_ends_at_the_time_limit(setting):
    setting.worker.timeout_seconds = 1.5
    began = time.monotonic()
    with pytest.raises(SourceError, match=r"took longer than 1\.5 s") as caught:
        setting.run(lambda pid: os.kill(pid, signal.SIGSTOP))
    assert caught.value.kind == "timeout"
    assert time.monotonic() - began < 10


def test_a_long_video_may_take_longer_than_a_short_one(setting, monkeypatch):
    setting.worker.timeout_seconds = 2.0
    setting.length_counts = True
    patient = replace(CONFIG, video=replace(CONFIG.video, seconds_per_video_second=30.0))
    monkeypatch.setattr(setting.perception, "config", patient)
    try:
        # Of one second, so that it may take half a minute, which the busiest machine does not.
        assert setting.run(lambda pid: time.sleep(2.2)).clips
    finally:
        setting.length_counts = False


def test_what_a_decoder_says_of_its_length_is_not_believed_beyond_the_limit(setting):
    service = SourceService(
        setting.perception, setting.video, "abcd" * 16, setting.folder, setting.worker.frames
    )
    assert service.allowance() == 0
    for said in ("long", -1.0, None, [9]):
        service("known", {"seconds": said})
        assert service.allowance() == 0
    service("known", {"seconds": 1e12})
    assert service.allowance() == 3 * 1800


def test_waiting_for_others_who_use_a_model_is_not_the_sources_time(setting):
    setting.worker.timeout_seconds = 2.0
    setting.length_counts = True
    lock = setting.perception._face_lock

    def hold(pid: int) -> None:
        # As another thread does that shares the models, for longer than the source may take.
        lock.acquire()
        threading.Timer(5.5, lock.release).start()

    try:
        assert setting.run(hold).clips
    finally:
        setting.length_counts = False


def test_answer_that_is_not_listened_to_ends_at_the_time_limit(setting):
    setting.worker.timeout_seconds = 1.5

    def serve(kind: str, data: Any) -> str:
        os.kill(setting.worker.pid, signal.SIGSTOP)
        return "x" * (8 << 20)  # more than the socket holds

    job = Job(id="", sha256="0" * 64, path=str(setting.video), staging="", config=CONFIG)
    with pytest.raises(SourceError, match="took longer"):
        setting.worker.run(to_dict(job), serve)


def test_too_much_memory_is_refused(setting):
    setting.worker.close_child()
    setting.worker.max_memory = 300 << 20
    with pytest.raises(SourceError, match=r"video\.max_memory") as caught:
        setting.run()
    assert caught.value.kind == "memory"
    setting.worker.close_child()


def test_unreadable_file_says_why(setting, tmp_path):
    setting.video = tmp_path / "broken.mp4"
    setting.video.write_bytes(b"no video" * 100)
    with pytest.raises(SourceError, match=r"^cannot be opened as a video") as caught:
        setting.run()
    assert caught.value.kind == "permanent"
    assert str(tmp_path) not in str(caught.value)


def test_decoder_ends_with_a_parent_that_is_killed(tmp_path):
    code = (
        "import sys, time; from pathlib import Path\n"
        "from pipelines.curation.isolation import IsolatedWorker\n"
        "worker = IsolatedWorker(Path(sys.argv[1]), timeout_seconds=60, max_memory=0)\n"
        "worker._ready_child(); print(worker.pid, flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        decoder = psutil.Process(int(parent.stdout.readline()))
        decoder.suspend()
        parent.kill()
    gone, _ = psutil.wait_procs([decoder], timeout=10)
    assert gone


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("open", {"path": "/etc/passwd"}),
        ("see", {"number": 0, "slots": [], "shape": [8, 8], "times": []}),
        ("see", {"number": 0, "slots": [0], "shape": [1 << 30, 8], "times": [0.0]}),
        ("see", {"number": 0, "slots": [-1], "shape": [8, 8], "times": [0.0]}),
        ("see", {"number": 0, "slots": [0], "shape": [8, 8], "times": ["now"]}),
        ("annotate", {"key": "../../x_000", "start": 0.0, "fps": 8.0, "num_frames": 4}),
        ("annotate", {"key": "abcdabcdabcdabcd_000", "start": 0.0, "fps": 8, "num_frames": 1}),
        ("camera", [1, 2]),
        ("known", {"codec": "x" * 100_000}),
    ],
)
def test_words_of_a_decoder_that_was_taken_over_are_not_believed(setting, kind, data):
    service = SourceService(
        setting.perception, setting.video, "abcd" * 16, setting.folder, setting.worker.frames
    )
    with pytest.raises(WireError):
        service(kind, data)


def test_report_with_clips_of_others_is_refused(setting):
    report = to_dict(setting.run())
    service = SourceService(
        setting.perception, setting.video, "abcd" * 16, setting.folder, setting.worker.frames
    )
    with pytest.raises(WireError, match="names of their own"):
        service.parse(report)
