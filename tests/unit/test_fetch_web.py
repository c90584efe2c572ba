"""Videos from the web, each fetched by a real guarded process from a real server."""

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from pipelines.curation import fetch_hosts
from pipelines.curation.config import DownloadConfig
from pipelines.curation.fetch import Fetched, FetchError, discard, fetch
from pipelines.curation.plan import source_id
from pipelines.video_encode import encode
from tests.unit.fetch_server import Answer, WebServer

PAGE = b"<!doctype html><html><head><title>A dance</title></head><body>%s</body></html>"
Get = Callable[..., Fetched]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small real video."""
    path = tmp_path_factory.mktemp("video") / "video.mp4"
    noise = np.random.default_rng(0).integers(0, 256, (8, 120, 160, 3), np.uint8)
    encode(path, noise, fps=8)
    return path.read_bytes()


@pytest.fixture
def server() -> Iterator[WebServer]:
    server = WebServer()
    yield server
    server.close()


@pytest.fixture
def get(tmp_path: Path, server: WebServer) -> Get:
    """Fetch an address of the server, which alone is allowed."""

    def get_(url: str, *, deadline: float | None = None, sha256: str | None = None, **settings):
        settings = {"backoff_seconds": 0.05, "allow_hosts": (server.host,), **settings}
        return fetch(
            url,
            tmp_path / "downloads",
            DownloadConfig(**settings),
            base=tmp_path,
            expected_sha256=sha256,
            deadline=deadline,
        )

    return get_


def left(folder: Path) -> list[str]:
    """What lies in the folder of downloads."""
    downloads = folder / "downloads"
    return sorted(path.name for path in downloads.iterdir()) if downloads.exists() else []


def refused(get: Get, url: str, kind: str, **settings) -> str:
    with pytest.raises(FetchError) as caught:
        get(url, **settings)
    assert caught.value.kind == kind
    return str(caught.value)


def test_the_video_of_a_page_comes_with_where_it_is_from_and_is_fetched_once(
    get: Get, server: WebServer, video: bytes, tmp_path: Path
) -> None:
    server.serve("/dance.mp4", Answer(video))
    page = PAGE % b'<video src="/dance.mp4"></video>'
    url = server.serve("/page", Answer(page, type="text/html"))
    first = get(url)
    assert first.path.read_bytes() == video
    assert first.temporary
    assert first.bytes == len(video)
    assert first.sha256 == hashlib.sha256(video).hexdigest()
    assert {name: first.provenance[name] for name in ("uri", "page_url", "extractor")} == {
        "uri": url,
        "page_url": url,
        "extractor": "html5",
    }
    assert "dance" in first.provenance["title"]
    assert first.provenance["fetched_at"].endswith("+00:00")
    name = source_id(url)
    assert left(tmp_path) == [f"{name}.bin", f"{name}.json"]
    asked = len(server.requests)
    assert get(url) == first
    assert get(url, sha256=first.sha256) == first
    assert len(server.requests) == asked
    # What has other bytes than expected is looked for once more, and is not kept.
    assert "expected 0000000000000000" in refused(get, url, "permanent", sha256="0" * 64)
    assert len(server.requests) > asked
    assert left(tmp_path) == []


@pytest.mark.parametrize("to", ["http://localhost:{port}/video", "file://{file}"])
def test_a_redirect_may_not_lead_to_private_places(
    get: Get, server: WebServer, video: bytes, tmp_path: Path, to: str
) -> None:
    private = WebServer()
    private.serve("/video", Answer(video))
    (tmp_path / "secret.mp4").write_bytes(video)
    target = to.format(port=private.port, file=tmp_path / "secret.mp4")
    url = server.serve("/away", Answer(status=302, headers={"Location": target}))
    message = refused(get, url, "permanent")
    assert "expected a public address" in message or "redirects to where it may not" in message
    assert str(tmp_path) not in message
    assert private.requests == []
    assert left(tmp_path) == []
    private.close()


def test_private_addresses_are_not_asked(get: Get, server: WebServer, tmp_path: Path) -> None:
    url = server.serve("/video", Answer(b"x"))
    message = refused(get, url, "permanent", allow_hosts=())
    assert message.startswith(f"{url} leads to 127.0.0.1, expected a public address")
    assert "download.allow_hosts" in message
    assert server.requests == []


@pytest.mark.parametrize("segment", ["http://{private}/0.ts", "file://{file}"])
def test_a_playlist_may_not_lead_to_private_places(
    get: Get, server: WebServer, video: bytes, tmp_path: Path, segment: str
) -> None:
    private = WebServer()
    private.serve("/0.ts", Answer(video))
    (tmp_path / "secret.ts").write_bytes(video)
    line = segment.format(private=private.host, file=tmp_path / "secret.ts")
    text = f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{line}\n#EXT-X-ENDLIST\n"
    url = server.serve("/list.m3u8", Answer(text.encode(), type="application/vnd.apple.mpegurl"))
    message = refused(get, url, "permanent", retries=0)
    assert str(tmp_path) not in message.replace(url, "")
    assert private.requests == []
    assert left(tmp_path) == []
    private.close()


def test_a_body_that_never_ends_is_cut_off_at_the_cap(
    get: Get, server: WebServer, tmp_path: Path
) -> None:
    url = server.serve("/big.mp4", Answer(bytes(40 << 20), says_length=False, drip=0.001))
    message = refused(get, url, "permanent", max_bytes=1 << 20)
    assert message == (
        f"{url} is larger than 1048576 bytes: leave it out or raise download.max_bytes."
    )
    assert left(tmp_path) == []


def test_a_server_that_drips_meets_the_deadline(
    get: Get, server: WebServer, video: bytes, tmp_path: Path
) -> None:
    url = server.serve("/slow.mp4", Answer(video, drip=0.1, piece=20))
    started = time.monotonic()
    assert "took longer" in refused(get, url, "transient", timeout_seconds=2.5)
    assert time.monotonic() - started < 20  # the whole would take minutes
    assert left(tmp_path) == []


def test_what_passes_is_tried_again_after_the_time_the_server_asks_for(
    get: Get, server: WebServer, video: bytes
) -> None:
    busy = Answer(status=503, headers={"Retry-After": "1"})
    url = server.serve("/busy.mp4", busy, Answer(video))
    started = time.monotonic()
    assert get(url).bytes == len(video)
    assert time.monotonic() - started > 1
    assert len(server.paths()) == 3  # the refusal, the look, the download


def test_what_does_not_pass_is_not_tried_again(get: Get, server: WebServer) -> None:
    assert "is not there (HTTP 404)" in refused(get, server.url("/none.mp4"), "permanent")
    assert server.paths() == ["/none.mp4"]


def test_a_broken_transfer_goes_on_where_it_broke_off(
    get: Get, server: WebServer, video: bytes, tmp_path: Path
) -> None:
    half = Answer(video, cut=len(video) // 2)
    url = server.serve("/once.mp4", half, half, Answer(video))
    assert get(url).path.read_bytes() == video
    assert server.requests[-1][2]["range"] == f"bytes={len(video) // 2}-"
    discard(tmp_path / "downloads", source_id(url))
    assert left(tmp_path) == []


def test_a_killed_fetch_leaves_nothing_that_counts_and_ends_with_its_child(
    get: Get, server: WebServer, video: bytes, tmp_path: Path
) -> None:
    url = server.serve("/video.mp4", Answer(video, drip=0.2, piece=500))
    script = (
        "import sys; from pathlib import Path; from pipelines.curation.fetch import fetch; "
        "from pipelines.curation.config import DownloadConfig as C; "
        "fetch(sys.argv[1], Path(sys.argv[2]), C(allow_hosts=(sys.argv[3],)), base=Path('.'))"
    )
    folder = tmp_path / "downloads"
    process = subprocess.Popen(
        [sys.executable, "-c", script, url, str(folder), server.host],
        cwd=Path(__file__).resolve().parents[2],
    )
    _wait_for(lambda: any(folder.glob(".*.part/*.part")))
    process.send_signal(signal.SIGKILL)
    process.wait()
    (part,) = folder.glob(".*.part/*.part")
    _wait_for(lambda: not _users_of(part.parent))
    server.serve("/video.mp4", Answer(video))
    assert get(url).path.read_bytes() == video
    assert left(tmp_path) == [f"{source_id(url)}.bin", f"{source_id(url)}.json"]


def test_cookies_go_to_their_host_and_nothing_else_of_the_machine_is_used(
    get: Get, server: WebServer, video: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cookies = tmp_path / "cookies.txt"
    text = "# Netscape HTTP Cookie File\n127.0.0.1\tFALSE\t/\tFALSE\t0\twho\tme\n"
    text += "other.test\tFALSE\t/\tFALSE\t0\tsecret\tyes\n"
    cookies.write_text(text)
    plugins = tmp_path / "home" / ".yt-dlp" / "plugins" / "evil" / "yt_dlp_plugins" / "extractor"
    plugins.mkdir(parents=True)
    (plugins / "evil.py").write_text(f"open({str(tmp_path / 'evil')!r}, 'w')")
    for name, value in {
        "HOME": str(tmp_path / "home"),
        "http_proxy": "http://127.0.0.1:9",
        "ALL_PROXY": "socks5://127.0.0.1:9",
        "SSLKEYLOGFILE": str(tmp_path / "keys"),
    }.items():
        monkeypatch.setenv(name, value)
    url = server.serve("/video.mp4", Answer(video, headers={"Set-Cookie": "new=1"}))
    assert get(url, cookies_file=str(cookies)).bytes == len(video)
    assert server.requests[0][2]["cookie"] == "who=me"
    assert cookies.read_text() == text
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("content", ["[]", None])
def test_a_cookies_file_that_is_none_is_an_error_of_its_own(
    get: Get, server: WebServer, tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "cookies.txt").write_text(content)
    url = server.serve("/video.mp4", Answer(b"x"))
    message = refused(get, url, "permanent", cookies_file=str(tmp_path / "cookies.txt"))
    assert "download.cookies_file" in message
    assert "Netscape" in message
    assert str(tmp_path) not in message
    assert server.requests == []


def test_a_page_that_unpacks_to_more_than_memory_holds_is_refused(
    get: Get, server: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.curation.fetch_web.MAX_MEMORY", 256 << 20)
    packer = zlib.compressobj(1, wbits=31)
    bomb = b"".join(packer.compress(bytes(32 << 20)) for _ in range(10)) + packer.flush()
    page = Answer(bomb, type="text/html", headers={"Content-Encoding": "gzip"})
    message = refused(get, server.serve("/page", page), "permanent")
    assert "needs more memory" in message


def test_a_host_whose_places_are_taken_is_not_asked(get: Get, server: WebServer) -> None:
    url = server.serve("/video.mp4", Answer(b"x"))
    with fetch_hosts.slot(server.host, 1, None):
        message = refused(get, url, "transient", per_host=1, deadline=time.monotonic() + 0.5)
    assert "waited too long" in message
    assert server.requests == []


def _wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def _users_of(folder: Path) -> list[str]:
    """Processes that work in the folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(entry / "cwd").startswith(str(folder)):
                found.append(entry.name)
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    "address",
    [
        "http://",
        "http:///video.mp4",
        "http://host:port/",
        "http://host/#__youtubedl_smuggle=%7B%22a%22%3A1%7D",
        "http://ho st/",
        "http://host/\n",
    ],
)
def test_what_is_no_address_is_refused(get: Get, address: str) -> None:
    assert "is no address" in refused(get, address, "permanent")


def test_messages_leave_out_credentials(get: Get) -> None:
    url = "ftp://user:secret@example.test/video.mp4?token=secret"
    assert "secret" not in refused(get, url, "permanent")
    assert "secret" not in refused(get, url.replace("ftp", "http", 1) + " ", "permanent")


def test_a_wrong_allowed_host_is_named(get: Get) -> None:
    message = refused(get, "http://example.test/", "permanent", allow_hosts=("http://a/",))
    assert "download.allow_hosts has 'http://a/'" in message


def test_a_full_disk_stops_the_run_and_is_no_fault_of_the_source(server, tmp_path):
    apart = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*apart, "true"], check=False).returncode:
        pytest.skip("needs a file system of its own")
    noise = os.urandom(1 << 20)
    url = server.serve("/a.mp4", Answer(b"\0\0\0\x18ftypmp42" + noise, type="video/mp4"))
    code = (
        "import sys; from pathlib import Path\n"
        "from pipelines.curation.config import DownloadConfig\n"
        "from pipelines.curation.fetch import fetch\n"
        "config = DownloadConfig(backoff_seconds=0.05, allow_hosts=(sys.argv[2],))\n"
        "folder = Path(sys.argv[3]) / 'downloads'\n"
        "try:\n"
        "    fetch(sys.argv[1], folder, config, base=folder)\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, getattr(error, 'errno', None), error)\n"
    )
    small = tmp_path / "small"
    small.mkdir()
    fetching = [sys.executable, "-c", code, url, server.host, str(small)]
    script = 'mount -t tmpfs -o size=256k tmpfs "$0" && exec "$@"'
    done = subprocess.run(
        [*apart, "sh", "-c", script, str(small), *fetching],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith(f"OwnFileError {errno.ENOSPC} "), done
    assert "make room" in done.stdout
    assert server.host in done.stdout
