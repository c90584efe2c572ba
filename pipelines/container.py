"""Open a media file as hostile input: one regular file, known containers, hard caps.

FFmpeg's playlist and concat demuxers read other files and URLs that a small text names. A file is
therefore opened here by its bytes alone: the demuxer may only be one of `CONTAINERS`, no protocol
is allowed, and any attempt of the file to open another one is refused.
"""

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

CONTAINERS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,ogg,flv,gif,mp3,wav,flac,aac"
EXPECTED = "an mp4, mov, mkv, webm, avi, ts, ogv, flv or gif file"


class VideoError(ValueError):
    """A video that cannot be used; the message says what was given, expected and how to mend it."""


@dataclass(frozen=True, kw_only=True)
class VideoLimits:
    """What a file may cost. The header is checked first, then what is actually decoded."""

    max_bytes: int = 4 << 30
    max_pixels: int = 40_000_000
    max_frames: int = 200_000
    max_seconds: float = 3 * 3600.0


@dataclass(kw_only=True)
class DecodeStats:
    """Counts of one decoding pass, filled in while frames are drawn."""

    frames: int = 0
    corrupt_packets: int = 0


def _refuse_other_files(url: str, *_: Any) -> Any:
    raise PermissionError(f"the media file tried to open {url!r}")


def _check_file(path: Path, limits: VideoLimits) -> None:
    try:
        status = path.stat()
    except OSError as error:
        raise VideoError(
            f"{path}: cannot be read ({error.strerror}); give an existing file"
        ) from None
    if not stat.S_ISREG(status.st_mode):
        raise VideoError(f"{path}: not a regular file; expected {EXPECTED}")
    if status.st_size == 0:
        raise VideoError(f"{path}: the file is empty; fetch or export it again")
    if status.st_size > limits.max_bytes:
        raise VideoError(
            f"{path}: {status.st_size} bytes, expected at most {limits.max_bytes}; "
            "cut the video or raise max_bytes"
        )


@contextmanager
def open_media(path: str | Path, limits: VideoLimits) -> Iterator[InputContainer]:
    """Open `path` for reading under `limits`; VideoError where it is no media file of ours."""
    path = Path(path)
    _check_file(path, limits)
    try:
        file = path.open("rb")
    except OSError as error:
        raise VideoError(f"{path}: cannot be read ({error.strerror}); check its rights") from None
    with file:
        try:
            container = av.open(
                file,
                mode="r",
                metadata_errors="ignore",
                options={"max_pixels": str(limits.max_pixels)},
                container_options={"format_whitelist": CONTAINERS, "protocol_whitelist": "none"},
                io_open=_refuse_other_files,
            )
        except (av.FFmpegError, OSError, ValueError) as error:
            raise VideoError(
                f"{path}: cannot be opened as a video ({_reason(error)}); expected {EXPECTED}. "
                "Fetch it again if it is cut off, or convert it"
            ) from None
        with container:
            yield container


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__


def video_stream(container: InputContainer, path: Path, limits: VideoLimits) -> VideoStream:
    """The stream to decode: the best one that is not cover art, set to decode on one thread."""
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        kinds = ", ".join(sorted({s.type for s in container.streams})) or "no streams"
        raise VideoError(f"{path}: no video stream (has {kinds}); expected {EXPECTED}")
    best = container.streams.best("video")
    stream = best if isinstance(best, VideoStream) and best in streams else streams[0]
    context = stream.codec_context
    if context is None:
        raise VideoError(f"{path}: its video codec is unknown here; convert it to H.264")
    check_pixels(path, stream.width, stream.height, limits)
    if "max_pixels" not in context.options:
        context.options = {**context.options, "max_pixels": str(limits.max_pixels)}
    # Many videos are decoded side by side: one thread each keeps them from fighting over cores.
    context.thread_count = 1
    return stream


def check_pixels(path: Path, width: int, height: int, limits: VideoLimits) -> None:
    """VideoError where a frame is larger than `limits.max_pixels`."""
    if width * height > limits.max_pixels:
        raise VideoError(
            f"{path}: frames of {width}x{height}, expected at most {limits.max_pixels} pixels; "
            "scale the video down or raise max_pixels"
        )
