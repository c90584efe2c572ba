"""Long clips: overlapping windows over one noise tensor, predictions blended.

Shapes: B batch, T frames, C latent channels, h w latent size.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def window_starts(num_frames: int, window: int, overlap: int) -> list[int]:
    """First frames of windows that cover the clip; the last one ends with it.

    Raises:
        ValueError: where the overlap is not smaller than the window.
    """
    if not 0 <= overlap < window:
        raise ValueError(
            f"Got an overlap of {overlap} frames in windows of {window}, but expected it to be "
            "smaller than the window."
        )
    if num_frames <= window:
        return [0]
    starts = list(range(0, num_frames - window, window - overlap))
    return [*starts, num_frames - window]


def triangular_weights(window: int) -> Tensor:
    """Highest in the middle, positive at the ends; `(window,)` (v1)."""
    ramp = (torch.arange(window) + 0.5) * 2 / window
    return torch.minimum(ramp, 2 - ramp)


def blend_windows(
    predict: Callable[[Tensor, slice], Tensor], x: Tensor, window: int, overlap: int
) -> Tensor:
    """Predict each window on its own and average where they overlap, with triangular weights.

    Args:
        predict: from the window's frames of `x`, and which frames these are, to a prediction of
            the same shape.
        x: `(B, T, C, h, w)`.
    """
    num_frames = x.shape[1]
    if num_frames <= window:
        return predict(x, slice(0, num_frames))
    weights = triangular_weights(window).to(x).reshape(1, -1, 1, 1, 1)
    total, blended = torch.zeros_like(x[:1, :, :1, :1, :1]), torch.zeros_like(x)
    for start in window_starts(num_frames, window, overlap):
        frames = slice(start, start + window)
        blended[:, frames] += predict(x[:, frames], frames) * weights
        total[:, frames] += weights
    return blended / total
