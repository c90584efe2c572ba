"""Long clips: overlapping windows over one noise tensor, predictions blended.

Shapes: B batch, T frames, W frames of a window, C latent channels, h w latent size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """How windows lie over a clip that is longer than one.

    `anchor_first` puts the clip's first frame into every window, as v1 does: its weights were
    tuned on windows that begin with it.
    """

    overlap: int | None = None  # frames that neighbours share; None is a quarter of a window
    anchor_first: bool = False

    def __post_init__(self) -> None:
        if self.overlap is not None and self.overlap < 0:
            raise ValueError(f"Got an overlap of {self.overlap} frames, but expected 0 or more.")


def windows_of(num_frames: int, window: int, config: WindowConfig) -> list[list[int]]:
    """The frames of each window, in order; together they cover the clip, the last ends with it.

    Raises:
        ValueError: where the overlap is not smaller than the window.
    """
    overlap = window // 4 if config.overlap is None else config.overlap
    if not overlap < window:
        raise ValueError(
            f"Got an overlap of {overlap} frames in windows of {window}, but expected it to be "
            "smaller than the window."
        )
    if num_frames <= window:
        return [list(range(num_frames))]
    starts = [*range(0, num_frames - window, window - overlap), num_frames - window]
    spans = [list(range(start, start + window)) for start in starts]
    if config.anchor_first and window > 1:
        # The first frame takes the place of the window's own first one.
        spans = [[0, *span[1:]] for span in spans]
        uncovered = sorted(set(range(num_frames)).difference(*spans))
        if uncovered:
            raise ValueError(
                f"Got an overlap of {overlap} frames with the first frame in every window, but "
                "expected an overlap of at least 1."
            )
    return spans


def triangular_weights(window: int) -> Tensor:
    """Highest in the middle, positive at the ends; `(window,)` (v1)."""
    ramp = (torch.arange(window) + 0.5) * 2 / window
    return torch.minimum(ramp, 2 - ramp)


def blend_windows(
    predict: Callable[[Tensor, Tensor], Tensor], x: Tensor, window: int, config: WindowConfig
) -> Tensor:
    """Predict each window on its own and average where they overlap, with triangular weights.

    Args:
        predict: from the window's frames of `x`, and which frames these are `(W,)`, to a
            prediction of the same shape.
        x: `(B, T, C, h, w)`.
    """
    num_frames = x.shape[1]
    spans = [torch.tensor(s, device=x.device) for s in windows_of(num_frames, window, config)]
    if len(spans) == 1:
        return predict(x, spans[0])
    weights = triangular_weights(window).to(x).reshape(1, -1, 1, 1, 1)
    total, blended = torch.zeros_like(x[:1, :, :1, :1, :1]), torch.zeros_like(x)
    for frames in spans:
        # No window names a frame twice, so that adding by index is exact.
        blended[:, frames] += predict(x[:, frames], frames) * weights
        total[:, frames] += weights
    return blended / total
