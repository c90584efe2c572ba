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
    return denoising_loss_of_clips(denoised, target, face_mask, weight).mean()


def denoising_loss_of_clips(
    denoised: Tensor, target: Tensor, face_mask: Tensor, weight: Tensor
) -> Tensor:
    """What `denoising_loss` is the mean of, `(B,)`."""
    residual = (denoised.float() - target.float()) * (1 + face_mask)
    return residual.square().flatten(1).mean(1) * weight


def face_loss_of_clips(
    denoised: Tensor, target: Tensor, face_mask: Tensor, weight: Tensor
) -> Tensor:
    """Weighted mean squared residual where M > 0, `(B,)`; NaN for clips without a face.

    Without the factor (1 + M) that training adds, so that it compares with the loss of a run
    without masks; with the weight of the noise level, since on its own the residual of the
    strongest noise would decide everything.
    """
    inside = (face_mask > 0).expand_as(denoised).flatten(1)
    squared = (denoised.float() - target.float()).square().flatten(1)
    return (squared * inside).sum(1) / inside.sum(1) * weight


def means_by_quartile(values: Tensor, sigma: Tensor, edges: Tensor) -> Tensor:
    """Mean of the clips in each quartile of the noise level, `(4,)`; NaN where there is none.

    Args:
        values: of the clips, `(B,)`.
        sigma: of the clips, `(B,)`.
        edges: from `animator.edm.sigma_quartiles`, `(3,)`.
    """
    quartile = torch.bucketize(sigma, edges.to(sigma))
    member = quartile[None] == torch.arange(4, device=sigma.device)[:, None]
    return (values * member).sum(1) / member.sum(1)
