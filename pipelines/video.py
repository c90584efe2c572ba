"""Video files: probe, decode a span at a size and rate, encode.

Frames are uint8 RGB (H, W, 3), upright, with square pixels. Time 0 is the first frame shown.

T frames, H W height and width
"""

import math
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.frame import VideoFrame

from pipelines.container import (
    DecodeStats,
    VideoError,
    VideoLimits,
    open_media,
    video_stream,
)
from pipelines.video_encode import EncodeResult, encode
from pipelines.video_source import (
    MAX_FPS,
    RgbConverter,
    Source,
    header_seconds,
    open_source,
)

__all__ = [
    "DecodeStats",
    "EncodeResult",
    "VideoError",
    "VideoInfo",
    "VideoLimits",
    "decode",
    "encode",
    "iter_frames",
    "probe",
]

PROBE_PACKETS = 5000
SEEK_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a file holds. Width and height are those of the upright frame with square pixels."""

    width: int
    height: int
    fps: float
    seconds: float
    num_frames: int
    codec: str
    rotation: int
    pixel_aspect: float
    variable_rate: bool
    has_audio: bool


def probe(path: str | Path, limits: VideoLimits | None = None) -> VideoInfo:
    """Read what the file holds and decode its first frame; VideoError says why it cannot be used.

    Counts come from the packets where the file is short, else from the header.
    """
    path, limits = Path(path), limits or VideoLimits()
    with open_media(path, limits) as container:
        source, _ = open_source(container, path, limits, DecodeStats())
        stream = source.stream
        info = {
            "width": source.size[1],
            "height": source.size[0],
            "codec": stream.codec_context.codec.canonical_name,
            "rotation": source.turns * 90,
            "pixel_aspect": source.pixel_aspect,
            "has_audio": bool(container.streams.audio),
        }
        seconds = header_seconds(container, stream)
        num_frames = stream.frames or round(seconds * source.fps)
    times, complete = _packet_times(path, limits)
    steps = np.diff(times)
    if complete and len(times):
        num_frames = len(times)
        seconds = float(times[-1] - times[0] + (np.median(steps) if len(steps) else 1 / source.fps))
    typical = float(np.median(steps)) if len(steps) else 1 / source.fps
    variable = bool(len(steps) and np.abs(steps - typical).max() > max(0.1 * typical, 0.002))
    return VideoInfo(
        **info, fps=source.fps, seconds=seconds, num_frames=num_frames, variable_rate=variable
    )


def _packet_times(path: Path, limits: VideoLimits) -> tuple[np.ndarray, bool]:
    """Presentation times in seconds of up to PROBE_PACKETS packets, and whether these are all."""
    times: list[float] = []
    with open_media(path, limits) as container:
        stream = video_stream(container, path, limits)
        try:
            for packet in container.demux(stream):
                if packet.size and packet.pts is not None and packet.time_base:
                    times.append(float(packet.pts * packet.time_base))
                if len(times) >= PROBE_PACKETS:
                    return np.sort(times), False
        except av.FFmpegError:
            pass  # a cut-off tail: what was read is what there is
    return np.sort(times), bool(times)


def iter_frames(
    path: str | Path,
    *,
    start: float = 0.0,
    end: float | None = None,
    fps: float | Fraction | None = None,
    size: tuple[int, int] | None = None,
    max_side: int | None = None,
    limits: VideoLimits | None = None,
    stats: DecodeStats | None = None,
    exact: bool = True,
) -> Iterator[np.ndarray]:
    """Frames (H, W, 3) uint8 RGB at the constant rate `fps` (default: the source's average).

    Frame k is the one on screen at start + k / fps seconds; the span ends before `end` or with the
    video. `size` is (height, width), exact; `max_side` shrinks to it and keeps the aspect. Damaged
    packets are skipped and counted in `stats`. `exact=False` is cheaper and may be a grey level off
    here and there. Raises VideoError.
    """
    path, limits = Path(path), limits or VideoLimits()
    _check_span(start, end, fps, size, max_side)
    with open_media(path, limits) as container:
        source, first = open_source(container, path, limits, stats or DecodeStats(), exact=exact)
        to_rgb = RgbConverter(source, size or fit(source.size, max_side), exact=exact)
        rate = float(fps or source.fps)
        with closing(shown_frames(source, first, start, end, rate)) as shown:
            last_frame, last_image = None, None
            for frame in shown:
                if frame is not last_frame or last_image is None:
                    last_frame, last_image = frame, to_rgb(frame)
                yield last_image.copy()


def decode(
    path: str | Path,
    *,
    start: float = 0.0,
    end: float | None = None,
    fps: float | Fraction | None = None,
    size: tuple[int, int] | None = None,
    max_side: int | None = None,
    limits: VideoLimits | None = None,
    stats: DecodeStats | None = None,
) -> np.ndarray:
    """All frames of `iter_frames` as one array (T, H, W, 3); VideoError where the span is empty."""
    options = {"fps": fps, "size": size, "max_side": max_side, "limits": limits, "stats": stats}
    frames = list(iter_frames(path, start=start, end=end, **options))
    if not frames:
        until = "the end" if end is None else f"{end:.3f} s"
        raise VideoError(f"{path}: no frame from {start:.3f} s to {until}; give an earlier span")
    return np.stack(frames)


def _check_span(start, end, fps, size, max_side) -> None:
    if not (math.isfinite(start) and start >= 0):
        raise VideoError(f"start is {start}, expected seconds of 0 or more")
    if end is not None and not (math.isfinite(end) and end > start):
        raise VideoError(f"end is {end}, expected seconds after start ({start})")
    if fps is not None and not 0 < float(fps) <= MAX_FPS:
        raise VideoError(f"fps is {fps}, expected a rate of 0 to {MAX_FPS:g} frames a second")
    if size is not None and max_side is not None:
        raise VideoError("size and max_side were both given; give one of them")
    if (size is not None and min(size) < 1) or (max_side is not None and max_side < 1):
        raise VideoError(f"size {size or max_side}: expected sides of 1 pixel or more")


def fit(size: tuple[int, int], max_side: int | None) -> tuple[int, int]:
    """(height, width) shrunk so that the longer side is at most `max_side`."""
    scale = 1.0 if max_side is None else min(1.0, max_side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def shown_frames(
    source: Source,
    first: tuple[float, VideoFrame],
    start: float,
    end: float | None,
    fps: float,
) -> Generator[VideoFrame]:
    """The frame on screen at each tick of the constant rate."""
    base = float(source.stream.time_base or 0)
    # Containers round times to their clock: a frame may be marked a little after its tick.
    slack = min(0.51 * base, 0.1 / max(fps, source.fps)) + 1e-6
    stop = math.inf if end is None else end
    ticks = 0
    current, current_time = first[1], 0.0
    for time, frame in _from_keyframe(source, first, start):
        while (tick := start + ticks / fps) < min(time - slack, stop - 1e-6):
            yield current
            ticks += 1
            _check_ticks(source, ticks, tick)
        if tick >= stop - 1e-6:
            return
        current, current_time = frame, time
    shown = float((current.duration or 0) * (current.time_base or 0))
    over = current_time + (shown if 0 < shown <= 1 else 1 / source.fps)
    while (tick := start + ticks / fps) < min(over, stop) - slack:
        yield current
        ticks += 1
        _check_ticks(source, ticks, tick)


def _check_ticks(source: Source, ticks: int, time: float) -> None:
    limits = source.limits
    if ticks > limits.max_frames or time > limits.max_seconds:
        raise VideoError(
            f"{source.path}: more than {limits.max_frames} frames or {limits.max_seconds:.1f} s; "
            "cut the video or raise max_frames and max_seconds"
        )


def _from_keyframe(
    source: Source, first: tuple[float, VideoFrame], start: float
) -> Iterator[tuple[float, VideoFrame]]:
    """Frames from at or before `start` on, with times from the first frame shown."""
    if start > SEEK_SECONDS:
        source.seek(source.first_time + start)
        landed = next(source.frames(), None)
        if landed is None or landed[0] > source.first_time + start:
            # A damaged index: only reading from the beginning is sure to pass the span.
            source.seek(source.first_time)
        else:
            first = landed
    yield first[0] - source.first_time, first[1]
    for time, frame in source.frames():
        yield time - source.first_time, frame
