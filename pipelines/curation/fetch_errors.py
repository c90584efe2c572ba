"""Why a source could not be fetched, and whether trying again may help."""

import errno
import re
import socket
import ssl
from collections.abc import Iterator
from typing import Any, Literal

from pipelines.curation.machine import OWN_FILE_ERRORS

Kind = Literal["permanent", "transient", "machine"]

_MAX_TEXT = 200
_PASSING_STATUS = (408, 425, 429)
_LOST_HOSTS = {
    code
    for name in ("EAI_NONAME", "EAI_NODATA", "EAI_FAIL")
    if (code := getattr(socket, name, None)) is not None
}
# What a cloud's own client makes of refusals: asking again brings the same.
LASTING = {
    code
    for name in ("EINVAL", "EPERM", "ENOSYS", "EREMCHG", "ENAMETOOLONG", "EMSGSIZE")
    if (code := getattr(errno, name, None)) is not None
}
_BOT_CHECK = re.compile(r"not a (ro)?bot|sign in to confirm|log ?in required|login required", re.I)
# What yt-dlp only says in words.
_CUT_SHORT = re.compile(r"did not get any data|file is empty|content too short|more expected", re.I)
_NO_ROOM = re.compile(r"no space left|disk quota", re.I)
_TOO_LARGE = re.compile(r"file too large", re.I)
_COOKIES = "give cookies of a browser that is signed in (--set download.cookies_file=FILE)"


class FetchError(ValueError):
    """A source that could not be fetched.

    kind: `permanent` errors stay however often one tries; `transient` ones may pass; `machine` is
        no fault of the source: nothing more can be stored here.
    retry_after: seconds for which the server asked to be left alone.
    """

    def __init__(
        self, message: str, kind: Kind = "permanent", *, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.kind: Kind = kind
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (str(self), self.kind, self.retry_after)


def _rebuilt(message: str, kind: Kind, retry_after: float | None) -> FetchError:
    return FetchError(message, kind, retry_after=retry_after)


def by_status(status: int) -> FetchError | None:
    """What an HTTP status means; None where it is no error."""
    if status < 300:
        return None
    if status < 400:
        return FetchError("redirects to where it may not: give the address it should lead to")
    if status in (404, 410):
        return FetchError(f"is not there (HTTP {status}): check the address or leave it out")
    if status in (401, 403):
        return FetchError(f"is not open to everyone (HTTP {status}): {_COOKIES}, or leave it out")
    if status == 451:
        return FetchError("is withheld here for legal reasons (HTTP 451): leave it out")
    if status in _PASSING_STATUS or status >= 500:
        return FetchError(f"was not served just now (HTTP {status}): try again later", "transient")
    return FetchError(f"was refused (HTTP {status}): check the address")


def by_exception(error: BaseException) -> FetchError:
    """What a failure of yt-dlp, of fsspec or of the network means."""
    chain = list(causes(error))
    for link in chain:
        if isinstance(link, FetchError):
            return link
        known = _by_type(link)
        if known is not None:
            return known
    text = plain(str(getattr(error, "msg", None) or error))
    if _BOT_CHECK.search(text):
        return FetchError(f"asks who is there ({text}): {_COOKIES}")
    if _TOO_LARGE.search(text):
        return too_large(None)
    if _NO_ROOM.search(text):
        # Only in words, which may be a page's own: no reason to stop the run.
        return FetchError("could not be stored (no space left): make room", "transient")
    if _CUT_SHORT.search(text):
        return FetchError(f"broke off ({text}): try again later", "transient")
    for link in chain:
        if type(link).__name__ == "UnsupportedError":
            return FetchError("shows no video that is known how to get: give the video's address")
        # yt-dlp's network errors are no OSErrors; everything else it raises is a verdict.
        if type(link).__name__ in _PASSING_NAMES:
            return FetchError(f"broke off ({text}): try again later", "transient")
    return FetchError(f"cannot be fetched: {text}")


# Network errors of yt-dlp, aiohttp, botocore and fsspec that derive from nothing common.
_PASSING_NAMES = {
    *("TransportError", "IncompleteRead", "ProxyError", "SSLError", "ContentTooShortError"),
    *("ClientPayloadError", "ServerDisconnectedError", "ClientConnectionError"),
    *("EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "HTTPClientError"),
    *("ConnectionClosedError", "ResponseParserError", "ResponseStreamingError", "FSTimeoutError"),
    *("TransportQueryError", "RetryError", "ServerTimeoutError", "ClientConnectorError"),
}


def _by_type(error: BaseException) -> FetchError | None:
    name = type(error).__name__
    if name in ("HTTPError", "HttpError"):
        status = str(getattr(error, "status", None) or getattr(error, "code", None) or "")
        found = by_status(int(status)) if status.isdigit() else None
        if found is not None:
            return found
    if name == "GeoRestrictedError":
        return FetchError("is not shown in this country: leave it out, or run where it is shown")
    if isinstance(error, MemoryError):
        return FetchError("needs more memory than a download may take: leave it out")
    if isinstance(error, ssl.SSLCertVerificationError) or name == "CertificateVerifyError":
        return FetchError("has no valid certificate: check the address, or SSL_CERT_FILE")
    if isinstance(error, socket.gaierror):
        if error.errno in _LOST_HOSTS:
            return FetchError("has a host that nobody knows: check the address")
        return FetchError("has a host that could not be looked up: try again later", "transient")
    if isinstance(error, OSError) and error.errno in OWN_FILE_ERRORS:
        return no_room(error)
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        return too_large(None)
    if isinstance(error, ConnectionError | TimeoutError) and not isinstance(error, ssl.SSLError):
        reason = plain(error.strerror or str(error)) or "no answer"
        return FetchError(f"was not reached ({reason}): try again later", "transient")
    return None


def too_large(max_bytes: int | None) -> FetchError:
    """The source has more bytes than are allowed."""
    limit = "the allowed size" if max_bytes is None else f"{max_bytes} bytes"
    return FetchError(f"is larger than {limit}: leave it out or raise download.max_bytes")


def no_room(error: OSError) -> FetchError:
    """The download folder cannot be written into."""
    kind = "machine" if error.errno in OWN_FILE_ERRORS else "transient"
    return FetchError(f"could not be stored ({error.strerror}): make room and try again", kind)


def causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and what it was raised from, the nearest first."""
    seen: set[int] = set()
    waiting: list[Any] = [error]
    while waiting:
        link = waiting.pop(0)
        if not isinstance(link, BaseException) or id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        # yt-dlp keeps the first cause in `exc_info`, urllib in `reason`.
        inner = getattr(link, "exc_info", None) or (None, None)
        waiting += [getattr(link, "cause", None), inner[1], getattr(link, "reason", None)]
        waiting += [*getattr(link, "unexpected_errors", ()), link.__cause__, link.__context__]


def plain(text: str) -> str:
    """One short line for people, of what a library or a stranger's page says."""
    text = re.sub(r"\x1b\[[0-9;]*m|\(caused by .*", "", text, flags=re.S)
    text = re.sub(r"[;,.]?\s*(please report this issue|See {2}https?://|Use --).*", "", text)
    text = re.sub(r"^(ERROR:\s*)?(\[[\w:+.-]+\]\s*)?", "", " ".join(text.split()))
    text = "".join(sign for sign in text if sign.isprintable()).strip().rstrip(".:;,")
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1] + "…"
