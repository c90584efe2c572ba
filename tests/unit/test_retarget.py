"""Driving poses onto the reference: one transform a clip, other frame shapes, bad frames."""

import numpy as np
import torch

from animator.keypoints import NUM_KEYPOINTS, WHOLE_BODY, from_isotropic, to_isotropic
from animator.similarity import Similarity, apply
from inference.retarget import retarget, unaligned

SIZE = (256, 192)


def walker(num_frames: int = 24) -> np.ndarray:
    """A body whose arms swing and that moves a little; `(T, 1, 18, 2)` in 0..1."""
    rng = np.random.default_rng(0)
    body = rng.normal(0.5, 0.12, size=(18, 2))
    frames = np.repeat(body[None, None], num_frames, axis=0)
    swing = np.sin(np.linspace(0, 6, num_frames))
    frames[:, 0, 4, 0] += 0.1 * swing
    frames[:, 0, 7, 1] += 0.1 * swing
    return frames.astype(np.float32)


def misalign(points: np.ndarray, scale: float, degrees: float, shift: tuple[float, float]):
    angle = torch.tensor(np.deg2rad(degrees), dtype=torch.float32)
    transform = Similarity(torch.tensor(scale), angle.cos(), angle.sin(), torch.tensor(shift))
    height, width = SIZE
    isotropic = torch.from_numpy(to_isotropic(points, width, height))
    return from_isotropic(apply(transform, isotropic).numpy(), width, height)


def run(driving: np.ndarray, score: np.ndarray | None = None, **options):
    reference = walker()[0, 0]
    score = np.ones(driving.shape[:3], np.float32) if score is None else score
    return retarget(
        None,
        (reference, np.ones(18, np.float32)),
        (driving, score),
        (SIZE, SIZE),
        (0.3, 0.3),
        **options,
    )


def test_a_constant_misalignment_is_taken_out_and_the_motion_kept():
    clip = walker()
    result = run(misalign(clip, 0.6, 20, (0.1, -0.05)))
    assert abs(result.scale * 0.6 - 1) < 0.05
    assert abs(result.degrees + 20) < 3
    moved = result.keypoints[:, 0, 4] - result.keypoints[0, 0, 4]
    truth = clip[:, 0, 4] - clip[0, 0, 4]
    np.testing.assert_allclose(moved, truth, atol=0.01)


def test_the_body_alone_decides_and_hands_and_face_go_along():
    clip = walker()
    driving = misalign(clip, 0.6, 20, (0.1, -0.05))
    alone = run(driving)
    # Hands and face are the body's own joints again, so that they must land where those do.
    again = np.arange(NUM_KEYPOINTS, WHOLE_BODY) % NUM_KEYPOINTS
    whole = np.concatenate([driving, driving[:, :, again]], 2)
    result = run(whole)
    assert result.record() == alone.record()
    np.testing.assert_allclose(result.keypoints[:, :, :NUM_KEYPOINTS], alone.keypoints, atol=1e-6)
    np.testing.assert_allclose(
        result.keypoints[:, :, NUM_KEYPOINTS:], alone.keypoints[:, :, again], atol=1e-6
    )
    whole[:, :, NUM_KEYPOINTS:] = 0.9
    assert run(whole).record() == alone.record()


def test_frames_with_a_wrong_pose_have_no_say():
    clip = walker()
    driving = misalign(clip, 0.6, 20, (0.1, 0.0))
    clean = run(driving)
    driving[3] = np.random.default_rng(1).random((1, 18, 2))
    spoilt = run(driving)
    assert abs(spoilt.scale - clean.scale) < 0.02
    assert abs(spoilt.degrees - clean.degrees) < 1


def test_frames_without_common_joints_are_left_out():
    score = np.ones((24, 1, 18), np.float32)
    score[5:10] = 0
    result = run(misalign(walker(), 0.6, 20, (0.1, 0.0)), score)
    assert result.frames_used == 19
    nothing = run(walker(), np.zeros((24, 1, 18), np.float32))
    assert nothing.frames_used == 0
    assert (nothing.scale, nothing.degrees) == (1, 0)


def test_per_frame_puts_every_frame_on_the_reference():
    clip = walker()
    clip[:, :, :, 0] += np.linspace(0, 0.3, 24, dtype=np.float32)[:, None, None]
    one, many = run(clip), run(clip, per_frame=True)
    assert np.ptp(one.keypoints[:, 0, :, 0].mean(1)) > 0.25
    assert np.ptp(many.keypoints[:, 0, :, 0].mean(1)) < 0.02


def test_without_alignment_bodies_keep_their_shape_in_another_frame():
    clip = walker()
    result = unaligned(clip, ((100, 100), SIZE))
    before = clip[0, 0] * [192, 256]
    after = result.keypoints[0, 0] * 100

    def ratio(points: np.ndarray) -> float:
        return float(np.linalg.norm(points[0] - points[1]) / np.linalg.norm(points[2] - points[5]))

    assert abs(ratio(before) - ratio(after)) < 1e-4
    assert "no alignment" in result.describe()
