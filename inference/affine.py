"""The alignment of earlier systems: one scale and one shift for a clip, no rotation.

ControlNeXt and MimicMotion fit `y_ref = a_y y + b_y` by least squares over the torso and upper
joints of all frames, tie the horizontal scale to the vertical one by the two frames' shapes, and
take the mean residual as the horizontal shift. In isotropic coordinates the tie is one scale for
both directions.

Shapes: `...` any batch, T frames, N = 18 joints.
"""

import torch
from torch import Tensor

from animator.similarity import Similarity

UPPER_BODY = (0, 1, 2, 5, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17)
_TINY = 1e-8


def fit_affine(driven: Tensor, reference: Tensor, weight: Tensor) -> Similarity:
    """Scale and shift of a whole clip; fields of shape `(...)` and `(..., 2)`.

    Joints count where both poses see them, each as much as any other. Where the joints have no
    vertical extent, or would be turned upside down, the shift alone is fitted.

    Args:
        driven: `(..., T, N, 2)`.
        reference: `(..., N, 2)`.
        weight: 0 where a joint is not seen in both, `(..., T, N)`.
    """
    chosen = list(UPPER_BODY)
    seen = (weight[..., chosen] > 0).to(driven.dtype)
    y = driven[..., chosen, :]
    target = reference[..., None, chosen, :].expand_as(y)
    kept = seen[..., None] > 0
    y, target = (torch.where(kept, points, torch.zeros_like(points)) for points in (y, target))
    total = seen.sum((-2, -1)).clamp_min(1)[..., None]
    mean_y, mean_target = y.sum((-3, -2)) / total, target.sum((-3, -2)) / total
    off = (y[..., 1] - mean_y[..., None, None, 1]) * seen
    off_target = (target[..., 1] - mean_target[..., None, None, 1]) * seen
    spread, together = off.square().sum((-2, -1)), (off * off_target).sum((-2, -1))
    solvable = (spread > _TINY) & (together > _TINY)
    one = torch.ones_like(spread)
    scale = torch.where(solvable, together / torch.where(solvable, spread, one), one)
    shift = mean_target - scale[..., None] * mean_y
    return Similarity(scale, one, torch.zeros_like(one), shift)
