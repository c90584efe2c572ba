"""Local sources, politeness between processes, and what counts as a finished download."""

import hashlib
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines.curation import fetch_hosts, fetch_store
from pipelines.curation.config import DownloadConfig
from pipelines.curation.fetch import FetchError, fetch, is_remote, published
from pipelines.curation.fetch_attempts import Attempts

CONFIG = DownloadConfig(max_bytes=1000, backoff_seconds=0.01, retries=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "downloads"


@pytest.fixture(autouse=True)
def own_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks of these tests alone."""
    (tmp_path / "locks").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "locks"))


def test_a_local_file_is_used_where_it_is(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "a dance?.mp4"
    path.write_bytes(b"video")
    for uri in (path.name, str(path)):
        fetched = fetch(uri, folder, CONFIG, base=tmp_path)
        assert (fetched.path, fetched.bytes, fetched.temporary) == (path, 5, False)
        assert fetched.provenance == {}
    sha256 = hashlib.sha256(b"video").hexdigest()
    assert fetch(path.name, folder, CONFIG, base=tmp_path, expected_sha256=sha256).sha256 == sha256
    assert not folder.exists()


def test_local_files_that_are_none_are_permanent_errors(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "big.mp4").write_bytes(bytes(1001))
    (tmp_path / "wrong.mp4").write_bytes(b"video")
    os.mkfifo(tmp_path / "pipe.mp4")
    says = {
        "none.mp4": "none.mp4 cannot be read (No such file or directory): check the path",
        ".": "is no regular file",
        "pipe.mp4": "is no regular file",
        "big.mp4": "is larger than 1000 bytes: leave it out or raise download.max_bytes",
        "wrong.mp4": "expected 0000000000000000…: it is another file than was listed",
        "nul\0.mp4": "cannot be read",
        "file:///etc/passwd": "has the scheme file, which is not fetched: give the path itself",
        "ftp://host/x": "expected http, https, s3 or gs",
        "memory://x": "expected http, https, s3 or gs",
    }
    for uri, text in says.items():
        with pytest.raises(FetchError) as caught:
            fetch(uri, folder, CONFIG, base=tmp_path, expected_sha256="0" * 64)
        assert text in str(caught.value)
        assert caught.value.kind == "permanent"
        assert str(tmp_path) not in str(caught.value)


def test_addresses_are_told_from_paths() -> None:
    assert is_remote("https://host/x")
    assert is_remote("S3://bucket/x")
    assert not is_remote("folder/http:/x.mp4")
    assert not is_remote("C:video.mp4")


def test_an_error_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(FetchError("no", "transient", retry_after=3.0)))
    assert (str(error), error.kind, error.retry_after) == ("no", "transient", 3.0)


def test_only_errors_that_may_pass_are_tried_again_with_growing_pauses() -> None:
    seen: list[float] = []

    def fail(kind):
        seen.append(time.monotonic())
        raise FetchError("no", kind)

    with pytest.raises(FetchError):
        Attempts(DownloadConfig(retries=2, backoff_seconds=0.1)).run(lambda: fail("transient"))
    assert len(seen) == 3
    assert seen[2] - seen[1] > 1.1 * (seen[1] - seen[0])
    with pytest.raises(FetchError):
        Attempts(CONFIG).run(lambda: fail("permanent"))
    assert len(seen) == 4
    # Nothing is waited for that comes after the deadline.
    with pytest.raises(FetchError):
        Attempts(DownloadConfig(), deadline=time.monotonic() + 1).run(lambda: fail("transient"))
    assert len(seen) == 5


def test_a_host_has_so_many_places_and_other_hosts_have_their_own(tmp_path: Path) -> None:
    inside, most = [], []

    def work(_: int) -> None:
        with fetch_hosts.slot("host", 2, None):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.05)
            inside.pop()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert max(most) == 2
    assert not list(tmp_path.glob("locks/*/*"))
    with fetch_hosts.slot("host", 1, None), fetch_hosts.slot("other", 1, None):
        with (
            pytest.raises(FetchError, match="waited too long"),
            fetch_hosts.slot("host", 1, time.monotonic() + 0.3),
        ):
            pass


def test_a_place_is_free_again_when_its_process_is_gone() -> None:
    child = os.fork()
    if child == 0:
        place = fetch_hosts.slot("host", 1, None)
        place.__enter__()
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    with fetch_hosts.slot("host", 1, time.monotonic()):
        pass


def test_a_host_that_asks_for_rest_is_left_alone_by_all() -> None:
    fetch_hosts.leave_alone("host", 0.5)
    started = time.monotonic()
    with (
        pytest.raises(FetchError, match="left alone") as caught,
        fetch_hosts.slot("host", 1, started + 0.2),
    ):
        pass
    assert caught.value.kind == "transient"
    with fetch_hosts.slot("host", 1, None):
        assert time.monotonic() - started > 0.45


def test_only_a_whole_download_with_its_record_counts(folder: Path) -> None:
    folder.mkdir()
    assert fetch_store.find(folder, "a", "uri") is None
    with fetch_store.attempt(folder, "a") as place:
        (place / "whole").write_bytes(b"video")
        kept = fetch_store.keep(folder, "a", place / "whole", {"uri": "uri"})
    assert fetch_store.find(folder, "a", "uri") == kept
    assert fetch_store.find(folder, "a", "other") is None
    record = folder / "a.json"
    text = record.read_text()
    for damaged in ("", "[]", "{}", text[:20]):
        record.write_text(damaged)
        assert fetch_store.find(folder, "a", "uri") is None
    record.write_text(text)
    (folder / "a.bin").write_bytes(b"vide")
    assert fetch_store.find(folder, "a", "uri") is None


def test_attempts_of_the_dead_are_removed_and_those_of_the_living_are_not(folder: Path) -> None:
    (folder / ".a.dead.part").mkdir(parents=True)
    (folder / ".b.dead.part").mkdir()
    with fetch_store.attempt(folder, "a") as mine, fetch_store.attempt(folder, "a") as theirs:
        assert mine.is_dir()
        assert theirs.is_dir()
        assert sorted(folder.iterdir()) == sorted([mine, theirs, folder / ".b.dead.part"])
    fetch_store.discard(folder, "b")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("uri", "read"),
    [
        ("https://site.org/watch?v=abc&list=7", "https://site.org/watch?v=abc&list=7"),
        ("https://me:pw@b.org:8443/a.mp4#t=3", "https://b.org:8443/a.mp4"),
        ("https://b.s3.amazonaws.com/a.mp4?X-Amz-Signature=f&X-Amz-Date=1", None),
        ("https://s.blob.net/a.mp4?sv=2024&se=2027&sr=b&sp=r&sig=f%2B", None),
        ("https://cdn.net/a.mp4?Expires=1&Signature=f&Key-Pair-Id=K", None),
        ("https://h.org/a.mp4?access_token=f&id=4", "https://h.org/a.mp4?id=4"),
        ("s3://bucket/a b#1.mp4", "s3://bucket/a b#1.mp4"),
        ("videos/what?.mp4", "videos/what?.mp4"),
    ],
)
def test_what_lets_one_in_is_not_published_and_what_names_a_video_is(uri: str, read: str) -> None:
    assert published(uri) == (read or uri.partition("?")[0])
