"""One video through yt-dlp, with options of our own choosing alone; runs in the guarded process.

Nothing of a request but what is named here reaches yt-dlp's options: no programs, no plugins, no
configuration, no cache, no postprocessing. One file is fetched, in the best format that needs no
merging; sound is not asked for.
"""

import io
import os
import time
from email.utils import parsedate_to_datetime
from typing import Any

import yt_dlp
from yt_dlp.globals import all_plugins_loaded, plugin_dirs
from yt_dlp.networking.exceptions import HTTPError

from pipelines.curation import fetch_errors
from pipelines.curation.fetch_errors import FetchError
from pipelines.curation.fetch_video import OUTPUT
from pipelines.curation.network_guard import AddressRefusedError

# What yt-dlp fetches by itself over HTTP; others need programs or lead elsewhere.
PROTOCOLS = ("http", "https", "m3u8_native", "http_dash_segments")
_MAX_FIELD = 500
_MAX_WAIT = 60.0
_LIVE = {
    "is_live": "is a live stream",
    "is_upcoming": "has not begun yet",
    "post_live": "is a live stream that was not made a video yet",
}
_FIELDS = {
    "page_url": ("webpage_url", "original_url"),
    "extractor": ("extractor",),
    "uploader": ("uploader", "channel", "creator", "uploader_id"),
    "licence": ("license",),
    "title": ("title",),
}

plugin_dirs.value = []
all_plugins_loaded.value = True


class _RefusedError(BaseException):
    """A verdict that must pass through yt-dlp's own handling of exceptions."""

    def __init__(self, error: FetchError) -> None:
        super().__init__(str(error))
        self.error = error


class _Notes:
    """yt-dlp's logger: prints nothing, keeps what says why a download failed.

    retry_after: seconds for which a server asked to be left alone; retried: transfers continued.
    """

    def __init__(self, backoff: float) -> None:
        self.backoff = backoff
        self.too_large = False
        self.last = ""
        self.retry_after: float | None = None
        self.retried = 0

    def debug(self, message: str) -> None:
        self.too_large |= "larger than max-filesize" in message

    def info(self, message: str) -> None:
        self.debug(message)

    def warning(self, message: str) -> None:
        self.last = message

    def error(self, message: str) -> None:
        self.last = message

    def wait(self, n: int) -> float:
        """Seconds before a broken transfer is continued for the n-th time."""
        self.retried += 1
        return min(max(self.backoff * 2**n, self.retry_after or 0.0), _MAX_WAIT)


class _Site(yt_dlp.YoutubeDL):
    """yt-dlp that notes for how long a server asked to be left alone."""

    def urlopen(self, req: Any) -> Any:
        try:
            return super().urlopen(req)
        except HTTPError as error:
            if error.status in (429, 503):
                params: Any = self.params
                params["logger"].retry_after = _seconds(error.response.headers.get("Retry-After"))
            raise


def fetch(request: dict[str, Any]) -> dict[str, Any]:
    """Fetch `request["url"]` to OUTPUT in `request["folder"]`; what came of it, for JSON.

    `{"provenance": {…}}`, or `{"error": …, "kind": …, "retry_after": …}`; both with `retried`,
    how often a broken transfer was continued.
    """
    notes = _Notes(request["backoff"])
    try:
        options: Any = _options(request, notes)
        site = _Site(options)
        info = _one_video(site, request["url"])
        _check(info, request)
        site.process_ie_result(info, download=True)
        if not os.path.isfile(os.path.join(request["folder"], OUTPUT)):
            if notes.too_large:
                raise fetch_errors.too_large(request["max_bytes"])
            raise FetchError(f"gave no file: {fetch_errors.plain(notes.last) or 'nothing came'}")
        return {"provenance": _provenance(info), "retried": notes.retried}
    except AddressRefusedError as refused:
        error = FetchError(
            f"leads to {refused}, expected a public address: "
            "where that is meant, name the host in download.allow_hosts"
        )
    except _RefusedError as refused:
        error = refused.error
    # Extractors are made of guesses about strangers' pages and fail in every way there is.
    except Exception as failure:
        error = fetch_errors.by_exception(failure)
    return {
        "error": str(error),
        "kind": error.kind,
        "retry_after": notes.retry_after,
        "retried": notes.retried,
    }


def _options(request: dict[str, Any], notes: _Notes) -> dict[str, Any]:
    def choose(context: dict[str, Any]) -> Any:
        yield _best(context["formats"], request)

    def watch(status: dict[str, Any]) -> None:
        sizes = (status.get("downloaded_bytes") or 0, status.get("total_bytes") or 0)
        if max(sizes) > request["max_bytes"]:
            raise _RefusedError(fetch_errors.too_large(request["max_bytes"]))

    options: dict[str, Any] = {
        "quiet": True,
        "noprogress": True,
        "logger": notes,
        "color": "never",
        "cachedir": False,
        "outtmpl": {"default": OUTPUT},
        "paths": {"home": request["folder"]},
        "format": choose,
        # The shorter side counts, so that upright videos are not taken for large ones. H.264 is
        # the cheapest to decode.
        "format_sort": [f"res:{request['max_height']}", "vcodec:h264"],
        "noplaylist": True,
        "extract_flat": "in_playlist",
        "playlist_items": "1:2",
        "lazy_playlist": True,
        "max_filesize": request["max_bytes"],
        "ratelimit": request["rate_limit"] or None,
        "socket_timeout": request["socket_timeout"],
        "retries": request["retries"],
        "fragment_retries": request["retries"],
        "extractor_retries": 0,
        "file_access_retries": 0,
        "retry_sleep_functions": {"http": notes.wait, "fragment": notes.wait},
        "continuedl": False,  # what lies there may be of another format; see `fetch_store`
        "skip_unavailable_fragments": False,
        "concurrent_fragment_downloads": 1,
        "hls_prefer_native": True,
        "external_downloader": {"default": "native"},
        "ffmpeg_location": os.path.join(request["folder"], "none"),
        "fixup": "never",
        "proxy": "",  # a proxy would connect in our place, past the guard
        "js_runtimes": {},
        "remote_components": [],
        "geo_bypass": False,
        "updatetime": False,
        "_no_ytdl_file": True,
        "progress_hooks": [watch],
    }
    if request.get("cookies"):
        options["cookiefile"] = io.StringIO(request["cookies"])
    if request.get("own_certificates"):
        options["compat_opts"] = {"no-certifi"}
    return options


def _one_video(site: _Site, url: str) -> Any:
    info: Any = site.extract_info(url, download=False)
    for _ in range(2):  # a list of one is that one
        if info is None or info.get("_type", "video") not in ("playlist", "multi_video"):
            break
        entries = [entry for entry in info.get("entries") or () if entry]
        if len(entries) != 1:
            raise FetchError(
                f"is a list of {'several' if entries else 'no'} videos, expected one: "
                "give the address of each video"
            )
        info = site.process_ie_result(entries[0], download=False)
    if info is None or info.get("_type", "video") != "video":
        raise FetchError("is no single video: give the address of a video")
    return info


def _check(info: dict[str, Any], request: dict[str, Any]) -> None:
    state = info.get("live_status") or ("is_live" if info.get("is_live") else "")
    if state in _LIVE:
        raise FetchError(f"{_LIVE[state]}, expected a finished video: give it when it has ended")
    seconds = info.get("duration")
    if isinstance(seconds, int | float) and seconds > request["max_seconds"]:
        raise FetchError(
            f"lasts {seconds:.0f} s, expected at most {request['max_seconds']:.0f}: "
            "leave it out or raise download.max_seconds"
        )


def _best(formats: list[dict[str, Any]], request: dict[str, Any]) -> dict[str, Any]:
    """The best of the formats (sorted, the best last) that is within the limits."""
    ours = [form for form in formats if form.get("protocol") in PROTOCOLS]
    if not ours:
        raise _RefusedError(
            FetchError("is only offered in ways that need other programs: leave it out")
        )
    ours = [form for form in ours if form.get("vcodec") != "none"]
    if not ours:
        raise _RefusedError(FetchError("has no picture, expected a video: leave it out"))
    small = [form for form in ours if (form.get("filesize") or 0) <= request["max_bytes"]]
    if not small:
        raise _RefusedError(fetch_errors.too_large(request["max_bytes"]))
    low = [form for form in small if _lines(form) <= request["max_height"]]
    if not low:
        least = min(map(_lines, small))
        raise _RefusedError(
            FetchError(
                f"has at least {least} lines, expected at most {request['max_height']}: "
                "leave it out or raise download.max_height"
            )
        )
    return low[-1]


def _lines(form: dict[str, Any]) -> int:
    sides = [side for side in (form.get("width"), form.get("height")) if side]
    return int(min(sides)) if sides else 0


def _provenance(info: dict[str, Any]) -> dict[str, str]:
    said: dict[str, str] = {}
    for name, keys in _FIELDS.items():
        value = next((info[key] for key in keys if info.get(key)), None)
        if value is not None:
            text = "".join(sign for sign in " ".join(str(value).split()) if sign.isprintable())
            said[name] = text[:_MAX_FIELD]
    day = str(info.get("upload_date") or "")
    if len(day) == 8 and day.isdigit():
        said["upload_date"] = f"{day[:4]}-{day[4:6]}-{day[6:]}"
    return said


def _seconds(value: str | None) -> float | None:
    """The header Retry-After, a number or a date, as seconds from now."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, moment.timestamp() - time.time()) if moment.tzinfo else None
