"""The shipped alignment weights: better than the closed form on people they were not trained on."""

import numpy as np
import pytest
import torch

from animator.alignment_weights import open_alignment, shipped_alignment
from inference.alignment.benchmark import evaluate_alignment
from inference.alignment.settings import SETTINGS
from inference.clip_alignment import AlignmentSettings, align_clip, align_frames, sum_frames
from tests.unit.test_motion import write_motion


def test_the_shipped_weights_are_a_few_megabytes():
    assert sum(path.stat().st_size for path in shipped_alignment().iterdir()) < 4e6


def test_the_shipped_weights_beat_the_closed_form_on_made_up_motion(tmp_path):
    motion = write_motion(tmp_path / "motion")
    rows = evaluate_alignment(motion, clips=60, num_frames=16, setting="half")["rows"]
    assert rows["learned"]["dis"] < 0.95 * rows["similarity"]["dis"]
    assert rows["learned_clip"]["dis"] < 0.95 * rows["similarity_clip"]["dis"]
    assert rows["learned_clip"]["jitter"] < 1e-6


def test_a_clip_in_place_is_left_there_and_a_misaligned_one_is_not():
    block, _ = open_alignment("shipped")
    pose = torch.tensor(_standing())
    driven = pose + 0.01 * torch.randn(1, 20, 18, 2, generator=torch.Generator().manual_seed(0))
    weight, frame = torch.ones(1, 20, 18), torch.tensor([[1.0, 0.75]])

    def aligned(points: torch.Tensor) -> bool:
        frames = align_frames(block, pose[None], points, weight, frame)
        sums = sum_frames(frames, points, weight)
        return bool(align_clip(sums, AlignmentSettings()).aligned)

    assert aligned(driven)
    assert not aligned(0.6 * driven + 0.2)


def _standing() -> np.ndarray:
    """Somebody who stands in the middle of the frame, isotropic."""
    joints = [
        (0, -0.33), (0, -0.27), (-0.07, -0.26), (-0.09, -0.13), (-0.1, -0.01), (0.07, -0.26),
        (0.09, -0.13), (0.1, -0.01), (-0.04, 0), (-0.05, 0.17), (-0.05, 0.34), (0.04, 0),
        (0.05, 0.17), (0.05, 0.34), (-0.015, -0.345), (0.015, -0.345), (-0.03, -0.335),
        (0.03, -0.335),
    ]  # fmt: skip
    return np.array(joints, np.float32)


@pytest.mark.real_data
def test_on_real_motion_the_shipped_weights_are_as_good_as_stated(data_root):
    """Dis of 300 clips of sequences that were not trained on (the figures of docs/align.md)."""
    rows = evaluate_alignment(data_root / "motion" / "val")["rows"]
    dis = {name: row["dis"] for name, row in rows.items()}
    assert dis["learned"] <= 0.70 * dis["similarity"]
    assert dis["learned"] <= dis["oracle"]
    assert dis["learned_clip"] <= 0.70 * dis["similarity_clip"]
    assert dis["learned_clip"] <= 1.05 * dis["oracle_clip"]


@pytest.mark.real_data
@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "full"])
def test_hard_poses_are_never_aligned_worse_than_in_closed_form(data_root, name):
    rows = evaluate_alignment(data_root / "motion" / "val", clips=32, setting=name)["rows"]
    assert rows["learned_clip"]["dis"] <= rows["similarity_clip"]["dis"]
    if name == "aligned":
        assert rows["learned_clip"]["dis"] <= rows["none"]["dis"] + 0.01


@pytest.mark.real_data
def test_recorded_poses_keep_the_order(data_root):
    rows = evaluate_alignment(poses=data_root / "pose2d", clips=60)["rows"]
    dis = {name: row["dis"] for name, row in rows.items()}
    assert dis["learned"] < dis["similarity"] < dis["affine"] < dis["none"]
    assert dis["learned_clip"] < dis["similarity_clip"] < dis["similarity"]
