"""Driving poses onto the reference: one transform a clip, other frame shapes, bad frames."""

import numpy as np
import pytest
import torch

from animator.alignment import AlignmentBlock
from animator.config import AlignmentConfig
from animator.keypoints import NUM_KEYPOINTS, WHOLE_BODY, from_isotropic, to_isotropic
from animator.similarity import Similarity, apply
from inference.alignment.verdict import PersonAlignment
from inference.clip_alignment import AlignmentSettings
from inference.retarget import Retargeted, retarget, unaligned

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
        AlignmentSettings(**options),
    )


def test_a_constant_misalignment_is_taken_out_and_the_motion_kept():
    clip = walker()
    result = run(misalign(clip, 0.6, 20, (0.1, -0.05)))
    assert abs(result.main.scale * 0.6 - 1) < 0.05
    assert abs(result.main.degrees + 20) < 3
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
    assert abs(spoilt.main.scale - clean.main.scale) < 0.02
    assert abs(spoilt.main.degrees - clean.main.degrees) < 1


def test_frames_without_common_joints_are_left_out():
    score = np.ones((24, 1, 18), np.float32)
    score[5:10] = 0
    result = run(misalign(walker(), 0.6, 20, (0.1, 0.0)), score)
    assert result.main.frames_used == 19
    nothing = run(walker(), np.zeros((24, 1, 18), np.float32))
    assert nothing.main.frames_used == 0
    assert (nothing.main.scale, nothing.main.degrees) == (1, 0)


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


def test_scale_and_rotation_are_held_at_the_limits_and_the_place_is_kept():
    driving = misalign(walker(), 0.4, 40, (0.1, -0.05))
    free, held = run(driving), run(driving, max_scale=1.5, max_rotation=10)
    assert free.main.scale > 2.2
    assert free.main.degrees < -35
    assert abs(held.main.scale - 1.5) < 1e-4
    assert abs(held.main.degrees + 10) < 1e-3
    assert any("beyond the limits" in text for text in held.warnings)
    assert not any("beyond the limits" in text for text in free.warnings)
    centres = [result.keypoints.mean((0, 1, 2)) for result in (free, held)]
    np.testing.assert_allclose(*centres, atol=0.01)
    each = run(driving, max_scale=1.5, max_rotation=10, per_frame=True)
    np.testing.assert_allclose(each.keypoints.mean((0, 1, 2)), centres[0], atol=0.02)


def people(*places: float) -> tuple[np.ndarray, np.ndarray]:
    """People side by side, of different sizes; `(T, P, 18, 2)`."""
    clips = [(walker() - 0.5) * (0.3 + 0.1 * i) + [x, 0.5] for i, x in enumerate(places)]
    keypoints = np.concatenate(clips, 1).astype(np.float32)
    return keypoints, np.ones(keypoints.shape[:3], np.float32)


def align(reference, driving, **options):
    return retarget(
        None, reference, driving, (SIZE, SIZE), (0.3, 0.3), AlignmentSettings(**options)
    )


def test_several_people_are_matched_from_left_to_right_and_aligned_one_by_one():
    (still, seen), driving = people(0.2, 0.75), people(0.8, 0.3)
    result = align((still[0], seen[0]), driving)
    assert [(p.reference, p.driving) for p in result.people] == [(1, 0), (0, 1)]
    np.testing.assert_allclose(result.keypoints[0, 0].mean(0), still[0, 1].mean(0), atol=0.01)
    np.testing.assert_allclose(result.keypoints[0, 1].mean(0), still[0, 0].mean(0), atol=0.01)
    assert len(result.record()["people"]) == 2
    # Alone in the picture, one moves both: the other goes along.
    alone = align((still[0, :1], seen[0, :1]), driving)
    assert len(alone.people) == 1
    gap = alone.keypoints[0, 0].mean(0) - alone.keypoints[0, 1].mean(0)
    before = driving[0][0, 0].mean(0) - driving[0][0, 1].mean(0)
    np.testing.assert_allclose(gap, before * alone.main.scale, atol=0.02)


def test_people_who_are_never_seen_are_nobody():
    (still, seen), (moving, score) = people(0.2, 0.75), people(0.8, 0.3)
    score[:, 0] = 0
    result = align((still[0], seen[0]), (moving, score))
    assert [(p.reference, p.driving) for p in result.people] == [(0, 1)]


def test_too_few_joints_in_common_fall_back_to_the_shift_and_then_to_nothing():
    clip, score = misalign(walker(), 0.6, 20, (0.1, 0.0)), np.zeros((24, 1, 18), np.float32)
    score[:, :, :2] = 1
    shifted = run(clip, score)
    assert shifted.main.method == "translation"
    assert (shifted.main.scale, shifted.main.degrees) == (1, 0)
    np.testing.assert_allclose(
        shifted.keypoints[:, 0, :2].mean((0, 1)), walker()[0, 0, :2].mean(0), atol=1e-4
    )
    nothing = run(clip, score * 0)
    assert nothing.main.method == "none"
    np.testing.assert_allclose(nothing.keypoints, clip, atol=1e-5)
    for result in (shifted, nothing):
        assert result.warnings == [*result.main.notes]
        assert result.main.notes[0] in result.describe() or "too few" in result.describe()


def test_joints_without_a_place_are_missing_ones():
    clip = misalign(walker(), 0.6, 20, (0.1, 0.0))
    clean = run(clip)
    clip[::2, 0, 3] = np.nan
    result = run(clip)
    assert abs(result.main.scale - clean.main.scale) < 0.05
    assert result.main.frames_used == 24


def test_a_long_clip_in_portions_is_aligned_as_one():
    clip = misalign(np.concatenate([walker()] * 60), 0.6, 20, (0.1, 0.0))  # 1440 frames
    result = run(clip)
    assert result.main.frames_used == 1440
    assert abs(result.main.scale - run(clip[:24]).main.scale) < 1e-3


def test_what_should_not_be_trusted_is_said():
    away = walker()
    away[..., 0] += 0.55  # the reference stands at the edge: half the joints leave the picture
    edge = away[0, 0].copy()
    result = retarget(
        None,
        (edge, np.ones(18, np.float32)),
        (walker(), np.ones((24, 1, 18), np.float32)),
        (SIZE, SIZE),
        (0.3, 0.3),
    )
    assert any("leave the picture" in text for text in result.warnings)
    small = run(misalign(walker(), 0.3, 0, (0.0, 0.0)))
    assert any("extreme" in text for text in small.warnings)
    score = np.zeros((24, 1, 18), np.float32)
    score[:, :, :4] = 1
    assert any("joints are seen in both" in text for text in run(walker(), score).warnings)
    assert run(misalign(walker(), 0.8, 5, (0.0, 0.0))).warnings == []


def untrained(expected_error: float) -> AlignmentBlock:
    """The closed form, sure of an error of so many sizes of the person."""
    block = AlignmentBlock(AlignmentConfig(width=16, num_heads=2)).eval()
    torch.nn.init.constant_(block.error_head[-1].bias, float(np.log(expected_error)))
    return block


def test_poses_that_fit_are_left_alone_unless_that_is_switched_off():
    reference = (walker()[0, 0], np.ones(18, np.float32))
    nearly = misalign(walker(), 0.97, 2, (0.01, 0.0))
    far = misalign(walker(), 0.6, 20, (0.2, 0.0))

    def method(driving: np.ndarray, **options) -> str:
        score = np.ones(driving.shape[:3], np.float32)
        result = retarget(
            untrained(0.1),
            reference,
            (driving, score),
            (SIZE, SIZE),
            (0.3, 0.3),
            AlignmentSettings(**options),
        )
        if result.main.method == "kept":
            np.testing.assert_allclose(result.keypoints, driving, atol=1e-5)
            assert "already fit" in result.describe()
        return result.main.method

    assert method(nearly) == "kept"
    assert method(nearly, per_frame=True) == "kept"
    assert method(nearly, keep_aligned=False) == "learned"
    assert method(far) == "learned"


@pytest.mark.parametrize(
    "wrong", [{"max_scale": 0.5}, {"max_rotation": -1}, {"max_rotation": 200}, {"max_scale": 1e3}]
)
def test_limits_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        AlignmentSettings(**wrong)


def test_few_joints_in_common_are_aligned_in_closed_form_and_it_is_said():
    reference = (walker()[0, 0], np.ones(18, np.float32))
    clip, score = misalign(walker(), 0.6, 20, (0.1, 0.0)), np.ones((24, 1, 18), np.float32)
    block = untrained(0.1)
    torch.nn.init.constant_(block.head[-1].bias, 0.5)  # wrong wherever it is asked

    def aligned(score: np.ndarray):
        return retarget(block, reference, (clip, score), (SIZE, SIZE), (0.3, 0.3))

    score[:, :, 5:] = 0
    head = aligned(score)
    assert head.main.method == "closed_form"
    assert "closed form" in head.main.notes[0]
    assert abs(head.main.scale * 0.6 - 1) < 0.1
    # One frame with more is enough for the block, and the others do not count.
    score[3] = 1
    whole = aligned(score)
    assert whole.main.method == "learned"
    assert whole.main.frames_used == 1
    each = retarget(
        block,
        reference,
        (clip, score),
        (SIZE, SIZE),
        (0.3, 0.3),
        AlignmentSettings(per_frame=True),
    )
    assert np.isfinite(each.keypoints).all()


def test_who_passes_by_for_a_moment_is_nobody():
    (still, seen), (moving, score) = people(0.2, 0.75), people(0.8, 0.3, 0.1)
    score[4:, 2] = 0
    result = align((still[0], seen[0]), (moving, score))
    assert [(p.reference, p.driving) for p in result.people] == [(1, 0), (0, 1)]
    score[4:, 2] = 1
    three = align((still[0], seen[0]), (moving[:, [2, 0, 1]], score))
    assert len(three.people) == 2


def test_to_be_unsure_is_no_reason_to_leave_poses_where_they_are():
    reference = (walker()[0, 0], np.ones(18, np.float32))
    far = misalign(walker(), 0.7, 10, (0.1, 0.0))
    result = retarget(
        untrained(5.0), reference, (far, np.ones((24, 1, 18))), (SIZE, SIZE), (0.3, 0.3)
    )
    assert result.main.method == "learned"
    assert result.main.confidence == "low"
    assert any("unsure" in text for text in result.warnings)


def test_only_people_who_move_somebody_are_drawn_but_where_they_are_lost():
    aligned = Retargeted(np.zeros((4, 3, 18, 2)), (PersonAlignment(method="none", driving=1),))
    score = np.zeros((4, 3, 18), np.float32)
    score[:2, 1] = 0.9
    score[:3, 2] = 0.8  # from the third frame on the matched person is lost
    drawn = aligned.drawn(score, 0.3, others=False)
    assert (drawn >= 0.3).any(-1).tolist() == [
        [False, True, False],
        [False, True, False],
        [False, False, True],
        [False, False, False],
    ]
    assert aligned.drawn(score, 0.3, others=True) is score
