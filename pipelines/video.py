"""Video files: probe, decode a span at a size and rate, encode.

Frames are uint8 RGB (H, W, 3), upright, with square pixels. Time 0 is the first frame shown.

T frames, H W height and width
"""

import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from av.video.stream import VideoStream

from pipelines.container import (
    DecodeStats,
    VideoError,
    VideoLimits,
    check_pixels,
    open_media,
    video_stream,
)
from pipelines.hdr import TRANSFERS, to_sdr
from pipelines.images import ImageError, read_image
from pipelines.video_encode import EncodeResult, encode

__all__ = [
    "DecodeStats",
    "EncodeResult",
    "ImageError",
    "VideoError",
    "VideoInfo",
    "VideoLimits",
    "decode",
    "encode",
    "iter_frames",
    "probe",
    "read_image",
]

PROBE_PACKETS = 5000
MAX_FPS = 1000.0
MAX_PIXEL_ASPECT = 4.0
SEEK_SECONDS = 1.0
# AVColorSpace, AVColorRange and AVColorTransferCharacteristic values of libavutil/pixfmt.h.
MATRICES = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.SMPTE170M,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
    10: Colorspace.BT2020,
}
FULL_RANGE_FORMATS = ("yuvj", "rgb", "bgr", "gbr", "pal8", "argb", "abgr", "gray", "mono", "0rgb")


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


@dataclass(kw_only=True)
class _Source:
    """An open stream, its first decoded frame and the geometry that this frame fixes."""

    path: Path
    container: InputContainer
    stream: VideoStream
    limits: VideoLimits
    stats: DecodeStats
    first_time: float = 0.0
    fps: float = 25.0
    turns: int = 0
    mirrored: bool = False
    pixel_aspect: float = 1.0
    size: tuple[int, int] = (0, 0)
    last_time: float = -math.inf
    _timed: Iterator[tuple[float, VideoFrame]] | None = field(default=None, init=False)

    def frames(self) -> Iterator[tuple[float, VideoFrame]]:
        """The rest of the frames with their time in seconds (file clock), always increasing.

        One iterator until the next seek: a packet may hold several frames, so none may be dropped.
        """
        if self._timed is None:
            self._timed = self._read()
        return self._timed

    def _read(self) -> Iterator[tuple[float, VideoFrame]]:
        for frame in self._decoded():
            self.stats.frames += 1
            if self.stats.frames > self.limits.max_frames:
                raise VideoError(
                    f"{self.path}: more than {self.limits.max_frames} frames; "
                    "cut the video or raise max_frames"
                )
            check_pixels(self.path, frame.width, frame.height, self.limits)
            time = None
            if frame.pts is not None and frame.time_base:
                time = float(frame.pts * frame.time_base)
            if time is None or time <= self.last_time:
                time = self.last_time + 1 / self.fps if math.isfinite(self.last_time) else 0.0
            self.last_time = time
            yield time, frame

    def _decoded(self) -> Iterator[VideoFrame]:
        packets = self.container.demux(self.stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except av.FFmpegError:
                self.stats.corrupt_packets += 1
                return
            try:
                yield from packet.decode()  # type: ignore[misc]
            except av.FFmpegError:
                self.stats.corrupt_packets += 1

    def seek(self, time: float) -> None:
        """Move to a keyframe at or before `time` (file clock); stay where the file cannot seek."""
        base = self.stream.time_base or Fraction(1, 1000)
        try:
            self.container.seek(int(time / base), stream=self.stream, backward=True)
        except av.FFmpegError:
            return
        self.last_time = -math.inf
        self._timed = None


def _open_source(
    container: InputContainer, path: Path, limits: VideoLimits, stats: DecodeStats
) -> tuple[_Source, tuple[float, VideoFrame]]:
    stream = video_stream(container, path, limits)
    fps = _average_rate(stream)
    source = _Source(
        path=path, container=container, stream=stream, limits=limits, stats=stats, fps=fps
    )
    seconds = _header_seconds(container, stream)
    if seconds > limits.max_seconds:
        raise VideoError(
            f"{path}: lasts {seconds:.1f} s, expected at most {limits.max_seconds:.1f} s; "
            "cut the video or raise max_seconds"
        )
    first = next(source.frames(), None)
    if first is None:
        damage = f", {stats.corrupt_packets} damaged packets" if stats.corrupt_packets else ""
        raise VideoError(
            f"{path}: not one frame could be decoded ({stream.codec_context.name}{damage}); "
            "the file is cut off or damaged, fetch it again or convert it to H.264"
        )
    source.first_time = first[0]
    source.turns, source.mirrored = _orientation(first[1])
    source.pixel_aspect = _pixel_aspect(stream)
    source.size = _upright_size(first[1], source.pixel_aspect, source.turns)
    check_pixels(path, source.size[1], source.size[0], limits)
    return source, first


def _average_rate(stream: VideoStream) -> float:
    for rate in (stream.average_rate, stream.guessed_rate, stream.base_rate):
        if rate is not None and rate.denominator and 0.01 <= float(rate) <= MAX_FPS:
            return float(rate)
    return 25.0


def _header_seconds(container: InputContainer, stream: VideoStream) -> float:
    if stream.duration is not None and stream.time_base:
        return float(stream.duration * stream.time_base)
    return container.duration / av.time_base if container.duration else 0.0


def _orientation(frame: VideoFrame) -> tuple[int, bool]:
    """Quarter turns anticlockwise, and whether the row is mirrored first, to show it upright."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            matrix = np.frombuffer(bytes(data), np.int32)[:9].reshape(3, 3)[:2, :2] / 65536
            mirrored = bool(np.linalg.det(matrix) < 0)
            if mirrored:
                matrix = np.diag([-1.0, 1.0]) @ matrix
            angle = math.degrees(math.atan2(-matrix[0, 1], matrix[0, 0]))
            return round(angle / 90) % 4, mirrored
    return round(frame.rotation / 90) % 4, False


def _pixel_aspect(stream: VideoStream) -> float:
    ratio = stream.sample_aspect_ratio
    aspect = float(ratio) if ratio is not None and ratio.denominator and ratio > 0 else 1.0
    # No camera makes pixels of 4:1; such a header is damaged and is not believed.
    return aspect if 1 / MAX_PIXEL_ASPECT <= aspect <= MAX_PIXEL_ASPECT else 1.0


def _upright_size(frame: VideoFrame, aspect: float, turns: int) -> tuple[int, int]:
    """(height, width); the axis with the wider pixels grows, so no detail is lost."""
    height = round(frame.height / min(aspect, 1.0))
    width = round(frame.width * max(aspect, 1.0))
    return (width, height) if turns % 2 else (height, width)


def probe(path: str | Path, limits: VideoLimits | None = None) -> VideoInfo:
    """Read what the file holds and decode its first frame; VideoError says why it cannot be used.

    Counts come from the packets where the file is short, else from the header.
    """
    path, limits = Path(path), limits or VideoLimits()
    with open_media(path, limits) as container:
        source, _ = _open_source(container, path, limits, DecodeStats())
        stream = source.stream
        info = {
            "width": source.size[1],
            "height": source.size[0],
            "codec": stream.codec_context.codec.canonical_name,
            "rotation": source.turns * 90,
            "pixel_aspect": source.pixel_aspect,
            "has_audio": bool(container.streams.audio),
        }
        seconds = _header_seconds(container, stream)
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
) -> Iterator[np.ndarray]:
    """Frames (H, W, 3) uint8 RGB at the constant rate `fps` (default: the source's average).

    Frame k is the one on screen at start + k / fps seconds; the span ends before `end` or with the
    video. `size` is (height, width), exact; `max_side` shrinks to it and keeps the aspect. Damaged
    packets are skipped and counted in `stats`. Raises VideoError.
    """
    path, limits = Path(path), limits or VideoLimits()
    _check_span(start, end, fps, size, max_side)
    with open_media(path, limits) as container:
        source, first = _open_source(container, path, limits, stats or DecodeStats())
        target = size or _fit(source.size, max_side)
        rate = float(fps or source.fps)
        with closing(_shown(source, first, start, end, rate)) as shown:
            last_frame, last_image = None, None
            for frame in shown:
                if frame is not last_frame or last_image is None:
                    last_frame, last_image = frame, _to_rgb(frame, source, target)
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


def _fit(size: tuple[int, int], max_side: int | None) -> tuple[int, int]:
    scale = 1.0 if max_side is None else min(1.0, max_side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _shown(
    source: _Source,
    first: tuple[float, VideoFrame],
    start: float,
    end: float | None,
    fps: float,
) -> Iterator[VideoFrame]:
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


def _check_ticks(source: _Source, ticks: int, time: float) -> None:
    limits = source.limits
    if ticks > limits.max_frames or time > limits.max_seconds:
        raise VideoError(
            f"{source.path}: more than {limits.max_frames} frames or {limits.max_seconds:.1f} s; "
            "cut the video or raise max_frames and max_seconds"
        )


def _from_keyframe(
    source: _Source, first: tuple[float, VideoFrame], start: float
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


def _to_rgb(frame: VideoFrame, source: _Source, size: tuple[int, int]) -> np.ndarray:
    """Upright RGB of (height, width): colour matrix, range and size in one pass, then the turn."""
    height, width = size if source.turns % 2 == 0 else size[::-1]
    smaller = width < frame.width
    quality = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
    hdr = int(frame.color_trc) in TRANSFERS
    converted = frame.reformat(
        width=width,
        height=height,
        format="rgb48le" if hdr else "rgb24",
        src_colorspace=_matrix(frame),
        src_color_range=_range(frame),
        dst_color_range=ColorRange.JPEG,
        interpolation=(Interpolation.AREA if smaller else Interpolation.BICUBIC) | quality,
        threads=1,
    )
    image = converted.to_ndarray()
    if hdr:
        image = to_sdr(image, int(frame.color_trc))
    if source.mirrored:
        image = image[:, ::-1]
    return np.ascontiguousarray(np.rot90(image, source.turns))


def _matrix(frame: VideoFrame) -> Colorspace:
    untagged = Colorspace.ITU709 if frame.height > 576 or frame.width > 1024 else Colorspace.ITU601
    return MATRICES.get(int(frame.colorspace), untagged)


def _range(frame: VideoFrame) -> ColorRange:
    if frame.format.name.startswith(FULL_RANGE_FORMATS):
        return ColorRange.JPEG
    return ColorRange.JPEG if frame.color_range == 2 else ColorRange.MPEG
