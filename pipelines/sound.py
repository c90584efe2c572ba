"""The sound of a clip: decoded from one file, cut to a span, written as AAC beside new frames.

C channels, S samples
"""

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.container import InputContainer, OutputContainer

from pipelines.container import VideoError, VideoLimits, open_media

AAC_RATES = (48000, 44100, 32000, 24000, 22050, 16000)
AAC_SAMPLES = 1024
SEEK_SECONDS = 5.0
GAP_SECONDS = 0.1


class Sound:
    """Blocks of samples (C, S) of a file from `start` seconds after its first video frame on."""

    def __init__(self, container: InputContainer, path: Path, start: float):
        if not container.streams.audio:
            raise VideoError(f"{path}: has no sound")
        self.container = container
        self.stream = container.streams.audio[0]
        if self.stream.codec_context is None or not self.stream.rate:
            raise VideoError(f"{path}: the codec of its sound is unknown; convert it to AAC")
        self.rate = self.stream.rate if self.stream.rate in AAC_RATES else 48000
        self.layout = "mono" if self.stream.channels == 1 else "stereo"
        origins = [
            float(s.start_time * s.time_base)
            for s in container.streams.video[:1]
            if s.start_time is not None and s.time_base
        ]
        self.begin = (origins[0] if origins else 0.0) + start
        if start > SEEK_SECONDS:
            container.seek(int((self.begin - 1) * av.time_base), backward=True)
        samples = self._samples()
        first = next(samples, None)
        if first is None:
            raise VideoError(f"{path}: its sound cannot be decoded, or ends before {start:.2f} s")
        self.samples: Iterator[np.ndarray] = chain([first], samples)

    def _samples(self) -> Iterator[np.ndarray]:
        """Continuous samples from `begin` on; holes in the file are filled with silence."""
        resampler = AudioResampler(format="fltp", layout=self.layout, rate=self.rate)
        position, tolerance = 0, 0.0
        for frame in chain(self._decoded(), [None]):
            for block in resampler.resample(frame):
                samples = block.to_ndarray()
                offset = 0
                if block.pts is not None and block.time_base:
                    seconds = float(block.pts * block.time_base) - self.begin
                    offset = round(seconds * self.rate) - position
                if offset > tolerance:
                    yield np.zeros((len(samples), offset), np.float32)
                    position += offset
                elif offset < -tolerance:
                    samples = samples[:, -offset:]
                if samples.shape[1]:
                    yield samples
                    position += samples.shape[1]
                    tolerance = GAP_SECONDS * self.rate

    def _decoded(self) -> Iterator[AudioFrame]:
        packets = self.container.demux(self.stream)
        while True:
            try:
                packet = next(packets)
            except (StopIteration, av.FFmpegError):
                return
            try:
                yield from packet.decode()  # type: ignore[misc]
            except av.FFmpegError:
                continue


@contextmanager
def open_sound(path: str | Path, start: float) -> Iterator[Sound]:
    """The first sound track of `path` from `start` seconds on; VideoError where there is none."""
    path = Path(path)
    with open_media(path, VideoLimits()) as container:
        try:
            sound = Sound(container, path, start)
        except av.FFmpegError as error:
            raise VideoError(f"{path}: its sound cannot be read ({error.strerror})") from None
        yield sound


class SoundTrack:
    """An AAC track that keeps up with the video and ends with it."""

    def __init__(self, container: OutputContainer, sound: Sound, seconds: float | None):
        self.container, self.sound = container, sound
        self.limit = None if seconds is None else round(seconds * sound.rate)
        self.stream = container.add_stream("aac", rate=sound.rate, layout=sound.layout)
        self.waiting: list[np.ndarray] = []
        self.decoded = self.written = 0

    def advance(self, seconds: float) -> None:
        """Write the sound up to `seconds`, in whole AAC frames."""
        self._draw(seconds)
        samples = np.concatenate(self.waiting, 1) if self.waiting else np.zeros((1, 0), np.float32)
        whole = samples.shape[1] // AAC_SAMPLES * AAC_SAMPLES
        for begin in range(0, whole, AAC_SAMPLES):
            self._write(samples[:, begin : begin + AAC_SAMPLES])
        self.waiting = [samples[:, whole:]] if samples.shape[1] > whole else []

    def finish(self, seconds: float) -> None:
        """Write what is left up to `seconds`, the length of the video."""
        self.advance(seconds)
        if self.waiting:
            self._write(np.concatenate(self.waiting, 1))
        self.container.mux(self.stream.encode(None))

    def _draw(self, seconds: float) -> None:
        wanted = round(seconds * self.sound.rate)
        wanted = wanted if self.limit is None else min(wanted, self.limit)
        while self.decoded < wanted:
            samples = next(self.sound.samples, None)
            if samples is None:
                return
            extra = samples[:, wanted - self.decoded :]
            samples = samples[:, : wanted - self.decoded]
            if extra.shape[1]:
                self.sound.samples = chain([extra], self.sound.samples)
            self.waiting.append(samples)
            self.decoded += samples.shape[1]

    def _write(self, samples: np.ndarray) -> None:
        frame = AudioFrame.from_ndarray(
            np.ascontiguousarray(samples), format="fltp", layout=self.sound.layout
        )
        frame.sample_rate = self.sound.rate
        frame.pts, frame.time_base = self.written, Fraction(1, self.sound.rate)
        self.container.mux(self.stream.encode(frame))
        self.written += samples.shape[1]
