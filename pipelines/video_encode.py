"""Write frames as an H.264 file: constant rate, short GOPs, the same bytes for the same frames.

T frames, H W height and width
"""

import math
import os
import secrets
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np
from av.container import Flags, OutputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation

from pipelines.container import VideoError
from pipelines.sound import SoundTrack, open_sound

MAX_SIDE = 16384
PRECISE = (
    Interpolation.BICUBIC
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
)


@dataclass(frozen=True, kw_only=True)
class EncodeResult:
    """What was written; `audio_note` says why a wanted sound track is missing, else it is empty."""

    num_frames: int
    width: int
    height: int
    seconds: float
    has_audio: bool
    audio_note: str = ""


def encode(
    path: str | Path,
    frames: Iterable[np.ndarray],
    *,
    fps: float | Fraction,
    crf: int = 18,
    gop: int = 12,
    audio_from: str | Path | None = None,
    audio_start: float = 0.0,
    audio_seconds: float | None = None,
    preset: str = "medium",
    metadata: Mapping[str, str] | None = None,
) -> EncodeResult:
    """Write (H, W, 3) uint8 RGB `frames` to `path` as H.264 yuv420p in an mp4.

    An odd side is padded to even by repeating its last line. The file appears at `path` complete or
    not at all. The sound of `audio_from` from `audio_start` on is cut to the length of the video
    (and to `audio_seconds`); where it is missing or damaged the video is written without it, which
    the result says. `metadata` is what the container says of itself ("title", "comment"). Raises
    VideoError for frames that make no video.
    """
    path = Path(path)
    rate = _rate(fps)
    queue = iter(frames)
    first = next(queue, None)
    if first is None:
        raise VideoError(f"{path}: no frames to write; give at least one")
    if not path.parent.is_dir():
        raise VideoError(f"{path}: its folder does not exist; make it first")
    size = _checked(first, None, path).shape[:2]
    temporary = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        with ExitStack() as stack:
            sound, note = None, ""
            if audio_from is not None:
                try:
                    sound = stack.enter_context(open_sound(audio_from, audio_start))
                except VideoError as error:
                    note = f"written without sound: {error}"
            container = stack.enter_context(
                av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"})
            )
            container.flags |= Flags.bitexact.value
            container.metadata.update(metadata or {})
            video = _add_video(container, size, rate, {"crf": str(crf), "preset": preset}, gop)
            track = None if sound is None else SoundTrack(container, sound, audio_seconds)
            count = 0
            for frame in chain([first], queue):
                picture = _to_yuv(_checked(frame, size, path))
                picture.pts, picture.time_base = count, 1 / rate
                container.mux(video.encode(picture))
                count += 1
                if track is not None:
                    track.advance(float(count / rate))
            container.mux(video.encode(None))
            if track is not None:
                track.finish(float(count / rate))
        _commit(temporary, path)
    except av.FFmpegError as error:
        raise VideoError(
            f"{path}: cannot be encoded ({error.strerror}); check the frame size and disk space"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    height, width = (side + side % 2 for side in size)
    return EncodeResult(
        num_frames=count,
        width=width,
        height=height,
        seconds=float(count / rate),
        has_audio=track is not None and track.written > 0,
        audio_note=note,
    )


def _rate(fps: float | Fraction) -> Fraction:
    if not (math.isfinite(fps) and 0 < fps <= 1000):
        raise VideoError(f"fps is {fps}, expected a rate of 0 to 1000 frames a second")
    # 1001 is the denominator of the broadcast rates; their floats come back as 30000/1001.
    rate = Fraction(fps).limit_denominator(1001)
    if rate <= 0:
        raise VideoError(f"fps is {fps}, expected at least one frame in 1000 seconds")
    return rate


def _checked(frame: np.ndarray, size: tuple[int, ...] | None, path: Path) -> np.ndarray:
    expected = f"uint8 frames of {size or '(H, W)'} with 3 channels"
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3:
        given = getattr(frame, "dtype", type(frame).__name__), getattr(frame, "shape", "")
        raise VideoError(f"{path}: given {given[0]} {given[1]}, expected {expected}")
    if frame.shape[2] != 3 or (size is not None and frame.shape[:2] != size):
        raise VideoError(f"{path}: given a frame {frame.shape}, expected {expected}")
    if not all(1 <= side <= MAX_SIDE for side in frame.shape[:2]):
        raise VideoError(f"{path}: given a frame {frame.shape}, expected sides of 1 to {MAX_SIDE}")
    return frame


def _add_video(container: OutputContainer, size, rate: Fraction, options: dict, gop: int):
    # Without cpu-independent, x264's macroblock tree rounds by how its buffers happen to be aligned
    # and the same frames give different bytes even within one process.
    params = "threads=1:sliced-threads=0:cpu-independent=1"
    video = container.add_stream("libx264", rate=rate, options={**options, "x264-params": params})
    context = video.codec_context
    context.height, context.width = (side + side % 2 for side in size)
    context.pix_fmt = "yuv420p"
    context.time_base = 1 / rate
    context.gop_size = gop
    context.thread_count = 1
    context.color_range = ColorRange.MPEG
    context.colorspace = 1  # AVCOL_SPC_BT709
    context.color_trc = ColorTrc.BT709
    context.color_primaries = ColorPrimaries.BT709
    return video


def _to_yuv(image: np.ndarray) -> VideoFrame:
    odd = [(0, side % 2) for side in image.shape[:2]]
    if any(pad for _, pad in odd):
        image = np.pad(image, [*odd, (0, 0)], mode="edge")
    frame = VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    frame = frame.reformat(
        format="yuv420p",
        dst_colorspace=Colorspace.ITU709,
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
        interpolation=PRECISE,
        threads=1,
    )
    frame.color_trc, frame.color_primaries = ColorTrc.BT709, ColorPrimaries.BT709
    return frame


def _commit(temporary: Path, path: Path) -> None:
    """Make the finished file durable and give it its name."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
