"""Bring a source to this machine: local files as they are, buckets and the web by download.

A download is kept as `ID.bin` with `ID.json` in the folder it was fetched to, so that it is there
for the next attempt at the same source; ID is the source's id, from its address.
"""

import errno
import hashlib
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from pipelines.curation import fetch_errors, fetch_store
from pipelines.curation.config import DownloadConfig
from pipelines.curation.fetch_attempts import Attempts
from pipelines.curation.fetch_errors import FetchError
from pipelines.curation.fetch_store import Kept
from pipelines.curation.machine import (
    MACHINE_ERRORS,
    OWN_FILE_ERRORS,
    PASSING_ERRORS,
    OwnFileError,
)
from pipelines.curation.plan import source_id
from pipelines.model_source import shown

__all__ = ["FetchError", "Fetched", "discard", "fetch", "is_remote", "published"]

_BUCKETS = ("s3", "gs")
_WEB = ("http", "https")
# Names of parameters by which clouds and sites let in whoever has the address.
_SECRET = re.compile(
    r"x-(amz|goog|oss|ms)-|sig(nature)?$|token|secret|passw|credential|policy|expires?$|auth|"
    r"key(id|-pair-id)?$|session|^(s[a-z]|st|se|hdn[a-z]+|hmac|jwt|sas)$",
    re.IGNORECASE,
)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A source on this machine.

    provenance: uri, page_url, extractor, uploader, licence, title, upload_date (YYYY-MM-DD) and
        fetched_at (UTC), as far as known; empty for local files.
    temporary: a download, which is the caller's to `discard` when its work is done.
    sha256: of the bytes, where they had to be read anyway.
    """

    path: Path
    bytes: int
    temporary: bool
    provenance: dict[str, Any] = field(default_factory=dict)
    sha256: str | None = None


def is_remote(uri: str) -> bool:
    """Whether a source is an address (`SCHEME://…`), not a file of this machine."""
    return _SCHEME.match(uri) is not None


def published(uri: str) -> str:
    """An address as others may read it: without a password, a fragment, and what signs a request.

    What names the video stays, such as `?v=…`; the whole address is in the plan alone.
    """
    scheme = _SCHEME.match(uri)
    if scheme is None or scheme[1].lower() not in _WEB:
        return uri
    try:
        parts = urlsplit(uri)
        place = parts.netloc.rpartition("@")[2]
    except ValueError:
        return uri.partition("?")[0]
    kept = [part for part in parts.query.split("&") if not _SECRET.search(part.partition("=")[0])]
    return urlunsplit((parts.scheme, place, parts.path, "&".join(kept), ""))


def fetch(
    uri: str,
    folder: Path,
    config: DownloadConfig,
    *,
    base: Path,
    expected_sha256: str | None = None,
    deadline: float | None = None,
) -> Fetched:
    """Bring one source here.

    Args:
        uri: a path, from `base` where it is relative, or an address: http(s), s3, gs.
        folder: where downloads go; made where it is missing.
        expected_sha256: of the bytes, where it is known.
        deadline: of `time.monotonic()`; waiting for other downloads from the same host counts,
            which it does not in `config.timeout_seconds`.

    Raises:
        FetchError: its `kind` says whether trying again may help. The message is one sentence that
            names the source without credentials, and no other path of this machine.
        OSError: this machine is in trouble, such as a full disk, whatever the source.
    """
    scheme = _SCHEME.match(uri)
    expected_sha256 = expected_sha256.lower() if expected_sha256 else None
    try:
        if scheme is None:
            return _local(base / uri, config, expected_sha256)
        return _remote(uri, scheme[1].lower(), folder, config, expected_sha256, deadline)
    except FetchError as error:
        named = f"{_named(uri)} {error}."
        if error.kind == "machine":
            raise OwnFileError(errno.ENOSPC, named) from None
        raise FetchError(named, error.kind, retry_after=error.retry_after) from None
    except OSError as error:  # of the download folder; what was fetched from has its own
        if error.errno in OWN_FILE_ERRORS:
            raise
        lost = fetch_errors.no_room(error)
        raise FetchError(f"{_named(uri)} {lost}.", lost.kind) from None


def discard(folder: Path, name: str) -> None:
    """Remove the download with that id, finished or not."""
    fetch_store.discard(folder, name)


def _local(path: Path, config: DownloadConfig, expected_sha256: str | None) -> Fetched:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise FetchError("is no regular file, expected a video file")
        if status.st_size > config.max_bytes:
            raise fetch_errors.too_large(config.max_bytes)
        sha256 = None
        if expected_sha256 is not None:
            with path.open("rb") as stream:
                sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            _check_digest(sha256, expected_sha256)
    except (OSError, ValueError) as error:
        number = getattr(error, "errno", None)
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, FetchError) or number in MACHINE_ERRORS:
            raise
        if number in PASSING_ERRORS:
            raise FetchError(f"cannot be read just now ({reason})", "transient") from None
        raise FetchError(f"cannot be read ({reason}): check the path on this machine") from None
    return Fetched(path=path, bytes=status.st_size, temporary=False, sha256=sha256)


def _remote(
    uri: str,
    scheme: str,
    folder: Path,
    config: DownloadConfig,
    expected_sha256: str | None,
    deadline: float | None,
) -> Fetched:
    if scheme not in (*_BUCKETS, *_WEB):
        mend = "give the path itself" if scheme == "file" else "expected http, https, s3 or gs"
        raise FetchError(f"has the scheme {scheme}, which is not fetched: {mend}")
    name = source_id(uri)
    kept = fetch_store.find(folder, name, uri)
    if kept is None or (expected_sha256 is not None and kept.sha256 != expected_sha256):
        attempts = Attempts(config, deadline)
        bring = _from_bucket if scheme in _BUCKETS else _from_web
        kept = _download(uri, folder, bring(uri, config, attempts, deadline), expected_sha256)
    if kept.bytes > config.max_bytes:
        raise fetch_errors.too_large(config.max_bytes)
    return Fetched(
        path=kept.path,
        bytes=kept.bytes,
        temporary=True,
        provenance=kept.provenance,
        sha256=kept.sha256,
    )


Bring = Callable[[Path], dict[str, str]]


def _from_bucket(uri: str, config: DownloadConfig, attempts: Attempts, _: float | None) -> Bring:
    from pipelines.curation.fetch_bucket import fetch_bucket

    return lambda file: fetch_bucket(uri, file, config, attempts)


def _from_web(
    uri: str, config: DownloadConfig, attempts: Attempts, deadline: float | None
) -> Bring:
    from pipelines.curation.fetch_web import fetch_web

    return lambda file: fetch_web(uri, file, config, attempts, deadline)


def _download(uri: str, folder: Path, bring: Bring, expected_sha256: str | None) -> Kept:
    name = source_id(uri)
    with fetch_store.attempt(folder, name) as place:
        said = bring(place / "whole")
        moment = datetime.now(UTC).isoformat(timespec="seconds")
        provenance = {"uri": uri, **said, "fetched_at": moment}
        kept = fetch_store.keep(folder, name, place / "whole", provenance)
    if expected_sha256 is not None and kept.sha256 != expected_sha256:
        fetch_store.discard(folder, name)
        _check_digest(kept.sha256, expected_sha256)
    return kept


def _check_digest(sha256: str, expected: str) -> None:
    if sha256 != expected:
        raise FetchError(
            f"has the SHA-256 {sha256[:16]}…, expected {expected[:16]}…: "
            "it is another file than was listed, list it anew"
        )


def _named(uri: str) -> str:
    try:
        return shown(uri) if is_remote(uri) else uri
    except ValueError:
        return uri.partition("?")[0]
