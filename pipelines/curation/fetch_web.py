"""Videos behind http(s): one at a time in a process of its own, closed off and killed when late.

A page's host has `per_host` places on each machine (`fetch_hosts`); what the page leads to is
counted with it. Proxies of the environment are not used: they would connect in our place, where
the guard cannot see whereto.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipelines.curation import fetch_hosts
from pipelines.curation.config import DownloadConfig
from pipelines.curation.fetch_attempts import Attempts, too_slow
from pipelines.curation.fetch_errors import FetchError
from pipelines.curation.fetch_video import OUTPUT
from pipelines.curation.network_guard import AllowedHosts

_MODULE = "pipelines.curation.fetch_video"
# Of address space; an ordinary page needs a tenth.
MAX_MEMORY = 1 << 30
_MAX_COOKIES = 8 << 20
# What a Python needs to start, and where the machine's certificates are.
_ENVIRONMENT = ("LD_LIBRARY_PATH", "PYTHONHOME", "SSL_CERT_FILE", "SSL_CERT_DIR", "TZ")
# First bytes that say a file is text for people or players, whatever its server called it.
_TEXT = (b"<!doctype", b"<html", b"<?xml", b"<head", b"#extm3u", b"{")


def fetch_web(
    url: str, file: Path, config: DownloadConfig, attempts: Attempts, latest: float | None
) -> dict[str, str]:
    """Fetch the one video of an address to `file`; what its page says of it.

    Args:
        file: in an empty folder of its own.
        latest: of `time.monotonic()`, when waiting for a place ends too.

    Raises:
        FetchError: with its kind.
    """
    host = _check_url(url)
    request = _request(url, file.parent, config)

    def once() -> dict[str, Any]:
        _empty(file.parent)
        queued = time.monotonic()
        with fetch_hosts.slot(host, config.per_host, latest):
            attempts.pardon(time.monotonic() - queued)
            answer = _answer({**request, "retries": max(attempts.left, 0)}, attempts.deadline)
        attempts.left -= answer.get("retried", 0)
        if "error" in answer:
            after = answer.get("retry_after")
            if after:
                fetch_hosts.leave_alone(host, after)
            raise FetchError(answer["error"], answer["kind"], retry_after=after)
        return answer

    answer = attempts.run(once)
    fetched = file.parent / OUTPUT
    with fetched.open("rb") as stream:
        start = stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith(_TEXT) or not start:
        raise FetchError("is a page or a list, expected a video: give the video's own address")
    os.replace(fetched, file)
    return answer["provenance"]


def _check_url(url: str) -> str:
    """The host (and port) of an address. Raises FetchError where it cannot be one."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise FetchError(f"is no address ({error}), expected https://HOST/…") from None
    # yt-dlp reads requests of its own from such a fragment.
    if not host or "__youtubedl_smuggle" in url or not url.isprintable() or " " in url:
        raise FetchError("is no address, expected https://HOST/…")
    return host if port is None else f"{host}:{port}"


def _request(url: str, folder: Path, config: DownloadConfig) -> dict[str, Any]:
    try:
        AllowedHosts(config.allow_hosts)
    except ValueError as error:
        raise FetchError(f"was not asked for: {error}") from None
    return {
        "url": url,
        "folder": str(folder.resolve()),
        "allow_hosts": list(config.allow_hosts),
        "max_memory": MAX_MEMORY,
        "max_bytes": config.max_bytes,
        "max_seconds": config.max_seconds,
        "max_height": config.max_height,
        "rate_limit": config.rate_limit,
        "socket_timeout": config.socket_timeout_seconds,
        "backoff": config.backoff_seconds,
        "cookies": _cookies(config.cookies_file),
        "own_certificates": bool(os.environ.get("SSL_CERT_FILE")),
    }


def _cookies(name: str | None) -> str | None:
    """The text of the cookies file, so that the guarded process need not read or write it."""
    if name is None:
        return None
    try:
        with open(name, encoding="utf-8") as stream:
            text = stream.read(_MAX_COOKIES)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise FetchError(
            f"was not asked for: download.cookies_file cannot be read ({reason}), expected a "
            "Netscape cookies.txt that every machine of the run has"
        ) from None
    if text.lstrip().startswith(("{", "[")):
        raise FetchError(
            "was not asked for: download.cookies_file is JSON, expected a Netscape cookies.txt"
        )
    return text


def _answer(request: dict[str, Any], deadline: float) -> dict[str, Any]:
    """Ask a fresh process; it dies with this one, and at the deadline."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise too_slow()
    theirs, ours = os.pipe()
    try:
        with subprocess.Popen(
            [sys.executable, "-P", "-s", "-m", _MODULE, str(theirs)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=request["folder"],
            env=_environment(request["folder"]),
            pass_fds=(theirs,),
        ) as process:
            try:
                said, _ = process.communicate(json.dumps(request).encode(), timeout=left)
            except subprocess.TimeoutExpired:
                raise too_slow() from None
            finally:
                process.kill()
    finally:
        os.close(theirs)
        os.close(ours)
    try:
        return json.loads(said)
    except ValueError:
        raise FetchError(
            f"ended the process that fetched it (exit code {process.returncode}, "
            f"{MAX_MEMORY >> 20} MB allowed): try again",
            "transient",
        ) from None


def _environment(folder: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    # As here: in a Ray worker the code is on a path that only this process knows.
    path = os.pathsep.join(os.path.abspath(entry) for entry in dict.fromkeys(sys.path))
    return {
        **kept,
        "PYTHONPATH": path,
        "PYTHONUTF8": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": folder,
        "TMPDIR": folder,
        "LANG": "C.UTF-8",
    }


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()
