"""Clips with hands and faces: what learns from bodies sees bodies, what draws shows everything."""

import numpy as np
import pytest
import torch

from animator.keypoints import BODY, FACE
from pipelines.clips import ClipStore
from pipelines.curation.pose_parts import pose_scores
from pipelines.pose import PoseTrack
from tests.unit.test_clips import write_shard
from training.align import AlignConfig
from training.frames import FramedClips


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "shards"
    root.mkdir()
    write_shard(root, tmp_path, 0, {"aa_000": 3}, num_keypoints=128)
    return root


def test_alignment_learns_from_the_body(folder):
    task = AlignConfig(shards=str(folder)).build_task(0)
    points, score = task.pairs.poses(0)
    assert (points.shape, score.shape) == ((3, 18, 2), (3, 18))
    batch = task.batch([0, 1])
    loss, _ = task.loss(task.build(), batch)
    assert torch.isfinite(loss)


def test_training_poses_show_the_face(folder):
    clips = FramedClips(ClipStore(folder), (64, 64), "pad")
    light = clips.clip(0)
    assert light.keypoints.shape == (3, 2, 128, 2)
    light.keypoints[:, :, FACE] = np.linspace(0.1, 0.3, 68)[:, None]
    with_face = clips.poses(0, np.array([0]))[0]
    clips = FramedClips(ClipStore(folder), (64, 64), "pad", style="published")
    assert not np.array_equal(clips.poses(0, np.array([0]))[0], with_face)
    # As it was stored: every point in the middle.
    stored = FramedClips(ClipStore(folder), (64, 64), "pad").poses(0, np.array([0]))[0]
    corner = np.s_[6:20, 6:20]
    assert with_face[corner].max() > 80
    assert stored[corner].max() == 0


def test_curation_judges_the_body_alone():
    score = np.zeros((10, 2, 128), np.float32)
    score[:, 0, BODY] = 0.9
    score[:, 1, FACE] = 0.9  # a face in the background
    score[5:, 0, :9] = 0
    track = PoseTrack(
        keypoints=np.zeros((10, 2, 128, 2), np.float32), score=score, boxes=np.zeros((10, 2, 4))
    )
    whole = pose_scores(track)[1]
    body = PoseTrack(
        keypoints=track.keypoints[:, :, BODY], score=score[:, :, BODY], boxes=track.boxes
    )
    assert whole == pose_scores(body)[1]
    assert whole == {"pose_missing": [0.0] * 5 + [0.5] * 5}
    assert track.missing_share() == 0.25
