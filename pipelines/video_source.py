"""An open video: its frames in order with their times, and how to show them upright in RGB.

H W height and width
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from pipelines.container import DecodeStats, VideoError, VideoLimits, check_pixels, video_stream
from pipelines.hdr import TRANSFERS, to_sdr

MAX_FPS = 1000.0
MAX_PIXEL_ASPECT = 4.0
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


@dataclass(kw_only=True)
class Source:
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
            time = frame.time
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
            except MemoryError:  # one of FFmpeg's errors too
                raise
            except av.FFmpegError:
                self.stats.corrupt_packets += 1
                return
            try:
                yield from packet.decode()  # type: ignore[misc]
            except MemoryError:  # no fault of the packet
                raise
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


def open_source(
    container: InputContainer,
    path: Path,
    limits: VideoLimits,
    stats: DecodeStats,
    *,
    exact: bool = True,
) -> tuple[Source, tuple[float, VideoFrame]]:
    """The source in an open container and its first frame, with that frame's time in seconds.

    Without `exact`, frames that no other frame is made from are left unsmoothed at the edges of
    their blocks: a tenth cheaper, and good enough to measure.
    """
    stream = video_stream(container, path, limits)
    if not exact:
        context = stream.codec_context
        context.options = {**context.options, "skip_loop_filter": "noref"}
    fps = _average_rate(stream)
    source = Source(
        path=path, container=container, stream=stream, limits=limits, stats=stats, fps=fps
    )
    seconds = header_seconds(container, stream)
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


def header_seconds(container: InputContainer, stream: VideoStream) -> float:
    if stream.duration is not None and stream.time_base:
        return float(stream.duration * stream.time_base)
    return container.duration / av.time_base if container.duration else 0.0


def _orientation(frame: VideoFrame) -> tuple[int, bool]:
    """Quarter turns anticlockwise, and whether the row is mirrored first, to show it upright."""
    # The binding's stubs call its items strings.
    for data in cast(Iterable[Any], frame.side_data):
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


class RgbConverter:
    """Frames of one source as upright RGB of (height, width); the tables are made once.

    Args:
        exact: rounded as precisely as the scaler can, for pictures that are looked at or stored;
            without it half as dear and a grey level off here and there, for those only measured.
    """

    def __init__(self, source: Source, size: tuple[int, int], *, exact: bool = True) -> None:
        self.source = source
        self.size = size if source.turns % 2 == 0 else size[::-1]
        self.exact = exact
        self._reformatter = VideoReformatter()

    def __call__(self, frame: VideoFrame) -> np.ndarray:
        """(H, W, 3) uint8: colour matrix, range and size in one pass, then the turn."""
        height, width = self.size
        quality = Interpolation.AREA if width < frame.width else Interpolation.BICUBIC
        if self.exact:
            quality |= Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
        hdr = int(frame.color_trc) in TRANSFERS
        converted = self._reformatter.reformat(
            frame,
            width=width,
            height=height,
            format="rgb48le" if hdr else "rgb24",
            src_colorspace=_matrix(frame),
            src_color_range=_range(frame),
            dst_color_range=ColorRange.JPEG,
            interpolation=quality,
            threads=1,
        )
        image = converted.to_ndarray()
        if hdr:
            image = to_sdr(image, int(frame.color_trc))
        if self.source.mirrored:
            image = image[:, ::-1]
        return np.ascontiguousarray(np.rot90(image, self.source.turns))


def _matrix(frame: VideoFrame) -> Colorspace:
    untagged = Colorspace.ITU709 if frame.height > 576 or frame.width > 1024 else Colorspace.ITU601
    return MATRICES.get(int(frame.colorspace), untagged)


def _range(frame: VideoFrame) -> ColorRange:
    if frame.format.name.startswith(FULL_RANGE_FORMATS):
        return ColorRange.JPEG
    return ColorRange.JPEG if frame.color_range == 2 else ColorRange.MPEG
