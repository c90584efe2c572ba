"""One transform a clip: portions, votes, outliers, and the figures that go with it."""

import math

import torch

from animator.clip_transform import ClipSums, outliers
from animator.similarity import Similarity, apply


def frames(count: int = 40, seed: int = 0):
    """Transforms that scatter about one, poses, votes and errors of one clip, `(1, T, ...)`."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, count, 4, generator=generator)
    angle = 0.3 + 0.05 * noise[..., 0]
    transforms = Similarity(
        (0.4 + 0.1 * noise[..., 1]).exp(),
        angle.cos(),
        angle.sin(),
        torch.tensor([0.1, -0.2]) + 0.02 * noise[..., 2:],
    )
    driven = 0.2 * torch.randn(1, count, 18, 2, generator=generator)
    votes = torch.randn(1, count, 3, generator=generator)
    error = 0.03 + 0.01 * torch.rand(1, count, generator=generator)
    return transforms, votes, error, driven, torch.ones(1, count, 18)


def portion(clip, part: slice):
    transforms, *rest = clip
    return Similarity(*(field[:, part] for field in transforms)), *(t[:, part] for t in rest)


def every(clip) -> torch.Tensor:
    return torch.ones(clip[-1].shape[:2], dtype=torch.bool)


def test_a_clip_in_portions_is_the_clip():
    clip = frames()
    whole = ClipSums.of(*clip, every(clip))
    parts = [portion(clip, slice(start, start + 7)) for start in range(0, 40, 7)]
    sums = ClipSums.of(*parts[0], every(parts[0]))
    for part in parts[1:]:
        sums = sums.plus(ClipSums.of(*part, every(part)))
    for got, want in zip(sums.transform(), whole.transform(), strict=True):
        torch.testing.assert_close(got, want)
    for got, want in zip(sums.spread(), whole.spread(), strict=True):
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)
    assert sums.frames.item() == 40


def test_figures_of_a_clip_are_those_of_its_frames():
    clip = frames(400)
    transforms, _, error, driven, weight = clip
    sums = ClipSums.of(transforms, torch.zeros(1, 400, 3), error, driven, weight, every(clip))
    pooled = sums.transform()
    assert abs(pooled.scale.item() - math.exp(0.4)) < 0.03
    assert abs(pooled.degrees.item() - math.degrees(0.3)) < 0.5
    assert abs(sums.spread().log_scale.item() - 0.1) < 0.01
    assert abs(sums.spread().degrees.item() - math.degrees(0.05)) < 0.3
    torch.testing.assert_close(sums.expected_error(), error.mean(1))
    moved = (apply(Similarity(*(f[:, None] for f in pooled)), driven) - driven).square().sum(-1)
    torch.testing.assert_close(
        sums.displacement(pooled), moved.mean((1, 2)).sqrt(), atol=1e-4, rtol=1e-4
    )
    # The person's mean centre goes where the frames' transforms move it, whatever the rotation.
    centres = driven.mean(2)
    places = apply(transforms, centres[..., None, :])[..., 0, :].mean(1)
    at = apply(pooled, centres.mean(1, keepdim=True))[:, 0]
    torch.testing.assert_close(at, places, atol=1e-5, rtol=1e-4)


def test_a_frame_with_more_votes_counts_for_more():
    transforms, votes, *rest = frames(2)
    votes = torch.tensor([[[6.0, -6.0, 0.0], [-6.0, 6.0, 0.0]]])
    pooled = ClipSums.of(transforms, votes, *rest, torch.ones(1, 2, dtype=torch.bool)).transform()
    torch.testing.assert_close(pooled.scale, transforms.scale[:, 0], atol=1e-4, rtol=0)
    torch.testing.assert_close(pooled.sin, transforms.sin[:, 1], atol=1e-4, rtol=0)


def test_frames_of_somebody_else_are_outliers():
    clip = frames()
    transforms, _, _, driven, weight = clip
    assert not outliers(transforms, driven, weight, every(clip)).any()
    transforms.shift[:, 7] += 0.5
    transforms.scale[:, 9] *= 5
    found = outliers(transforms, driven, weight, every(clip))
    assert found[0].nonzero()[:, 0].tolist() == [7, 9]


def test_nothing_counted_is_the_identity_with_finite_gradients():
    transforms, votes, error, driven, weight = frames(3)
    votes.requires_grad_(True)
    none = torch.zeros(1, 3, dtype=torch.bool)
    sums = ClipSums.of(transforms, votes, error, driven, weight, none)
    pooled = sums.transform()
    assert (pooled.scale.item(), pooled.cos.item(), pooled.sin.item()) == (1, 1, 0)
    assert pooled.shift.abs().max() == 0
    sum(field.sum() for field in pooled).backward()
    assert votes.grad.isfinite().all()
    assert all(float(value) == 0 for value in sums.spread())
