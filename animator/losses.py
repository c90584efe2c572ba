"""Training losses (eq. 12 and 25).

Shapes: B batch, N keypoints, T frames, C latent channels, h w latent size.
"""

import torch
from torch import Tensor


def alignment_loss(aligned: Tensor, target: Tensor, visible: Tensor) -> Tensor:
    """Mean Euclidean distance between aligned and true driven joints (eq. 12).

    Args:
        aligned, target: `(B, N, 2)`.
        visible: 1 where a joint counts, `(B, N)`.
    """
    # The square root has no gradient at zero; a joint that lies exactly right must not give NaN.
    squared = (aligned - target).square().sum(-1)
    distance = torch.where(squared > 0, squared, torch.ones_like(squared)).sqrt() * (squared > 0)
    return (distance * visible).sum() / visible.sum().clamp_min(1)


def denoising_loss(denoised: Tensor, target: Tensor, face_mask: Tensor, weight: Tensor) -> Tensor:
    """Face-weighted denoising loss, mean of w·‖(z_gt - z_eps)(1 + M)‖² (eq. 25).

    Args:
        denoised, target: `(B, T, C, h, w)`.
        face_mask: M at latent size, `(B, T, 1, h, w)`.
        weight: of the noise level, `(B,)`.
    """
    residual = (denoised.float() - target.float()) * (1 + face_mask)
    per_clip = residual.square().flatten(1).mean(1)
    return (per_clip * weight).mean()
