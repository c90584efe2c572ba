"""Frames of a driving clip, decoded when they are asked for."""

import numpy as np
import pytest

from inference.perception import AnimationError, Perception
from inference.small_frames import SmallFrames
from pipelines.video import VideoError, VideoLimits, decode, encode

LIMITS = VideoLimits()


@pytest.mark.real_data
def test_frames_are_those_of_decoding_the_whole_clip(data_root):
    clip = data_root / "video" / "moore_talking_1.mp4"
    options = {"fps": 4.0, "max_side": 64}
    whole = decode(clip, **options)
    frames = SmallFrames(clip, limits=LIMITS, **options)
    assert len(frames) == len(whole)
    for start in range(0, len(whole), 5):
        part = frames[start : start + 5]
        assert np.array_equal(np.stack(part), whole[start : start + 5])
    assert np.array_equal(frames[2], whole[2])  # back again
    assert np.array_equal(frames[-1], whole[-1])


def test_poses_are_looked_for_without_all_frames_in_memory(tmp_path, no_models):
    clip = tmp_path / "clip.mp4"
    encode(clip, [np.full((32, 48, 3), 9 * t, np.uint8) for t in range(25)], fps=10)
    perception, held = Perception(), []

    class Backend:
        name, licence, reason, threshold = "watching", "none", "", 0.3

        def track(self, frames, *, source=None, times=None, rate=None):
            from pipelines.pose import PoseTrack

            for start in range(0, len(frames), 8):
                held.append(len(frames[start : start + 8]))
            ones = np.ones((len(frames), 1, 18), np.float32)
            points, boxes = np.ones((*ones.shape, 2), np.float32), np.ones((len(ones), 1, 4))
            return PoseTrack(keypoints=points, score=ones, boxes=boxes, backend="watching")

    perception.poses = Backend()
    info = perception.probe(clip)
    frames = perception.frames(clip, info)
    assert isinstance(frames, SmallFrames)
    assert perception.driving(clip, info, frames).keypoints.shape == (25, 1, 18, 2)
    assert held == [8, 8, 8, 1]


def test_frames_out_of_range_and_clips_too_long_are_refused(tmp_path, no_models, monkeypatch):
    clip = tmp_path / "clip.mp4"
    encode(clip, [np.full((16, 16, 3), t, np.uint8) for t in range(6)], fps=10)
    with pytest.raises(IndexError, match="frame 6 of 6"):
        SmallFrames(clip, fps=10, max_side=16, limits=LIMITS)[6]
    (tmp_path / "no.mp4").write_bytes(b"nothing")
    with pytest.raises(VideoError):
        SmallFrames(tmp_path / "no.mp4", fps=10, max_side=16, limits=LIMITS)
    monkeypatch.setattr("inference.perception.MAX_FRAMES", 5)
    with pytest.raises(AnimationError, match="6 frames, expected at most 5"):
        Perception().frames(clip, Perception.probe(clip))
