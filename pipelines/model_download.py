"""One file over HTTP: continued where it broke off, capped at its size, only from allowed places.

A file that is not whole yet is `NAME.part`, with `NAME.part.json` beside it: its address, its size
and the server's tag, by which a continued file is known to be the same one.
"""

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx

from pipelines.model_cache import SourceError, size_text, write_json
from pipelines.model_source import (
    Source,
    UnreachableError,
    check_address,
    check_peer,
    origin,
    shown,
)

MAX_REDIRECTS = 8
_TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)
OnBytes = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Published:
    """What a source says of a file before it is fetched; None where it says nothing."""

    size: int | None = None
    sha256: str | None = None
    git_id: str | None = None  # SHA-1 of "blob SIZE\\0" and the content
    revision: str | None = None  # the hub's commit


class _BrokeOffError(Exception):
    """The transfer ended early and may be continued."""


class Downloader:
    """A client for published files; use it as a context manager.

    `waits` are the seconds between attempts that brought nothing; their number bounds them.
    """

    def __init__(self, waits: tuple[float, ...] = (1.0, 3.0, 10.0), timeout: float = 60.0) -> None:
        self._waits = waits
        try:
            self._client = httpx.Client(
                timeout=httpx.Timeout(timeout, connect=20.0),
                # Compressed transfers can neither be continued nor capped.
                headers={"User-Agent": _user_agent(), "Accept-Encoding": "identity"},
                follow_redirects=False,
            )
        except (ImportError, ValueError) as error:  # a proxy that httpx cannot use
            raise SourceError(f"the proxy of the environment cannot be used: {error}") from None

    def __enter__(self) -> "Downloader":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def probe(self, source: Source) -> Published:
        """Ask for a file's size and digest without fetching it.

        Raises:
            UnreachableError: no connection.
            SourceError: the source refuses, or leads to where it may not.
        """
        answers: list[httpx.Response] = []

        def known_enough(answer: httpx.Response) -> bool:
            answers.append(answer)
            return "x-linked-size" in answer.headers and "x-linked-etag" in answer.headers

        for attempt in range(len(self._waits) + 1):
            answers.clear()
            try:
                with self._open("HEAD", source, {}, known_enough) as last:
                    if last.status_code not in _TRY_AGAIN:
                        break
                    reason = f"{source.host} answered {last.status_code}"
            except _BrokeOffError as error:
                reason = str(error)
            if attempt < len(self._waits):
                time.sleep(self._waits[attempt])
        else:
            raise SourceError(f"{reason}; try again later")
        if last.status_code in (403, 405, 501) and not source.hub:
            return Published()  # a server that knows no HEAD; the transfer itself will tell
        if last.status_code >= 400:
            raise _refusal(last, source)
        return _published(answers, last, source)

    def fetch(
        self, source: Source, part: Path, size: int, *, hashed: bool, on_bytes: OnBytes
    ) -> None:
        """Fetch `size` bytes into `part`, continuing what lies there.

        Args:
            hashed: the whole is verified by a digest afterwards, so that a server without tags
                may be asked for the rest too.
            on_bytes: told how many bytes are there.

        Raises:
            UnreachableError: no connection.
            SourceError: the source refuses, gives more or less than `size`, or breaks off again
                and again; what was fetched stays for the next attempt.
        """
        part.parent.mkdir(parents=True, exist_ok=True)
        idle = 0
        while True:
            before = _size(part)
            try:
                self._fetch_once(source, part, size, hashed, on_bytes)
                return
            except (_BrokeOffError, UnreachableError) as error:
                idle = 0 if _size(part) > before else idle + 1
                if idle >= len(self._waits):
                    if isinstance(error, UnreachableError):
                        raise
                    raise SourceError(
                        f"{shown(source.url)} broke off at {size_text(_size(part))} of "
                        f"{size_text(size)} ({error}); the same command continues there"
                    ) from None
                time.sleep(self._waits[idle])

    def _fetch_once(
        self, source: Source, part: Path, size: int, hashed: bool, on_bytes: OnBytes
    ) -> None:
        tag, offset = _resume_point(source, part, size, hashed)
        if offset == size:
            on_bytes(size)
            return
        wanted = {"Range": f"bytes={offset}-", **({"If-Range": tag} if tag else {})}
        with self._open("GET", source, wanted if offset else {}) as answer:
            if answer.status_code in _TRY_AGAIN:
                raise _BrokeOffError(f"{source.host} answered {answer.status_code}")
            if offset and not _continues(answer, offset, size, tag, hashed):
                tag, offset = None, 0
                if answer.status_code in (206, 416):  # not what was asked for: start again
                    part.unlink()
                    raise _BrokeOffError("the file changed")
            if answer.status_code not in (200, 206):
                raise _refusal(answer, source)
            _check_length(answer, source, size - offset)
            state = {
                "url": shown(source.url),
                "size": size,
                "etag": answer.headers.get("etag") or tag,
            }
            write_json(_state_path(part), state)
            self._receive(answer, part, offset, size, on_bytes)
        if _size(part) < size:
            raise _BrokeOffError("the transfer ended early")

    def _receive(
        self, answer: httpx.Response, part: Path, offset: int, size: int, on_bytes: OnBytes
    ) -> None:
        with part.open("ab" if offset else "wb") as file:
            try:
                # As it comes: a chunk size of our own would lose what was gathered when it breaks.
                for chunk in answer.iter_raw():
                    offset += len(chunk)
                    if offset > size:
                        raise SourceError(
                            f"{shown(str(answer.url))} sends more than the {size} bytes it has"
                        )
                    file.write(chunk)
                    on_bytes(offset)
            except httpx.TransportError as error:
                raise _BrokeOffError(str(error) or type(error).__name__) from None
            except OSError as error:
                raise SourceError(f"{part} cannot be written: {error.strerror}") from None
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def _open(
        self,
        method: str,
        source: Source,
        headers: dict[str, str],
        enough: Callable[[httpx.Response], bool] | None = None,
    ) -> Iterator[httpx.Response]:
        """The answer at the end of the redirects, or the first that is `enough`; unread."""
        url = source.url
        for _ in range(MAX_REDIRECTS):
            check_address(url, source)
            own = dict(headers)
            if source.token and origin(url) == origin(source.url):
                own["Authorization"] = f"Bearer {source.token}"
            answer = self._send(self._client.build_request(method, url, headers=own))
            try:
                stream = answer.extensions.get("network_stream")
                peer = stream.get_extra_info("server_addr") if stream is not None else None
                if peer:
                    check_peer(str(peer[0]), url, source)
                if (enough and enough(answer)) or not answer.has_redirect_location:
                    yield answer
                    return
                url = str(answer.url.join(answer.headers["location"]))
            except httpx.InvalidURL as error:
                raise SourceError(f"{shown(source.url)} leads to no address: {error}") from None
            finally:
                answer.close()
        raise SourceError(f"{shown(source.url)} redirects more than {MAX_REDIRECTS} times")

    def _send(self, request: httpx.Request) -> httpx.Response:
        try:
            return self._client.send(request, stream=True)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
            reason = str(error) or "no answer"
            raise UnreachableError(f"{request.url.host} could not be reached: {reason}") from None
        except httpx.TransportError as error:
            raise _BrokeOffError(str(error) or type(error).__name__) from None


def discard(part: Path) -> None:
    """Remove a part and what is known of it."""
    part.unlink(missing_ok=True)
    _state_path(part).unlink(missing_ok=True)


def forget(part: Path) -> None:
    """Remove what was known of a part that became whole."""
    _state_path(part).unlink(missing_ok=True)


def _state_path(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _resume_point(source: Source, part: Path, size: int, hashed: bool) -> tuple[str | None, int]:
    """The tag and the number of bytes to go on from; 0 where the part cannot be trusted."""
    tag = None
    try:
        state: Any = json.loads(_state_path(part).read_text())
        same = state["size"] == size
        if state["url"] == shown(source.url) and not str(state["etag"]).startswith("W/"):
            tag = state["etag"]
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    # Without a digest only the same server's tag says that the rest belongs to the same file.
    if not same or _size(part) > size or not (tag or hashed):
        discard(part)
        return None, 0
    return tag, _size(part)


def _continues(
    answer: httpx.Response, offset: int, size: int, tag: str | None, hashed: bool
) -> bool:
    if answer.status_code != 206:
        return False
    if not hashed and answer.headers.get("etag") != tag:
        return False
    span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", answer.headers.get("content-range", ""))
    return bool(span) and int(span[1]) == offset and span[3] in ("*", str(size))


def _check_length(answer: httpx.Response, source: Source, expected: int) -> None:
    where = shown(source.url)
    if answer.headers.get("content-encoding", "identity") != "identity":
        raise SourceError(f"{where} sends a compressed file, which was not asked for")
    length = answer.headers.get("content-length")
    if length is not None and int(length) != expected:
        raise SourceError(f"{where} has {length} bytes to send, expected {expected}")


def _published(answers: list[httpx.Response], last: httpx.Response, source: Source) -> Published:
    own = [answer for answer in answers if origin(str(answer.url)) == origin(source.url)]
    said: dict[str, str] = {}
    for answer in own if source.hub else []:
        said.update(answer.headers)
    length = said.get("x-linked-size") or last.headers.get("content-length")
    tag = (said.get("x-linked-etag") or said.get("etag") or "").removeprefix("W/").strip('"')
    return Published(
        size=int(length) if length and length.isdigit() else None,
        sha256=tag if re.fullmatch(r"[0-9a-f]{64}", tag) else None,
        git_id=tag if re.fullmatch(r"[0-9a-f]{40}", tag) else None,
        revision=said.get("x-repo-commit"),
    )


def _refusal(answer: httpx.Response, source: Source) -> SourceError:
    code, where = answer.status_code, shown(source.url)
    if source.hub and code in (401, 403):
        mend = "HF_TOKEN is set, but does not open it" if source.token else "then set HF_TOKEN"
        if source.token_withheld:
            mend = "HF_TOKEN is set, but never sent over http: name an https address in HF_ENDPOINT"
        return SourceError(
            f"{where} answered {code}: accept the licence on the model's page {source.page}, "
            f"make a token on https://huggingface.co/settings/tokens; {mend}"
        )
    return SourceError(f"{where} answered {code} {answer.reason_phrase}".rstrip())


def _user_agent() -> str:
    try:
        return f"animator/{metadata.version('stableanimator-pp')}"
    except metadata.PackageNotFoundError:
        return "animator"
