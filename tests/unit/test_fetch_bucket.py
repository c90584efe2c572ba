"""Objects of buckets through s3fs itself, from a small server that speaks S3."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from pipelines.curation.config import DownloadConfig
from pipelines.curation.fetch import Fetched, FetchError, fetch
from pipelines.curation.plan import source_id
from tests.unit.fetch_server import Answer, Bucket

Get = Callable[..., Fetched]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A bucket server, and a machine whose settings lead to it."""
    server = Bucket()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{server.host}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield server
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.close()


@pytest.fixture
def get(tmp_path: Path) -> Get:
    def get_(uri: str, *, deadline: float | None = None, **settings) -> Fetched:
        config = DownloadConfig(**{"backoff_seconds": 0.05, "retries": 2, **settings})
        return fetch(uri, tmp_path / "downloads", config, base=tmp_path, deadline=deadline)

    return get_


def refused(get: Get, uri: str, kind: str, **settings) -> str:
    with pytest.raises(FetchError) as caught:
        get(uri, **settings)
    assert caught.value.kind == kind
    return str(caught.value)


def test_an_object_is_copied_in_pieces_and_kept(
    bucket: Bucket, get: Get, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("pipelines.curation.fetch_bucket._PIECE", 1000)
    content = os.urandom(2500)
    bucket.put("/videos/a/b.mp4", Answer(content))
    uri = "s3://videos/a/b.mp4"
    started = time.monotonic()
    first = get(uri, rate_limit=5000)
    assert time.monotonic() - started > 0.4
    assert first.path.read_bytes() == content
    assert first.temporary
    assert first.provenance["uri"] == uri
    assert first.provenance["fetched_at"]
    asked = [headers["range"] for method, _, headers in bucket.requests if method == "GET"]
    assert asked == ["bytes=0-999", "bytes=1000-1999", "bytes=2000-2499"]
    assert get(uri) == first
    name = source_id(uri)
    found = sorted(path.name for path in (tmp_path / "downloads").iterdir())
    assert found == [f"{name}.bin", f"{name}.json"]


def test_lasting_refusals_are_permanent(bucket: Bucket, get: Get, tmp_path: Path) -> None:
    bucket.put("/videos/big.mp4", Answer(bytes(2000)))
    bucket.put("/videos/closed.mp4", bucket.refusal(403, "AccessDenied"))
    says = {
        "s3://videos/none.mp4": "is not there: check the bucket and the key",
        "s3://videos/closed.mp4": "may not be read: check this machine's credentials",
        "s3://videos/big.mp4": "is larger than 1000 bytes",
        "s3://a b/x.mp4": "",
        "s3://videos": "",
        "s3://": "",
    }
    for uri, text in says.items():
        message = refused(get, uri, "permanent", max_bytes=1000)
        assert message.startswith(uri)
        assert text in message
    assert list((tmp_path / "downloads").iterdir()) == []


def test_what_passes_is_tried_again(bucket: Bucket, get: Get) -> None:
    broken = Answer(b"video" * 100, cut=100)
    bucket.put("/videos/a.mp4", broken, Answer(b"video" * 100))
    assert get("s3://videos/a.mp4").path.read_bytes() == b"video" * 100


def test_an_object_that_always_breaks_off_is_never_done(
    bucket: Bucket, get: Get, tmp_path: Path
) -> None:
    bucket.put("/videos/a.mp4", Answer(b"video" * 100, cut=100))
    started = time.monotonic()
    refused(get, "s3://videos/a.mp4", "transient", retries=0, deadline=started + 1.5)
    assert time.monotonic() - started < 4
    assert list((tmp_path / "downloads").iterdir()) == []


def test_an_object_that_changes_meanwhile_is_not_taken(
    bucket: Bucket, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put("/videos/a.mp4", Answer(b"a" * 100), Answer(b"b" * 100, headers={"ETag": '"new"'}))
    assert "changed while" in refused(get, "s3://videos/a.mp4", "transient")


def test_without_credentials_the_message_says_so(
    bucket: Bucket, get: Get, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    message = refused(get, "s3://videos/a.mp4", "permanent")
    assert "needs credentials" in message
    assert "FSSPEC_S3_ANON=true" in message
