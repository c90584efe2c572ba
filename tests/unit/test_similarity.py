"""Closed-form similarity: against an independent solution, and where it has none."""

import numpy as np
import pytest
import torch

from animator.keypoints import SimilarityRange, from_isotropic, random_similarity, to_isotropic
from animator.similarity import Similarity, apply, compose, fit, invert


def umeyama(driven: np.ndarray, reference: np.ndarray, weight: np.ndarray):
    """Scale, rotation and shift by singular values, written from Umeyama (1991) in NumPy."""
    w = weight[:, None] / weight.sum()
    mean_d, mean_r = (w * driven).sum(0), (w * reference).sum(0)
    x_d, x_r = driven - mean_d, reference - mean_r
    u, s, vt = np.linalg.svd((w * x_d).T @ x_r)
    guard = np.diag([1.0, np.sign(np.linalg.det(vt.T @ u.T))])
    rotation = vt.T @ guard @ u.T
    scale = np.trace(np.diag(s) @ guard) / (w * x_d**2).sum()
    return scale, rotation, mean_r - scale * rotation @ mean_d


@pytest.mark.parametrize("seed", range(5))
def test_closed_form_equals_singular_value_solution(seed):
    rng = np.random.default_rng(seed)
    driven, reference = rng.normal(size=(2, 18, 2))
    weight = rng.random(18) * (rng.random(18) > 0.3)
    scale, rotation, shift = umeyama(driven, reference, weight)
    got = fit(*(torch.from_numpy(a).float() for a in (driven, reference, weight)))
    assert abs(float(got.scale) - scale) < 1e-5
    matrix = np.array([[got.cos, -got.sin], [got.sin, got.cos]])
    np.testing.assert_allclose(matrix, rotation, atol=1e-5)
    np.testing.assert_allclose(got.shift.numpy(), shift, atol=1e-5)


def test_fit_undoes_a_random_misalignment():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(7, 18, 2, generator=generator)
    misalign = random_similarity(generator, 7, SimilarityRange())
    found = fit(apply(misalign, points), points, torch.ones(7, 18))
    expected = invert(misalign)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    whole = compose(found, misalign)
    torch.testing.assert_close(apply(whole, points), points, atol=1e-4, rtol=1e-4)


def test_mirrored_points_are_never_reflected():
    points = torch.randn(18, 2, generator=torch.Generator().manual_seed(1))
    mirrored = points * torch.tensor([-1.0, 1.0])
    got = fit(points, mirrored, torch.ones(18))
    assert abs(float(got.cos**2 + got.sin**2) - 1) < 1e-5
    assert float(got.scale) > 0


@pytest.mark.parametrize("case", ["none seen", "two seen", "one point", "not numbers"])
def test_degenerate_input_falls_back_with_finite_gradients(case):
    driven = torch.randn(1, 18, 2, generator=torch.Generator().manual_seed(2))
    reference = torch.randn(1, 18, 2, generator=torch.Generator().manual_seed(3))
    weight = torch.ones(1, 18)
    if case == "none seen":
        weight[:] = 0
    elif case == "two seen":
        weight[:, 2:] = 0
    elif case == "one point":
        driven = driven[:, :1].expand(-1, 18, -1).clone()
    else:
        weight[:, 5:] = 0
        driven[:, 5:] = float("nan")
    driven.requires_grad_(True)
    got = fit(driven, reference, weight)
    seen = torch.where(weight[..., None] > 0, driven, torch.zeros_like(driven))
    apply(got, seen).sum().backward()
    assert all(torch.isfinite(field).all() for field in got)
    assert torch.isfinite(driven.grad).all()
    if case != "not numbers":
        assert float(got.scale) == 1
        assert float(got.sin) == 0


def test_isotropic_coordinates_keep_shapes_and_come_back():
    square = np.array([[0.5, 0.5], [0.6, 0.5], [0.5, 0.6]], np.float32)
    points = to_isotropic(square, 200, 100)
    assert np.allclose(points[0], 0)
    assert np.allclose(points[1], [0.1, 0])
    assert np.allclose(points[2], [0, 0.05])
    assert np.allclose(from_isotropic(points, 200, 100), square)


def test_similarity_range_refuses_what_is_no_range():
    with pytest.raises(ValueError, match="scale of at least 1"):
        SimilarityRange(scale=0.5)
    assert Similarity(*(torch.ones(1),) * 3, torch.zeros(1, 2)).degrees.item() == pytest.approx(45)
