"""The HTTP routes without Ray: keys, limits and what an unexpected error looks like."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from inference.serving.config import ServerConfig
from inference.serving.jobs import JobStore
from inference.serving.uploads import UploadLimits
from inference.serving.web import create_app
from inference.serving.worker import JobFiles
from pipelines.video import encode

KEY = "a long random text"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    store = JobStore(JobFiles(tmp_path / "data").database)
    yield store
    store.close()


@pytest.fixture
def client(tmp_path: Path, store: JobStore) -> Callable[..., TestClient]:
    def make(**options) -> TestClient:
        settings = {"limits": UploadLimits(), "max_queued": 100, **options}
        app = create_app(JobFiles(tmp_path / "data"), store, **settings)
        return TestClient(app, base_url="http://localhost", raise_server_exceptions=False)

    return make


@pytest.fixture
def form(tmp_path: Path) -> dict[str, tuple[str, bytes]]:
    Image.new("RGB", (48, 64), "teal").save(tmp_path / "person.png")
    encode(tmp_path / "dance.mp4", [np.full((32, 32, 3), 90, np.uint8)] * 6, fps=8)
    files = {"image": tmp_path / "person.png", "video": tmp_path / "dance.mp4"}
    return {name: (path.name, path.read_bytes()) for name, path in files.items()}


def test_every_route_but_health_wants_the_key(client, form) -> None:
    guarded = client(api_key=KEY, local_only=False)
    assert guarded.get("/healthz").status_code == 200
    paths = guarded.get("/openapi.json").json()["paths"]
    routes = [(m, p) for p, methods in paths.items() for m in methods if p.startswith("/v1")]
    assert len(routes) == 5
    for method, path in routes:
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
            response = guarded.request(method, path, headers=header)
            assert response.status_code == 401, (method, path)
            assert response.headers["www-authenticate"] == "Bearer"
    right = {"Authorization": f"Bearer {KEY}"}
    assert guarded.post("/v1/videos", files=form, headers=right).status_code == 201


def test_health_tells_the_settings_but_no_paths_of_the_server(client) -> None:
    plain = client().get("/healthz").json()
    assert (plain["preset"], plain["changes"]) == (None, [])
    changes = ("sampling.churn=40", "provenance.key = /etc/keys/secret.pem")
    told = client(preset="fast", changes=changes).get("/healthz").json()
    assert (told["preset"], told["changes"]) == ("fast", ["sampling.churn=40"])


def test_files_of_settings_mean_the_same_in_another_working_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    changes = ("provenance.key=key.pem", "sampling.churn=40")
    config = ServerConfig(model_dir=Path("model"), data_dir=Path("jobs"), changes=changes)
    absolute = config.absolute()
    assert (absolute.model_dir, absolute.data_dir) == (tmp_path / "model", tmp_path / "jobs")
    assert absolute.changes == (f"provenance.key={tmp_path / 'key.pem'}", "sampling.churn=40")


def test_an_acknowledged_job_has_its_files_and_row(client, form, store, tmp_path) -> None:
    video = client().post("/v1/videos", files=form).json()
    folder = tmp_path / "data" / "uploads" / video["id"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: content for name, (_, content) in form.items()
    }
    assert JobStore(tmp_path / "data" / "jobs.sqlite3").get(video["id"]) == store.get(video["id"])


def test_keypoints_may_come_with_the_files(client, form, tmp_path) -> None:
    score = np.ones((1, 1, 18), np.float32)
    good, bad = tmp_path / "good.npz", tmp_path / "bad.npz"
    np.savez(good, keypoints=np.full((1, 1, 18, 2), 0.5, np.float32), score=score)
    np.savez(bad, keypoints=np.array([{"a": 1}], dtype=object), score=score)
    given = {**form, "image_pose": ("x.npz", good.read_bytes())}
    video = client().post("/v1/videos", files=given)
    assert video.status_code == 201
    folder = tmp_path / "data" / "uploads" / video.json()["id"]
    assert (folder / "image.pose.npz").read_bytes() == good.read_bytes()
    spoilt = {**form, "video_pose": ("x.npz", bad.read_bytes())}
    response = client().post("/v1/videos", files=spoilt)
    assert response.status_code == 422
    assert "video.pose.npz: not a keypoints file" in response.json()["detail"]


def test_a_full_queue_asks_to_come_back(client, form) -> None:
    small = client(max_queued=1)
    assert small.post("/v1/videos", files=form).status_code == 201
    response = small.post("/v1/videos", files=form)
    assert (response.status_code, response.headers["retry-after"]) == (429, "30")


def test_too_many_or_too_slow_uploads_are_turned_away(client, form, tmp_path) -> None:
    response = client(limits=UploadLimits(at_once=0)).post("/v1/videos", files=form)
    assert response.status_code == 429
    assert "uploads are under way" in response.json()["detail"]
    response = client(limits=UploadLimits(seconds=0)).post("/v1/videos", files=form)
    assert (response.status_code, response.json()["title"]) == (408, "Request Timeout")
    assert not list((tmp_path / "data" / "incoming").iterdir())


def test_a_repeated_key_keeps_one_copy_of_the_files(client, form, tmp_path) -> None:
    headers = {"Idempotency-Key": "k"}
    ids = {client().post("/v1/videos", files=form, headers=headers).json()["id"] for _ in range(3)}
    assert {path.name for path in (tmp_path / "data" / "uploads").iterdir()} == ids
    long = client().post("/v1/videos", files=form, headers={"Idempotency-Key": "k" * 256})
    assert long.status_code == 400


def test_video_limits_are_those_of_the_server(client, form) -> None:
    strict = client(limits=UploadLimits(video_seconds=0.5, image_pixels=48 * 64))
    response = strict.post("/v1/videos", files=form)
    assert response.status_code == 422
    assert "lasts" in response.json()["detail"]
    response = client(limits=UploadLimits(image_pixels=100)).post("/v1/videos", files=form)
    assert "48x64, expected at most 100 pixels" in response.json()["detail"]


def test_an_unexpected_error_tells_nothing_of_the_inside(client, store) -> None:
    store.close()
    response = client().get("/v1/videos")
    assert response.status_code == 500
    assert response.headers["content-type"] == "application/problem+json"
    assert "sqlite" not in response.text.lower()


def test_a_removed_video_is_gone_not_pending(client, form, store, tmp_path) -> None:
    video = client().post("/v1/videos", files=form).json()
    job = store.claim("boot/engine-0", 60)
    path = tmp_path / "data" / "videos" / f"{job.id}.mp4"
    store.complete(job, lambda: path.write_bytes(b"a video"))
    assert client().get(f"/v1/videos/{video['id']}/content").content == b"a video"
    path.unlink()
    assert client().get(f"/v1/videos/{video['id']}/content").status_code == 410
