"""One object of a bucket (`s3://`, `gs://`) through fsspec, in pieces, within the limits.

Endpoints and credentials are those of the machine, as fsspec and the clouds' own clients read them
from the environment; an address only names a bucket and a key.
"""

import time
from pathlib import Path
from typing import Any

from pipelines.curation import fetch_errors
from pipelines.curation.config import DownloadConfig
from pipelines.curation.fetch_attempts import Attempts, too_slow
from pipelines.curation.fetch_errors import FetchError

_PUBLIC = "for a public bucket set FSSPEC_S3_ANON=true or FSSPEC_GS_TOKEN=anon"
_PIECE = 8 << 20
# What tells one version of an object from another.
_IDENTITY = ("size", "ETag", "etag", "generation", "LastModified", "updated")


def fetch_bucket(
    uri: str, file: Path, config: DownloadConfig, attempts: Attempts
) -> dict[str, str]:
    """Copy an object to `file`; what is known of it.

    Raises:
        FetchError: permanent where there is no such object or no right to it, or it is too large;
            transient where the transfer broke off.
    """
    try:
        files = _filesystem(uri, config)
        path = files._strip_protocol(uri)
    except Exception as error:
        raise _reason(error) from None
    info = _ask(files, "_info", path, attempts=attempts)
    _copy(files, info, file, config, attempts)
    after = _ask(files, "_info", path, attempts=attempts)
    if any(info.get(name) != after.get(name) for name in _IDENTITY):
        raise FetchError("changed while it was fetched: try again", "transient")
    return {"extractor": uri.partition("://")[0].lower()}


def _filesystem(uri: str, config: DownloadConfig) -> Any:
    import fsspec

    protocol = uri.partition("://")[0].lower()
    seconds = config.socket_timeout_seconds
    options: dict[str, Any] = {"use_listings_cache": False}
    if protocol == "s3":
        options["config_kwargs"] = {
            "connect_timeout": seconds,
            "read_timeout": seconds,
            "retries": {"max_attempts": 1},
        }
    else:
        options["requests_timeout"] = seconds
    return fsspec.filesystem(protocol, **options)


def _copy(
    files: Any, info: dict[str, Any], file: Path, config: DownloadConfig, attempts: Attempts
) -> None:
    size = info.get("size")
    if info.get("type") == "directory" or not isinstance(size, int):
        raise FetchError("is a folder, expected one object: name its objects, or a pattern")
    if size > config.max_bytes:
        raise fetch_errors.too_large(config.max_bytes)
    started = time.monotonic()
    done = 0
    try:
        with file.open("wb") as stream:
            while done < size:
                end = min(done + _PIECE, size)
                span = {"start": done, "end": end}
                piece = _ask(files, "_cat_file", info["name"], attempts=attempts, **span)
                if len(piece) != end - done:
                    raise FetchError("changed while it was fetched: try again", "transient")
                stream.write(piece)
                done = end
                if config.rate_limit:
                    early = started + done / config.rate_limit - time.monotonic()
                    time.sleep(max(0.0, min(early, attempts.deadline - time.monotonic())))
    except OSError as error:
        raise fetch_errors.by_exception(error) from None


def _ask(files: Any, method: str, *args: Any, attempts: Attempts, **options: Any) -> Any:
    from fsspec.asyn import sync

    def once() -> Any:
        left = attempts.deadline - time.monotonic()
        if left <= 0:
            raise too_slow()
        try:
            return sync(files.loop, getattr(files, method), *args, timeout=left, **options)
        # Each cloud has exceptions of its own, most of them derived from nothing in common.
        except Exception as error:
            raise _reason(error) from None

    return attempts.run(once)


def _reason(error: Exception) -> FetchError:
    names = {type(link).__name__ for link in fetch_errors.causes(error)}
    if isinstance(error, FileNotFoundError):
        return FetchError("is not there: check the bucket and the key, or leave it out")
    if names & {"NoCredentialsError", "DefaultCredentialsError", "PartialCredentialsError"}:
        return FetchError(f"needs credentials, which this machine lacks: give it some; {_PUBLIC}")
    if isinstance(error, PermissionError) or "Forbidden" in str(error):
        return FetchError(f"may not be read: check this machine's credentials; {_PUBLIC}")
    if type(error) is OSError and error.errno in fetch_errors.LASTING:
        text = fetch_errors.plain(error.strerror or str(error))
        return FetchError(f"cannot be read ({text}): check the bucket and the key")
    if isinstance(error, OSError):
        text = fetch_errors.plain(error.strerror or str(error))
        return FetchError(f"broke off ({text}): try again later", "transient")
    return fetch_errors.by_exception(error)
