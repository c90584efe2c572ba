"""What is taken of a site and what is refused, by yt-dlp itself against a real server."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from pipelines.curation import fetch_errors, fetch_site
from pipelines.video_encode import encode
from tests.unit.fetch_server import Answer, WebServer

LIST = "application/vnd.apple.mpegurl"
Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def server() -> Iterator[WebServer]:
    server = WebServer()
    yield server
    server.close()


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    """What the fetching process answers, without its guard."""

    def ask_(url: str, **limits: Any) -> dict[str, Any]:
        request = {
            **{"url": url, "folder": str(tmp_path), "max_bytes": 1 << 20, "max_seconds": 60.0},
            **{"max_height": 1080, "rate_limit": 0, "socket_timeout": 5.0, "backoff": 0.01},
            **{"retries": 1, "cookies": None, "own_certificates": False, **limits},
        }
        return fetch_site.fetch(request)

    return ask_


def segments(folder: Path, num: int) -> list[bytes]:
    """MPEG-TS files of half a second each."""
    found = []
    for number in range(num):
        source, target = folder / f"{number}.mp4", folder / f"{number}.ts"
        encode(source, [np.full((64, 64, 3), 40 * number, np.uint8)] * 4, fps=8)
        with av.open(str(source)) as read, av.open(str(target), "w", format="mpegts") as write:
            stream = write.add_stream_from_template(read.streams.video[0])
            for packet in read.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    write.mux(packet)
        found.append(target.read_bytes())
    return found


def playlist(*lines: str, seconds: float = 0.5, ended: bool = True) -> Answer:
    entries = "".join(f"#EXTINF:{seconds},\n{line}\n" for line in lines)
    text = f"#EXTM3U\n#EXT-X-TARGETDURATION:{seconds + 1:.0f}\n{entries}"
    return Answer((text + "#EXT-X-ENDLIST\n" * ended).encode(), type=LIST)


def test_a_stream_in_segments_is_joined_without_other_programs(
    ask: Ask, server: WebServer, tmp_path: Path
) -> None:
    (tmp_path / "parts").mkdir()
    parts = segments(tmp_path / "parts", 2)
    for number, part in enumerate(parts):
        server.serve(f"/{number}.ts", Answer(part))
    answer = ask(server.serve("/list.m3u8", playlist("0.ts", "1.ts")))
    assert "error" not in answer
    assert (tmp_path / fetch_site.OUTPUT).read_bytes() == b"".join(parts)


def test_a_missing_segment_is_no_hole_in_the_video(
    ask: Ask, server: WebServer, tmp_path: Path
) -> None:
    server.serve("/0.ts", Answer(b"G" * 188))
    answer = ask(server.serve("/list.m3u8", playlist("0.ts", "1.ts", "0.ts")))
    assert "error" in answer
    assert not (tmp_path / fetch_site.OUTPUT).exists()


def test_segments_together_meet_the_cap(ask: Ask, server: WebServer) -> None:
    server.serve("/0.ts", Answer(b"G" * 188_000))
    answer = ask(server.serve("/list.m3u8", playlist(*["0.ts"] * 9)))
    assert "larger than 1048576 bytes" in answer["error"]


def test_a_live_stream_is_refused(ask: Ask, server: WebServer) -> None:
    answer = ask(server.serve("/list.m3u8", playlist("0.ts", ended=False)))
    assert "is a live stream" in answer["error"]
    assert answer["kind"] == "permanent"


def test_a_long_video_is_refused_before_it_is_fetched(ask: Ask, server: WebServer) -> None:
    answer = ask(server.serve("/list.m3u8", playlist("0.ts", seconds=61.0)))
    assert "lasts 61 s, expected at most 60" in answer["error"]
    assert "/0.ts" not in server.paths()


def test_a_file_that_says_it_is_too_large_is_not_fetched(ask: Ask, server: WebServer) -> None:
    answer = ask(server.serve("/big.mp4", Answer(bytes(2 << 20))))
    assert "larger than 1048576 bytes" in answer["error"]
    assert answer["kind"] == "permanent"


def test_of_several_formats_the_best_within_the_limits_is_taken(
    ask: Ask, server: WebServer, tmp_path: Path
) -> None:
    sizes = ("640x360", "1080x1920", "1920x1080", "3840x2160")
    lines = "".join(
        f"#EXT-X-STREAM-INF:BANDWIDTH={1000 * (1 + rank)},RESOLUTION={size}\n{size}.m3u8\n"
        for rank, size in enumerate(sizes)
    )
    for size in sizes:
        server.serve(f"/{size}.m3u8", playlist(f"{size}.ts", seconds=2.0))
        server.serve(f"/{size}.ts", Answer(size.encode()))
    url = server.serve("/main.m3u8", Answer(f"#EXTM3U\n{lines}".encode(), type=LIST))
    taken = tmp_path / fetch_site.OUTPUT
    for lines, size in ((1080, "1920x1080"), (720, "640x360"), (4000, "3840x2160")):
        assert "error" not in ask(url, max_height=lines)
        assert taken.read_bytes() == size.encode()
        taken.unlink()
    answer = ask(url, max_height=200)
    assert "has at least 360 lines, expected at most 200" in answer["error"]


def test_a_page_of_several_videos_is_no_source(ask: Ask, server: WebServer) -> None:
    page = b"<!doctype html><html>%s</html>" % b"".join(
        b'<video src="/%d.mp4"></video>' % number for number in range(3)
    )
    answer = ask(server.serve("/page", Answer(page, type="text/html")))
    assert "is a list of several videos, expected one" in answer["error"]
    assert answer["kind"] == "permanent"
    assert server.paths() == ["/page"]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (Answer(b"<!doctype html><html>hello</html>", type="text/html"), "shows no video"),
        (Answer(b"ID3sound", type="audio/mpeg"), "has no picture"),
        (Answer(status=410), "is not there (HTTP 410)"),
        (Answer(status=403), "download.cookies_file=FILE"),
        (Answer(status=451), "legal reasons"),
        (Answer(status=400), "was refused (HTTP 400)"),
    ],
)
def test_lasting_refusals_are_permanent(
    ask: Ask, server: WebServer, answer: Answer, says: str
) -> None:
    said = ask(server.serve("/video", answer))
    assert says in said["error"]
    assert said["kind"] == "permanent"


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_passing_refusals_are_transient(ask: Ask, server: WebServer, status: int) -> None:
    said = ask(server.serve("/video", Answer(status=status, headers={"Retry-After": "7"})))
    assert said["kind"] == "transient"
    assert said["retry_after"] == (7.0 if status in (429, 503) else None)


@pytest.mark.parametrize("cut", [0, 500])
def test_a_transfer_that_always_breaks_off_is_never_whole(
    ask: Ask, server: WebServer, tmp_path: Path, cut: int
) -> None:
    said = ask(server.serve("/video.mp4", Answer(bytes(2000), cut=cut)))
    assert said["kind"] == "transient"
    assert said["retried"] == 1
    assert not (tmp_path / fetch_site.OUTPUT).exists()


def test_a_dead_server_is_transient_and_an_unknown_host_is_permanent(
    ask: Ask, server: WebServer
) -> None:
    server.close()
    assert ask(server.url("/video"))["kind"] == "transient"
    said = ask("http://nobody.invalid/video")
    # Which of the two a resolver says, where it does not answer itself, is its own affair.
    assert ("nobody knows" in said["error"]) == (said["kind"] == "permanent")


def test_a_file_address_on_a_page_is_not_followed(
    ask: Ask, server: WebServer, tmp_path: Path
) -> None:
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(b"secret")
    page = f'<!doctype html><html><video src="file://{secret}"></video></html>'
    said = ask(server.serve("/page", Answer(page.encode(), type="text/html")))
    assert said["kind"] == "permanent"
    assert not (tmp_path / fetch_site.OUTPUT).exists()


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        ("Sign in to confirm you’re not a bot. Use --cookies", "permanent", "cookies_file"),
        ("Private video. Sign in if you've been granted access", "permanent", "Private video"),
        ("Did not get any data blocks", "transient", "broke off"),
        ("unable to write data: [Errno 28] No space left on device", "transient", "make room"),
        ("unable to write data: [Errno 27] File too large", "permanent", "download.max_bytes"),
    ],
)
def test_what_is_only_said_in_words_is_understood(text: str, kind: str, says: str) -> None:
    found = fetch_errors.by_exception(RuntimeError(f"ERROR: [site] abc: {text}"))
    assert found.kind == kind
    assert says in str(found)


def test_what_a_page_says_stays_one_short_line() -> None:
    text = fetch_errors.plain(f"\x1b[0;31mERROR:\x1b[0m [site] a\nb\x07\t{'x' * 999}")
    assert text.startswith("a b xxx")
    assert len(text) == 200


def test_a_moment_to_come_back_is_understood_as_seconds_and_as_a_date() -> None:
    assert fetch_site._seconds("12") == 12
    assert fetch_site._seconds("Wed, 01 Jan 2020 00:00:00 GMT") == 0
    assert fetch_site._seconds("soon") is None
    assert fetch_site._seconds(None) is None
