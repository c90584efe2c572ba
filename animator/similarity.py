"""Rotation, scale and translation between point sets in closed form (eq. 2-8).

Shapes: `...` any batch, N points. Points are `(..., N, 2)` in isotropic coordinates.
"""

from typing import NamedTuple

import torch
from torch import Tensor

MIN_COMMON = 3  # points both sets must have for rotation and scale
_TINY = 1e-8


class Similarity(NamedTuple):
    """x ↦ scale · R x + shift, with R the rotation of (cos, sin)."""

    scale: Tensor  # (...)
    cos: Tensor  # (...)
    sin: Tensor  # (...)
    shift: Tensor  # (..., 2)

    @property
    def degrees(self) -> Tensor:
        """Angle of the rotation; positive turns x towards y."""
        return torch.rad2deg(torch.atan2(self.sin, self.cos))


def identity(batch: tuple[int, ...], like: Tensor) -> Similarity:
    """The transform that changes nothing."""
    one, zero = like.new_ones(batch), like.new_zeros(batch)
    return Similarity(one, one, zero, like.new_zeros((*batch, 2)))


def rotate(points: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """R x for points `(..., N, 2)` and angles `(...)`."""
    x, y = points.unbind(-1)
    cos, sin = cos[..., None], sin[..., None]
    return torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1)


def apply(transform: Similarity, points: Tensor) -> Tensor:
    """S (R P) + t (eq. 8 and 11), for points `(..., N, 2)`."""
    rotated = rotate(points, transform.cos, transform.sin)
    return transform.scale[..., None, None] * rotated + transform.shift[..., None, :]


def compose(outer: Similarity, inner: Similarity) -> Similarity:
    """The transform that applies `inner`, then `outer`."""
    shift = apply(outer, inner.shift[..., None, :])[..., 0, :]
    return Similarity(
        scale=outer.scale * inner.scale,
        cos=outer.cos * inner.cos - outer.sin * inner.sin,
        sin=outer.sin * inner.cos + outer.cos * inner.sin,
        shift=shift,
    )


def invert(transform: Similarity) -> Similarity:
    """The transform that undoes `transform`."""
    scale, cos, sin = 1 / transform.scale, transform.cos, -transform.sin
    shift = -scale[..., None] * rotate(transform.shift[..., None, :], cos, sin)[..., 0, :]
    return Similarity(scale, cos, sin, shift)


def common_joints(driven: Tensor, reference: Tensor, weight: Tensor) -> Tensor:
    """The weights `(..., N)`, 0 for joints whose place or weight is no finite number."""
    finite = driven.isfinite().all(-1) & reference.isfinite().all(-1) & weight.isfinite()
    return torch.where(finite, weight, torch.zeros_like(weight)).clamp_min(0)


def joint_centres(points: Tensor, weight: Tensor) -> Tensor:
    """Weighted centre of points `(..., N, 2)` that count, `(..., 2)`; 0 where none does."""
    points = torch.where((weight > 0)[..., None], points, torch.zeros_like(points))
    total = weight.sum(-1, keepdim=True).clamp_min(_TINY)
    return (points * weight[..., None]).sum(-2) / total


def solvable(driven: Tensor, reference: Tensor, weight: Tensor) -> Tensor:
    """Whether rotation and scale can be found: three common joints, not in one point; `(...)`."""
    weight = common_joints(driven, reference, weight)
    enough = (weight > 0).sum(-1) >= MIN_COMMON
    for points in (driven, reference):
        enough = enough & (_spread(points, weight) > _TINY)
    return enough


def _spread(points: Tensor, weight: Tensor) -> Tensor:
    w = weight[..., None]
    points = torch.where(w > 0, points, torch.zeros_like(points))
    centre = (w * points).sum(-2, keepdim=True) / w.sum(-2, keepdim=True).clamp_min(_TINY)
    return (w * (points - centre).square()).sum((-2, -1))


def fit(driven: Tensor, reference: Tensor, weight: Tensor) -> Similarity:
    """Similarity transform from centred point sets (eq. 2-8).

    In the plane the rotation that maximises tr(R K) is the angle of
    (K11 + K22, K12 - K21), which is what the singular value decomposition of K gives when its
    determinant is held at +1 (Umeyama): reflections cannot appear, and the gradient is finite
    where two singular values are equal.

    Degenerate input falls back in this order: fewer than three common points, or points that
    coincide, give the translation between the means; no common point gives the identity.

    Args:
        driven, reference: `(..., N, 2)`.
        weight: confidence that a point is seen in both, `(..., N)`; 0 leaves it out, as does a
            place that is not finite.
    """
    weight = common_joints(driven, reference, weight)
    w = weight[..., None]
    driven = torch.where(w > 0, driven, torch.zeros_like(driven))
    reference = torch.where(w > 0, reference, torch.zeros_like(reference))
    total = w.sum(-2).clamp_min(_TINY)
    mean_d = (w * driven).sum(-2) / total
    mean_r = (w * reference).sum(-2) / total
    x_d = driven - mean_d[..., None, :]
    x_r = reference - mean_r[..., None, :]
    k = torch.einsum("...ni,...nj->...ij", w * x_d, x_r)
    along, across = k[..., 0, 0] + k[..., 1, 1], k[..., 0, 1] - k[..., 1, 0]
    length_squared = along.square() + across.square()
    spread = (w * x_d.square()).sum((-2, -1))
    solvable = ((weight > 0).sum(-1) >= MIN_COMMON) & (spread > _TINY) & (length_squared > _TINY**2)
    length = torch.where(solvable, length_squared, torch.ones_like(length_squared)).sqrt()
    one = torch.ones_like(length)
    cos = torch.where(solvable, along / length, one)
    sin = torch.where(solvable, across / length, torch.zeros_like(one))
    # tr(R K) is the length of (along, across).
    scale = torch.where(solvable, length / torch.where(solvable, spread, one), one)
    shift = mean_r - scale[..., None] * rotate(mean_d[..., None, :], cos, sin)[..., 0, :]
    common = ((weight > 0).sum(-1) > 0)[..., None]
    return Similarity(scale, cos, sin, torch.where(common, shift, torch.zeros_like(shift)))
