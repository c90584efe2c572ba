"""One pass over a source: the shots, and samples of them that take no more room than they may."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipelines.curation.config import CurationConfig
from pipelines.curation.frames import FrameSpool, SpooledFrames
from pipelines.curation.scan import Samples, scan_source
from pipelines.curation.shots import find_shots
from pipelines.overrides import apply_overrides
from pipelines.video import VideoError, encode, iter_frames, probe

FPS = 20
CONFIG = apply_overrides(CurationConfig(), ["samples.side=128"])


@pytest.fixture
def file() -> Iterator[int]:
    with tempfile.TemporaryFile() as stream:
        yield stream.fileno()


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seconds of one picture that pans, two of another."""
    path = tmp_path_factory.mktemp("video") / "two_shots.mp4"
    frames = []
    for seed, length in ((1, 60), (2, 40)):
        noise = np.random.default_rng(seed).integers(0, 255, (9, 16, 3), dtype=np.uint8)
        scene = cv2.resize(noise, (400, 160), interpolation=cv2.INTER_CUBIC)
        frames += [np.ascontiguousarray(scene[:, n : n + 256]) for n in range(length)]
    encode(path, frames, fps=FPS, crf=12)
    return path


def numbered(value: int) -> np.ndarray:
    return np.full((8, 12, 3), value % 251, np.uint8)


def samples(file: int, *settings: str, fps: float = 5.0) -> Samples:
    config = apply_overrides(CurationConfig(), settings)
    return Samples(FrameSpool(file, (8, 12)), fps, config)


def test_frames_come_back_as_they_were_and_slots_are_used_again(file):
    spool = FrameSpool(file, (8, 12))
    slots = [spool.put(numbered(n)) for n in range(4)]
    spool.drop(slots[1])
    assert spool.put(numbered(9)) == slots[1]
    assert os.fstat(file).st_size == 4 * 8 * 12 * 3
    frames = SpooledFrames(spool, [3, 1, 0])
    assert [int(frame[0, 0, 0]) for frame in frames] == [3, 9, 0]
    assert [int(frame[0, 0, 0]) for frame in frames[1:]] == [9, 0]
    with pytest.raises(VideoError, match="never"):
        spool.get(7)


def test_one_pass_gives_the_shots_and_frames_at_their_times(file, video):
    info = probe(video)
    scan = scan_source(video, info, CONFIG, lambda shape: FrameSpool(file, shape))
    assert scan.shots == find_shots(video, info, CONFIG.shots)
    assert [(cut.kind, cut.start) for cut in scan.shots.cuts] == [("cut", 3.0)]
    for start, end in scan.shots.shots:
        sampled = scan.samples.of(start, end)
        assert sampled.fps == 5.0
        np.testing.assert_allclose(sampled.times, np.arange(start, end, 0.2))
        for frame, time in zip(sampled.frames, sampled.times, strict=True):
            shown = next(iter_frames(video, start=time, max_side=128, exact=False))
            np.testing.assert_array_equal(frame, shown)


def test_long_shot_is_thinned_while_it_lasts(file):
    taken = samples(file, "samples.max_frames=20", "output.max_seconds=16")
    largest = 0
    for number in range(2000):
        taken.add(numbered(number), 0)
        largest = max(largest, os.fstat(file).st_size)
    # 80 frames in a clip of 16 s: each fourth is kept, and the newest for a while.
    assert largest < (2000 / 4 + 60) * 8 * 12 * 3
    for start in range(0, 400, 16):
        clip = taken.of(start, start + 16)
        assert (len(clip.frames), clip.fps) == (20, 1.25)
        assert np.diff(clip.times) == pytest.approx(0.8)
        values = [int(frame[0, 0, 0]) for frame in clip.frames]
        assert values == [round(5 * time) % 251 for time in clip.times]


def test_short_shot_after_a_long_one_keeps_all_its_samples(file):
    taken = samples(file, "samples.max_frames=20", "output.max_seconds=16")
    for number in range(920):
        # The change at 900 is only known when 4 more samples are in.
        taken.add(numbered(number), 900 if number >= 904 else 0)
    clip = taken.of(180.0, 184.0)
    assert (len(clip.frames), clip.fps) == (20, 5.0)
    assert clip.times[0] == 180.0


def test_all_samples_together_are_bounded(file, monkeypatch):
    monkeypatch.setattr("pipelines.curation.scan._SPOOL_BYTES", 100 * 8 * 12 * 3)
    taken = samples(file, "samples.max_frames=10")
    for number in range(3000):
        taken.add(numbered(number), number - number % 8)  # a shot every 1.6 s
    assert os.fstat(file).st_size <= 140 * 8 * 12 * 3
    assert len(taken.of(100.0, 150.0).frames) > 0
    assert len(taken.of(598.4, 600.0).frames) == 8


def test_span_shorter_than_the_grid_has_the_nearest_sample(file):
    taken = samples(file)
    for number in range(10):
        taken.add(numbered(number), 0)
    assert [int(frame[0, 0, 0]) for frame in taken.of(1.05, 1.15).frames] in ([5], [6])
    assert [int(frame[0, 0, 0]) for frame in taken.of(2.5, 2.6).frames] == [9]
