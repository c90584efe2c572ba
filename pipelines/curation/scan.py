"""A source decoded once: its shots, and sampled frames of them on the disk.

Every frame is looked at small for the shots; a few a second are also set down larger, to be scored.
How many seconds a shot will last is not known while it lasts, so its samples are thinned as it
goes on: whenever it has more than a clip may have, every second one is given up.
"""

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.container import DecodeStats, open_media
from pipelines.curation.config import CurationConfig
from pipelines.curation.frames import FrameSpool, SpooledFrames
from pipelines.curation.shots import ShotScan, ShotScanner
from pipelines.video import VideoInfo, VideoLimits, fit, shown_frames
from pipelines.video_source import RgbConverter, open_source

# The last samples are not thinned yet: a shot change among them may still come to light.
_UNSETTLED_SECONDS = 2.0
_SPOOL_BYTES = 2 << 30


@dataclass(frozen=True, kw_only=True)
class SourceScan:
    """What one pass over a source gave."""

    shots: ShotScan
    samples: "Samples"


@dataclass(frozen=True, kw_only=True)
class SampledFrames:
    """Frames of one span at the constant rate `fps`; `times` are their seconds in the source."""

    frames: SpooledFrames
    fps: float
    times: np.ndarray


def scan_source(
    path: Path,
    info: VideoInfo,
    config: CurationConfig,
    open_spool: Callable[[tuple[int, int]], FrameSpool],
    limits: VideoLimits | None = None,
) -> SourceScan:
    """Decode a source once.

    Args:
        open_spool: makes the spool for frames of (height, width).

    Raises:
        VideoError: the file stops decoding.
    """
    limits = limits or VideoLimits()
    fps = min(info.fps, config.shots.fps)
    step = max(1, math.ceil(fps / config.samples.fps - 1e-6))
    scanner = ShotScanner(fps, config.shots)
    with open_media(path, limits) as container:
        source, first = open_source(container, path, limits, DecodeStats(), exact=False)
        size = fit(source.size, config.samples.side)
        small = RgbConverter(source, fit(source.size, config.shots.side), exact=False)
        large = RgbConverter(source, size, exact=False)
        samples = Samples(open_spool(size), fps / step, config)
        shown, image = None, None
        with closing(shown_frames(source, first, 0.0, None, fps)) as frames:
            for number, frame in enumerate(frames):
                if frame is not shown or image is None:
                    shown, image = frame, small(frame)
                scanner.add(image)
                if number % step == 0:
                    samples.add(large(frame), -(-scanner.shot_start // step))
    return SourceScan(shots=scanner.finish(), samples=samples)


class Samples:
    """Frames on a grid of `fps` a second, of which all, or each 2nd, 4th, 8th… are kept.

    No span of `output.max_seconds` within a shot keeps many more than `samples.max_frames`, and all
    together take no more than 2 GiB.
    """

    def __init__(self, spool: FrameSpool, fps: float, config: CurationConfig) -> None:
        self.spool = spool
        self.fps = fps
        self.max_frames = config.samples.max_frames
        self._capacity = max(2 * self.max_frames, _SPOOL_BYTES // spool.frame_bytes)
        clip = config.output.max_seconds * fps / self.max_frames
        self._longest_stride = 2 ** max(0, math.ceil(math.log2(clip)))
        self._unsettled = math.ceil(_UNSETTLED_SECONDS * fps)
        self._slots: dict[int, int] = {}
        self._count = 0
        self._start = 0  # of the shot that goes on
        self._stride, self._least_stride = 1, 1

    def add(self, frame: np.ndarray, shot_start: int) -> None:
        """Take the next frame; the shot it belongs to began at sample `shot_start`."""
        self._slots[self._count] = self.spool.put(frame)
        self._count += 1
        if shot_start != self._start:
            self._start, self._stride = shot_start, self._least_stride
        settled = self._count - 1 - self._unsettled
        if settled >= self._start and settled % self._stride:
            self._drop(settled)
        kept = (settled - self._start) // self._stride
        if kept > self.max_frames and self._stride < self._longest_stride:
            self._stride *= 2
            self._thin(self._start, settled, self._stride)
        if len(self._slots) > self._capacity:
            self._least_stride *= 2
            self._stride = max(self._stride, self._least_stride)
            self._thin(0, settled, self._least_stride)

    def of(self, start: float, end: float) -> SampledFrames:
        """The samples of a span of seconds: at least one, at most `samples.max_frames`."""
        low = math.ceil(start * self.fps - 1e-6)
        high = max(low + 1, math.ceil(end * self.fps - 1e-6))
        stride = 1
        while stride < 2 * (high - low):
            numbers = range(-(-low // stride) * stride, min(high, self._count), stride)
            if len(numbers) <= self.max_frames and all(n in self._slots for n in numbers):
                break
            stride *= 2
        else:
            numbers = ()
        if not len(numbers):
            # Shorter than the grid is wide: the sample that is nearest stands for it.
            middle = (start + end) / 2 * self.fps
            numbers = [min(self._slots, key=lambda n: (abs(n - middle), n))]
        return SampledFrames(
            frames=SpooledFrames(self.spool, [self._slots[n] for n in numbers]),
            fps=self.fps / stride,
            times=np.array(numbers) / self.fps,
        )

    def _thin(self, low: int, high: int, stride: int) -> None:
        for number in range(low, high + 1):
            if number % stride:
                self._drop(number)

    def _drop(self, number: int) -> None:
        slot = self._slots.pop(number, None)
        if slot is not None:
            self.spool.drop(slot)
