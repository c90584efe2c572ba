"""The report on an alignment: its methods, its pictures, its advice."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from animator.alignment_weights import CHOICES
from animator.keypoints import from_isotropic, to_isotropic
from animator.similarity import Similarity, apply
from inference.alignment import verdict as alignment_verdict
from inference.alignment.advice import ADVICE, advise, compare_forms, decide
from inference.alignment.curves import draw_curves
from inference.alignment.methods import compare_methods, own_transforms, pair_of
from inference.alignment.pictures import choose_frames, draw_on, make_canvas, with_reference
from inference.alignment.verdict import PersonAlignment
from inference.clip_alignment import AlignmentSettings
from inference.engine_factory import ALIGNMENT_WORDS
from inference.perception import Pose, cut_warning

SIZE = (256, 192)
FRAMES = 24
# A standing body, in 0..1 of the frame.
BODY = np.array(
    [
        (0.50, 0.22), (0.50, 0.30), (0.42, 0.30), (0.38, 0.40), (0.36, 0.49), (0.58, 0.30),
        (0.62, 0.40), (0.64, 0.49), (0.45, 0.52), (0.45, 0.66), (0.45, 0.80), (0.55, 0.52),
        (0.55, 0.66), (0.55, 0.80), (0.48, 0.20), (0.52, 0.20), (0.46, 0.21), (0.54, 0.21),
    ],
    np.float32,
)  # fmt: skip


def dancer(num_frames: int = FRAMES) -> np.ndarray:
    """A body that swings its arms and walks a little; `(T, 1, 18, 2)`."""
    frames = np.repeat(BODY[None, None], num_frames, axis=0)
    swing = np.sin(np.linspace(0, 6, num_frames))
    frames[:, 0, 3:5, 0] -= 0.08 * swing[:, None]
    frames[:, 0, 6:8, 1] -= 0.08 * swing[:, None]
    frames[:, 0, :, 0] += np.linspace(0, 0.05, num_frames)[:, None]
    return frames.astype(np.float32)


def pose(keypoints: np.ndarray) -> Pose:
    return Pose(keypoints, np.ones(keypoints.shape[:-1], np.float32), SIZE)


def misaligned(clip: np.ndarray, scale: float, degrees: float, shift: tuple[float, float]):
    angle = torch.deg2rad(torch.tensor(degrees))
    transform = Similarity(torch.tensor(scale), angle.cos(), angle.sin(), torch.tensor(shift))
    height, width = SIZE
    points = torch.from_numpy(to_isotropic(clip, width, height))
    return from_isotropic(apply(transform, points).numpy(), width, height)


def test_methods_come_nearer_to_the_truth_in_their_order():
    clip = dancer()
    driving = pose(misaligned(clip, 0.6, 20.0, (0.12, -0.05)))
    methods = compare_methods(None, pose(BODY[None]), driving, AlignmentSettings())
    off = {
        name: float(np.linalg.norm(method.moved.keypoints - clip, axis=-1).mean())
        for name, method in methods.items()
    }
    assert list(methods) == ["none", "affine", "closed_form"]
    assert off["none"] > 2 * off["affine"] > 2 * off["closed_form"]
    assert off["closed_form"] < 0.03
    assert methods["affine"].moved.main.degrees == 0
    assert methods["none"].off > methods["affine"].off > methods["closed_form"].off


def test_jitter_is_none_for_a_clips_transform_and_some_for_each_frames():
    driving = pose(misaligned(dancer(), 0.6, 20.0, (0.0, 0.0)))
    clip = compare_methods(None, pose(BODY[None]), driving, AlignmentSettings())
    frames = compare_methods(None, pose(BODY[None]), driving, AlignmentSettings(per_frame=True))
    assert clip["closed_form"].jitter == 0
    assert frames["closed_form"].jitter > 0.001
    assert frames["closed_form"].jitter == clip["closed_form"].jitter_per_frame
    assert clip["affine"].jitter_per_frame is None


def test_joints_that_leave_the_picture_are_counted():
    driving = pose(dancer() * 0.5)
    low = BODY[None] + np.float32((0, 0.45))
    # The picture shows no knees and ankles, so that the moved ones lie below it.
    reference = Pose(low, (low <= 1).all(-1).astype(np.float32), SIZE)
    methods = compare_methods(None, reference, driving, AlignmentSettings())
    assert methods["none"].outside == 0
    closed = methods["closed_form"]
    assert closed.outside == pytest.approx(4 / 18, abs=0.03)
    assert closed.outside == pytest.approx(closed.moved.main.outside, abs=1e-6)


def test_every_frames_own_transform_is_told_and_lies_round_the_clips():
    clip = misaligned(dancer(), 0.5, 10.0, (0.1, 0.0))
    score = np.ones(clip.shape[:-1], np.float32)
    score[3] = 0
    driving, reference = Pose(clip, score, SIZE), pose(BODY[None])
    person = compare_methods(None, reference, driving, AlignmentSettings())["closed_form"]
    own = own_transforms(None, pair_of(reference, driving, person.moved.main), SIZE)
    assert np.isnan(own.scale[3])
    assert not own.used[3]
    assert np.nanmean(np.log(own.scale)) == pytest.approx(np.log(person.moved.main.scale), abs=0.05)
    assert np.nanmean(own.place) == pytest.approx(0, abs=0.01)
    charts = {chart["title"]: chart for chart in draw_curves(own, person.moved.main)}
    assert set(charts) == {"Scale", "Rotation", "Place"}
    dots = "".join(charts["Scale"]["lines"][0]["dots"].values())
    assert dots.count("M") == FRAMES - 1
    assert 0 <= charts["Scale"]["clip"] <= 100


def test_people_are_told_apart_and_drawn_where_they_are_put():
    left, right = BODY * 0.4 + (0.0, 0.3), BODY * 0.4 + (0.5, 0.3)
    reference = pose(np.stack([right, left]).astype(np.float32))
    clip = np.concatenate([dancer() * 0.2, dancer() * 0.2 + np.float32((0.5, 0.5))], 1)
    methods = compare_methods(None, reference, pose(clip), AlignmentSettings())
    moved = methods["closed_form"].moved
    assert [(p.driving, p.reference) for p in moved.people] == [(0, 1), (1, 0)]
    affine = methods["affine"].moved
    assert len(affine.people) == 2
    for result in (moved, affine):
        assert np.abs(result.keypoints[0, 0, 1] - left[1]).max() < 0.05
        assert np.abs(result.keypoints[0, 1, 1] - right[1]).max() < 0.05


def test_the_canvas_has_room_for_joints_outside_and_marks_them():
    image = np.full((100, 80, 3), 200, np.uint8)
    inside, below = BODY[None].copy(), BODY[None].copy()
    below[0, 10] = (0.45, 1.2)
    narrow, wide = make_canvas(image, inside, 200), make_canvas(image, below, 200)
    assert wide.size == narrow.size == (200, 160)
    assert wide.paper.shape[0] > narrow.paper.shape[0] + 30
    assert wide.paper.shape[1] == narrow.paper.shape[1]
    seen = np.ones((1, 18), np.float32)
    drawn, plain = draw_on(wide, below, seen, 0.3), draw_on(wide, inside, seen, 0.3)
    under = wide.corner[1] + wide.size[0] + 4
    assert (drawn[under:] != wide.paper[under:]).any()
    assert not (plain[under:] != wide.paper[under:]).any()
    # Somebody who is not aligned is drawn, and not marked; a joint that is not seen is neither.
    bystander = draw_on(wide, np.concatenate([inside, below]), np.ones((2, 18), np.float32), 0.3)
    rings = (np.abs(drawn.astype(int) - (255, 96, 96)).sum(-1) < 40).sum()
    assert rings > (np.abs(bystander.astype(int) - (255, 96, 96)).sum(-1) < 40).sum()
    assert (bystander[under:] != wide.paper[under:]).any()
    seen[0, 10] = 0
    assert not (draw_on(wide, below, seen, 0.3)[under:] != wide.paper[under:]).any()


def test_what_lies_beyond_the_canvas_is_pointed_at_from_its_edge():
    far = BODY[None].copy()
    far[0, 10] = (0.45, 40.0)
    canvas = make_canvas(np.zeros((100, 80, 3), np.uint8), far, 100)
    assert canvas.paper.shape[0] <= 200
    drawn = draw_on(canvas, far, np.ones((1, 18), np.float32), 0.3)
    red = (drawn[-16:].astype(int) - (255, 96, 96)).__abs__().sum(-1) < 40
    assert red.sum() > 10
    nothing = np.full((1, 18, 2), np.nan, np.float32)
    untouched = draw_on(canvas, nothing, np.ones((1, 18), np.float32), 0.3)
    np.testing.assert_array_equal(untouched, canvas.paper)


def test_the_references_own_pose_is_grey():
    canvas = make_canvas(np.zeros((100, 80, 3), np.uint8), BODY, 200)
    grey = with_reference(canvas, pose(BODY[None])).paper.astype(int)
    changed = (grey != canvas.paper).any(-1)
    inside = np.zeros_like(changed)
    x, y = canvas.corner
    inside[y : y + canvas.size[0], x : x + canvas.size[1]] = True
    assert changed.sum() > 100
    assert np.ptp(grey[changed & inside], axis=-1).max() < 3


def test_frames_to_look_at_are_the_most_alike_the_ends_and_the_furthest():
    poses = dancer()[:, 0]
    poses[17] += (0.4, 0.0)
    seen = np.ones((FRAMES, 18), bool)
    seen[:2] = False
    chosen = choose_frames(poses, seen, 5)
    assert chosen[0] == (5, ["most like the picture"])
    reasons = dict(chosen)
    assert reasons[2] == ["first with a person"]
    assert "last with a person" in reasons[FRAMES - 1]
    assert reasons[17] == ["the pose is furthest away"]
    assert [index for index, _ in chosen[1:]] == sorted(reasons.keys() - {5})
    assert choose_frames(poses[:1], np.zeros((1, 18), bool), None) == [(0, ["first"])]


ALL_WRONG = PersonAlignment(
    method="learned",
    scale=5.0,
    degrees=50.0,
    joints=3.0,
    frames_used=1,
    frames=100,
    scale_spread=0.9,
    outside=0.9,
    confidence="low",
)


def test_every_warning_has_advice_of_its_own():
    warnings = alignment_verdict._warnings(ALL_WRONG, limited=True, settings=AlignmentSettings())
    for method in ("translation", "none"):
        found = PersonAlignment(method=method, notes=(alignment_verdict.NOTES[method],))
        warnings += alignment_verdict._warnings(found, limited=False, settings=AlignmentSettings())
    warnings.append(cut_warning([1.0, 2.5]))
    given = [advise(text) for text in warnings]
    assert len(warnings) == len(ADVICE)
    assert set(given) == set(ADVICE.values())


@pytest.mark.parametrize(
    ("changes", "level", "said"),
    [
        ({"confidence": "high"}, "trust", "Trust it"),
        ({"confidence": "high", "method": "kept"}, "trust", "fit as they are"),
        ({"confidence": "medium"}, "look", "fairly sure"),
        ({"confidence": "unknown", "method": "closed_form"}, "look", "cannot say"),
        ({"confidence": "high", "warnings": ("a", "b")}, "look", "2 warnings"),
        ({"confidence": "low", "warnings": ("a",)}, "reject", "unsure"),
        ({"confidence": "low", "method": "kept"}, "reject", "nothing was moved"),
        ({"method": "translation"}, "reject", "too few joints in common"),
    ],
)
def test_the_verdict_follows_confidence_and_warnings(changes, level, said):
    verdict = decide([PersonAlignment(**{"method": "learned", **changes})])
    assert verdict.level == level
    assert said in verdict.text


def test_the_verdict_is_on_the_person_who_is_aligned_worst():
    sure = PersonAlignment(method="learned", confidence="high")
    verdict = decide([sure, replace(sure, confidence="low")])
    assert verdict.level == "reject"
    assert "person 2" in verdict.text


def test_a_closed_form_that_is_far_off_is_pointed_out():
    learned = PersonAlignment(method="learned", scale=0.7, degrees=-178.0)
    near = PersonAlignment(method="closed_form", scale=0.75, degrees=179.0)
    assert compare_forms(learned, near) is None
    said = compare_forms(learned, replace(near, scale=0.4))
    assert said is not None
    assert "0.40" in said
    assert "--alignment closed-form" in said
    assert compare_forms(learned, replace(near, scale=0.4, method="translation")) is None


def test_the_words_for_alignments_are_the_same_where_torch_is_not_loaded():
    assert ALIGNMENT_WORDS == CHOICES
