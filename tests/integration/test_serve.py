"""The job server, whole: real Ray Serve, real SQLite, real uploads, real SIGKILL."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from animator.weights import save_model
from inference import outputs
from inference.serving.jobs import JobStore
from inference.serving.serve import ServeError, ServerConfig, serve
from infra.cli import main
from infra.console import WRONG_USE
from pipelines.video import encode, probe
from tests.unit.test_tasks import SMALL

HERE = Path(__file__).parent
DONE = {"completed", "failed"}


class Server:
    """A server in a process of its own, with the stand-in engine."""

    def __init__(self, folder: Path, *, seconds: float = 0.01, lease: float = 60.0) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.log = folder / "log"
        with socket.socket() as probe_socket:
            probe_socket.bind(("127.0.0.1", 0))
            self.port = probe_socket.getsockname()[1]
        self.seconds = seconds
        self.lease = lease
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text("{}")
        Image.new("RGB", (48, 64), "teal").save(folder / "person.png")
        encode(folder / "dance.mp4", [np.full((32, 32, 3), 90, np.uint8)] * 6, fps=8)
        self.process: subprocess.Popen[str] | None = None
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30)

    def start(self, command: list[str] | None = None) -> str:
        """Start and wait until it is ready; returns the line it prints.

        `command`: the arguments of Python, instead of those with the stand-in engine.
        """
        script = (
            "from pathlib import Path\n"
            "from inference.serving.serve import ServerConfig, serve\n"
            "from inference.serving.uploads import UploadLimits\n"
            f"serve(ServerConfig(model_dir=Path({str(self.folder / 'model')!r}),"
            f" data_dir=Path({str(self.data)!r}), port={self.port}, max_attempts=3,"
            f" lease_seconds={self.lease}, engine_factory='stand_in_engine:StandInEngine',"
            " limits=UploadLimits(image_bytes=200_000, video_bytes=300_000,"
            " pose_bytes=50_000)),"
            " announce=lambda line: print(line, flush=True))\n"
        )
        path = os.pathsep.join([str(HERE), *sys.path])
        env = {**os.environ, "PYTHONPATH": path, "STAND_IN_LOG": str(self.log)}
        env |= {"STAND_IN_SECONDS": str(self.seconds)}
        env.pop("ANIMATOR_API_KEY", None)
        with (self.folder / "stderr").open("a") as errors:
            self.process = subprocess.Popen(
                [sys.executable, *(command or ["-c", script])],
                env=env,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            if "serves http" in line:
                return line
        raise AssertionError((self.folder / "stderr").read_text()[-3000:])

    def end(self, number: int) -> int:
        """Send a signal to the server process alone and wait for its end."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(60)

    def send(self, seed: int = 0, headers: dict[str, str] | None = None, **form: Any) -> Any:
        """POST a job with good files; the response."""
        files = {
            "image": ("../../etc/passwd", (self.folder / "person.png").read_bytes()),
            "video": ("dance.mp4", (self.folder / "dance.mp4").read_bytes()),
        }
        return self.client.post(
            "/v1/videos", files=files, data={"seed": seed, **form}, headers=headers
        )

    def post(self, image: bytes | None, video: bytes | None, **form: Any) -> Any:
        """POST a job with these files; the response."""
        given = {"image": image, "video": video}
        files = {name: (name, data) for name, data in given.items() if data is not None}
        return self.client.post("/v1/videos", files=files, data=form)

    def wait(self, video_id: str, statuses: set[str] = DONE, seconds: float = 30) -> dict[str, Any]:
        """Poll a job until it has one of the statuses."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            video = self.client.get(f"/v1/videos/{video_id}").json()
            if video["status"] in statuses:
                return video
            time.sleep(0.1)
        raise AssertionError(f"still {video} after {seconds} s")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"), lease=6.0)
    server.start()
    yield server
    code = server.end(signal.SIGTERM)
    assert code == 0, (server.folder / "stderr").read_text()[-3000:]


def is_problem(response: httpx.Response, status: int, detail: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["status"] == status
    assert detail in body["detail"]


def test_a_job_becomes_a_video(server: Server) -> None:
    response = server.send(seed=7, steps=3, guidance=2.5)
    assert response.status_code == 201
    video = response.json()
    assert response.headers["location"] == f"/v1/videos/{video['id']}"
    assert (video["object"], video["status"], video["progress"]) == ("video", "queued", 0)
    assert (video["seed"], video["steps"], video["guidance"]) == (7, 3, 2.5)
    video = server.wait(video["id"])
    assert (video["status"], video["progress"], video["error"]) == ("completed", 100, None)
    assert video["completed_at"] >= video["created_at"]
    content = server.client.get(f"/v1/videos/{video['id']}/content")
    assert content.headers["content-type"] == "video/mp4"
    (server.folder / "result.mp4").write_bytes(content.content)
    assert probe(server.folder / "result.mp4").num_frames == 4


def test_openai_field_names_are_understood(server: Server) -> None:
    files = {
        "input_reference": ("a.png", (server.folder / "person.png").read_bytes()),
        "video": ("b.mp4", (server.folder / "dance.mp4").read_bytes()),
    }
    data = {"prompt": "a person dances", "model": "animator"}
    response = server.client.post("/v1/videos", files=files, data=data)
    assert response.status_code == 201
    assert server.wait(response.json()["id"])["status"] == "completed"


def test_hostile_uploads_are_refused_with_a_reason_and_leave_nothing(server: Server) -> None:
    image = (server.folder / "person.png").read_bytes()
    video = (server.folder / "dance.mp4").read_bytes()
    before = server.client.get("/v1/videos").json()["data"]
    is_problem(server.post(None, video), 422, "the 'image' file is missing")
    is_problem(server.post(image, None), 422, "the 'video' file is missing")
    is_problem(server.post(b"<html>", video), 422, "expected a JPEG, PNG or WebP")
    is_problem(server.post(image, b"#EXTM3U\nhttp://127.0.0.1/x.ts"), 422, "video: ")
    is_problem(server.post(image, video[:200]), 422, "video: ")
    is_problem(server.post(b"x" * 200_001, video), 413, "'image' part is larger than 200000")
    is_problem(server.post(image, b"x" * 300_001), 413, "'video' part is larger than 300000")
    is_problem(server.post(image, b"x" * 900_000), 413, "the body is larger than")
    is_problem(server.post(image, video, url="http://x"), 422, "unknown field 'url'")
    is_problem(server.post(image, video, seed="x"), 422, "seed is 'x', expected a whole number")
    is_problem(server.post(image, video, steps=9999), 422, "steps is 9999")
    is_problem(server.client.post("/v1/videos", json={"image": "http://x"}), 415, "multipart")
    kind = {"content-type": "multipart/form-data; boundary=b"}
    cut = b'--b\r\ncontent-disposition: form-data; name="image"; filename="a"\r\n\r\nabc'
    is_problem(server.client.post("/v1/videos", content=cut, headers=kind), 400, "ends too early")
    garbage = server.client.post("/v1/videos", content=b"garbage", headers=kind)
    is_problem(garbage, 400, "multipart body")
    assert server.client.get("/v1/videos").json()["data"] == before
    assert not list((server.data / "incoming").iterdir())


def test_a_body_without_length_is_cut_off_at_the_cap(server: Server) -> None:
    def body() -> Iterator[bytes]:
        yield b'--b\r\ncontent-disposition: form-data; name="video"; filename="a"\r\n\r\n'
        for _ in range(200):
            yield b"x" * 10_000

    kind = {"content-type": "multipart/form-data; boundary=b"}
    response = server.client.post("/v1/videos", content=body(), headers=kind)
    is_problem(response, 413, "'video' part is larger")


def test_what_is_not_there_is_told_apart_from_what_is_not_yet(server: Server) -> None:
    for path in ("/v1/videos/video_0", "/v1/videos/..%2F..%2Fjobs.sqlite3/content", "/nothing"):
        is_problem(server.client.get(path), 404, "")
    is_problem(server.client.delete("/v1/videos/video_0"), 404, "no video 'video_0'")
    is_problem(server.client.get("/v1/videos?limit=0"), 422, "limit")
    is_problem(server.client.get("/v1/videos?after=video_0"), 404, "no video")
    running = server.send(steps=200).json()["id"]
    is_problem(server.client.get(f"/v1/videos/{running}/content"), 409, "its content is not there")
    server.client.delete(f"/v1/videos/{running}")


def test_deleting_a_running_job_frees_the_engine(server: Server) -> None:
    long = server.send(steps=200, seed=900).json()["id"]
    server.wait(long, {"in_progress"})
    assert server.client.get("/healthz").json()["in_progress"] == 1
    answer = server.client.delete(f"/v1/videos/{long}").json()
    assert answer == {"id": long, "object": "video.deleted", "deleted": True}
    is_problem(server.client.get(f"/v1/videos/{long}"), 404, "no video")
    assert server.wait(server.send().json()["id"])["status"] == "completed"
    assert f"{long}.1.mp4" not in [
        line.split()[3] for line in server.log.read_text().splitlines() if line.startswith("end")
    ]
    assert not list(server.data.glob(f"*/{long}*"))


def test_the_same_key_gives_the_same_job(server: Server) -> None:
    key = {"Idempotency-Key": "order-1"}
    first = server.send(seed=11, headers=key)
    again = server.send(seed=11, headers=key)
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["id"] == again.json()["id"]
    is_problem(server.send(seed=12, headers=key), 422, "send a new key")


def test_pages_list_every_job_once(server: Server) -> None:
    for seed in range(3):
        server.send(seed=seed)
    seen: list[str] = []
    page: dict[str, Any] = {"has_more": True, "last_id": None}
    while page["has_more"]:
        after = {"after": page["last_id"]} if page["last_id"] else {}
        page = server.client.get("/v1/videos", params={"limit": 2, **after}).json()
        seen += [video["id"] for video in page["data"]]
    stored = JobStore(server.data / "jobs.sqlite3").page(limit=1000)
    assert seen == [job.id for job in stored]


def test_engine_failures_end_in_a_clear_error(server: Server) -> None:
    refused = server.wait(server.send(seed=401).json()["id"])
    assert refused["status"] == "failed"
    assert refused["error"] == {
        "code": "invalid_input",
        "message": "the image: no person found; choose a clearer picture",
    }
    broken = server.wait(server.send(seed=500).json()["id"])
    assert broken["error"]["code"] == "engine_error"
    assert str(server.data) not in json.dumps(broken)


def test_an_engine_that_stops_answering_is_restarted_and_the_job_made(server: Server) -> None:
    silent = server.wait(server.send(seed=777).json()["id"], seconds=60)
    assert silent["status"] == "completed"
    history = JobStore(server.data / "jobs.sqlite3").history(silent["id"])
    assert [event for event, _ in history] == ["created", "started", "lost", "started", "completed"]


def test_a_job_that_kills_its_engine_fails_and_the_next_one_is_made(server: Server) -> None:
    deadly, good = server.send(seed=666).json()["id"], server.send(seed=1).json()["id"]
    assert server.wait(deadly, seconds=60)["error"]["code"] == "engine_lost"
    assert server.wait(good)["status"] == "completed"


def test_pages_of_other_sites_are_kept_out(server: Server) -> None:
    for headers in ({"Origin": "https://evil.example"}, {"Host": "rebound.example"}):
        is_problem(server.client.get("/v1/videos", headers=headers), 403, "its own machine")


def test_the_api_describes_itself(server: Server) -> None:
    paths = server.client.get("/openapi.json").json()["paths"]
    form = paths["/v1/videos"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert {"image", "video", "seed", "steps", "guidance"} <= set(form["properties"])
    assert server.client.get("/docs").status_code == 200


def test_ten_jobs_survive_kills_and_each_is_made_once(tmp_path: Path) -> None:
    server = Server(tmp_path, seconds=0.1)
    server.start()
    ids = [server.send(seed=seed).json()["id"] for seed in range(10)]
    time.sleep(random.uniform(0.2, 3.0))
    assert server.end(signal.SIGKILL) == -signal.SIGKILL
    assert "serves http" in server.start()
    store = JobStore(server.data / "jobs.sqlite3")
    for video_id in ids:
        assert server.wait(video_id, seconds=60)["status"] == "completed"
    events = {video_id: [event for event, _ in store.history(video_id)] for video_id in ids}
    assert all(history.count("completed") == 1 for history in events.values())
    # The kill struck one job at most; no other was started twice.
    assert sum(history.count("started") for history in events.values()) <= 11
    videos = sorted(path.stem for path in (server.data / "videos").glob("*.mp4"))
    assert videos == sorted(ids)
    assert all(outputs.published(server.data / "videos" / f"{name}.mp4") for name in videos)

    # Asked to stop, the server gives the running job back and leaves no process behind.
    last = server.send(steps=200).json()["id"]
    server.wait(last, {"in_progress"})
    assert server.end(signal.SIGTERM) == 0
    assert store.history(last)[-1] == ("released", 1)
    pids = {int(line.split()[1]) for line in server.log.read_text().splitlines()}
    deadline = time.monotonic() + 15
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_what_cannot_be_started_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ServerConfig(model_dir=tmp_path, data_dir=tmp_path / "data")
    monkeypatch.delenv("ANIMATOR_API_KEY", raising=False)
    with pytest.raises(ServeError, match="ANIMATOR_API_KEY is not set"):
        serve(replace(config, host="0.0.0.0"))
    with pytest.raises(ServeError, match="engines is 0, expected 1 or more"):
        replace(config, engines=0)
    monkeypatch.setattr("inference.serving.serve.PORT_SECONDS", 0.3)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=rf"127\.0\.0\.1:{port} cannot be bound"):
            serve(replace(config, port=port))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny model, of the real engine."""
    import torch

    from animator.model import Animator

    torch.manual_seed(0)
    about = {"sampling": {"steps": 12, "sigma_min": 0.05, "sigma_max": 20.0}}
    animator = (SMALL, Animator(SMALL).state_dict())
    save_model(tmp_path / "tiny", animator=animator, about=about)
    return tmp_path / "tiny"


def keypoints(path: Path, frames: int) -> tuple[str, bytes]:
    points = np.random.default_rng(0).uniform(0.3, 0.7, (1, 1, 18, 2)).astype(np.float32)
    score = np.ones((frames, 1, 18), np.float32)
    np.savez(path, keypoints=points.repeat(frames, 0), score=score, fps=8.0)
    return path.name, path.read_bytes()


def test_a_preset_and_settings_hold_for_every_job_and_are_told(
    tmp_path: Path, model: Path, no_models: Path
) -> None:
    server = Server(tmp_path)
    given = {"model": model, "data": server.data, "port": server.port, "preset": "fast"}
    options = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    server.start(["-m", "infra", "serve", *options, "--set", "sampling.churn=3"])
    try:
        health = server.client.get("/healthz").json()
        assert (health["preset"], health["changes"]) == ("fast", ["sampling.churn=3"])
        files = {
            "image": ("a.png", (tmp_path / "person.png").read_bytes()),
            "video": ("b.mp4", (tmp_path / "dance.mp4").read_bytes()),
            "image_pose": keypoints(tmp_path / "a.pose.npz", 1),
            "video_pose": keypoints(tmp_path / "b.pose.npz", 6),
        }
        sent = server.client.post("/v1/videos", files=files, data={"steps": 2}).json()
        assert server.wait(sent["id"], seconds=120)["status"] == "completed"
    finally:
        assert server.end(signal.SIGTERM) == 0
    record = outputs.published(server.data / "videos" / f"{sent['id']}.mp4")
    assert record is not None
    assert record["preset"]["name"] == "fast"
    assert set(record["preset"]["changed"]) == {
        "sampling.churn: 0.0 → 3.0",
        "sampling.steps: 10 → 2",
    }
    assert record["sampling"]["schedule"] == "ays"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--preset", "quick"], "Got preset 'quick', but expected one of quality"),
        (["--set", "sampling.chrun=1"], "sampling.chrun"),
        (["--preset", "fast", "--set", "sampling.steps=some"], "sampling.steps"),
        (["--set", "windows.overlap=-1"], "overlap"),
    ],
)
def test_a_preset_or_setting_that_there_is_not_is_refused_before_anything_is_begun(
    tmp_path: Path,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    wrong: list[str],
    said: str,
) -> None:
    import ray

    data = tmp_path / "data"
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--model", str(model), "--data", str(data), *wrong])
    assert ended.value.code == WRONG_USE
    [line] = capsys.readouterr().err.splitlines()
    assert said in line
    assert not data.exists()
    assert not ray.is_initialized()
