"""Recorded 2-D poses in the layouts of others, and alignment measured on them."""

from pathlib import Path

import numpy as np
import pytest

from animator.keypoints import from_isotropic
from inference.alignment.benchmark import evaluate_alignment
from pipelines.npz_files import NpzError
from pipelines.pose_sequences import PoseFileError, PoseSequences
from pipelines.video import encode


def body(num_frames: int = 30) -> np.ndarray:
    """A swaying body, `(T, 18, 2)` in 0..1."""
    rng = np.random.default_rng(0)
    points = np.repeat(rng.uniform(0.3, 0.7, (1, 18, 2)), num_frames, 0)
    points[:, :, 0] += 0.05 * np.sin(np.linspace(0, 6, num_frames))[:, None]
    return points.astype(np.float32)


def write_all(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    points, score = body(), np.ones((30, 18), np.float32)
    size = np.array([200, 100])
    np.savez(folder / "a.pose.npz", keypoints=points[:, None], score=score[:, None], size=size)
    np.savez(folder / "b.dwpose.npz", candidate=points, subset=score[:, None], size=size)
    np.savez(folder / "c.npz", keypoints=points * [100, 200], score=score, size=size)
    return folder


def test_layouts_of_others_are_the_same_poses(tmp_path):
    ours, dwpose, openpose = PoseSequences(write_all(tmp_path)).sequences
    for other in (dwpose, openpose):
        np.testing.assert_allclose(other.points, ours.points, atol=1e-5)
    np.testing.assert_allclose(from_isotropic(ours.points, 100, 200), body(), atol=1e-5)


def test_the_frame_s_shape_comes_from_the_video_beside_it_or_from_pixels(tmp_path):
    points, score = body(), np.ones((30, 18), np.float32)
    np.savez(tmp_path / "a.dwpose.npz", candidate=points, subset=score[:, None])
    with pytest.raises(PoseFileError, match="frame's shape is not known"):
        PoseSequences(tmp_path)
    encode(tmp_path / "a.mp4", np.zeros((4, 64, 32, 3), np.uint8), fps=10)
    assert PoseSequences(tmp_path).sequences[0].size == (64, 32)
    np.savez(tmp_path / "b.npz", keypoints=points * [300, 400], score=score)
    height, width = PoseSequences(tmp_path).sequences[1].size
    assert 280 < height < 320
    assert 200 < width < 260


def test_unseen_joints_and_joints_without_a_place_count_as_missing(tmp_path):
    points, score = body(), np.ones((30, 18), np.float32)
    points[:, 3] = np.nan
    score[:, 4] = 0.1
    score[:, 5] = -1
    np.savez(tmp_path / "a.npz", candidate=points, subset=score[:, None], size=[100, 100])
    one = PoseSequences(tmp_path).sequences[0]
    assert (one.score[:, [3, 4, 5]] == 0).all()
    assert np.isfinite(one.points).all()
    assert (one.score[:, 6:] > 0).all()


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"joints": np.zeros(3)}, "expected keypoints and score"),
        ({"keypoints": np.zeros((9, 17, 2)), "score": np.zeros((9, 17))}, "expected"),
        ({"candidate": np.zeros((9, 18, 2)), "subset": np.zeros((9, 1, 18))}, "no joint"),
        ({"candidate": np.ones((2, 18, 2)), "subset": np.ones((2, 1, 18))}, "at least 4 frames"),
    ],
)
def test_files_in_no_known_layout_are_refused(tmp_path, arrays, said):
    np.savez(tmp_path / "a.npz", size=[10, 10], **arrays)
    with pytest.raises(PoseFileError, match=said):
        PoseSequences(tmp_path)


def test_damaged_files_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(PoseFileError, match="holds no"):
        PoseSequences(tmp_path)
    (tmp_path / "a.npz").write_bytes(b"PK not really")
    with pytest.raises(NpzError, match="cannot be read"):
        PoseSequences(tmp_path)
    with pytest.raises(PoseFileError, match="is no folder"):
        PoseSequences(tmp_path / "nowhere")


def test_alignment_is_measured_on_recorded_poses(tmp_path):
    result = evaluate_alignment(
        poses=write_all(tmp_path), clips=6, num_frames=8, alignment="closed-form"
    )
    rows = result["rows"]
    assert result["settings"].keys() == {"recorded"}
    assert rows["none"]["dis"] > 5 * rows["similarity"]["dis"]
    assert rows["oracle"]["rotation"] < 1e-3
    assert result["data"]["sequences"] == 3
    with pytest.raises(ValueError, match="Got neither"):
        evaluate_alignment()
    with pytest.raises(ValueError, match="Got both"):
        evaluate_alignment(tmp_path, poses=tmp_path)
