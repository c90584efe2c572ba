"""Long clips: overlapping windows over one noise tensor, predictions blended.

Shapes: T frames, W frames of a window.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Shift = Literal["none", "half", "golden"]
Blend = Literal["triangular", "cosine", "flat"]
LONG = 4  # windows
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """How windows lie over a clip that is longer than one.

    `anchor_first` puts the clip's first frame into every window, as v1 does: its weights were
    tuned on windows that begin with it. `shift` moves the windows from step to step, so that their
    ends do not come to lie in the same frames each time: `half` by half the distance of two
    windows every other step, `golden` by the golden section of it at each step, which spreads the
    ends evenly.
    """

    overlap: int | None = None  # frames that neighbours share; None is a quarter of a window
    anchor_first: bool = False
    shift: Shift = "golden"
    blend: Blend = "triangular"  # weights over a window, where several see a frame
    batch: int = 1  # windows that go through the network together

    def __post_init__(self) -> None:
        if self.overlap is not None and self.overlap < 0:
            raise ValueError(f"Got an overlap of {self.overlap} frames, but expected 0 or more.")
        if self.batch < 1:
            raise ValueError(f"Got windows.batch {self.batch}, but expected at least 1.")


class Window(NamedTuple):
    """One window of a clip."""

    frames: tuple[int, ...]
    shares: Tensor  # (W,), of each frame's prediction; those of all windows add up to 1


def windows_of(
    num_frames: int, window: int, config: WindowConfig, step: int = 0
) -> list[tuple[int, ...]]:
    """The frames of each window at a step, in order; together they cover the clip.

    The first begins with the clip and the last ends with it, however the others are shifted.

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
        return [tuple(range(num_frames))]
    stride, last = window - overlap, num_frames - window
    # One window more to shift them freely is little in a long clip, and much in a short one.
    room = stride if last >= LONG * stride else -last % stride + 1
    first = stride - _shifted(config.shift, room, step)
    starts = sorted({0, *range(first, last, stride), last})
    spans = [tuple(range(start, start + window)) for start in starts]
    if config.anchor_first and window > 1:
        # The first frame takes the place of the window's own first one.
        spans = [(0, *span[1:]) for span in spans]
        if set(range(num_frames)).difference(*spans):
            raise ValueError(
                f"Got an overlap of {overlap} frames with the first frame in every window, but "
                "expected an overlap of at least 1."
            )
    return spans


def _shifted(shift: Shift, room: int, step: int) -> int:
    """How far the windows of a step are moved towards the clip's beginning: 0 to room - 1."""
    if shift == "half":
        return step % 2 * (room // 2)
    return math.floor(step * _GOLDEN % 1 * room) if shift == "golden" else 0


def weights_of(blend: Blend, window: int) -> Tensor:
    """Weights of a window's frames, highest in the middle, positive at the ends; `(W,)`, float64.

    `triangular` is v1's; `cosine` leaves the middle to one window for longer and has no corners;
    `flat` is the plain mean of all windows that see a frame.
    """
    place = (torch.arange(window, dtype=torch.float64) + 0.5) / window
    if blend == "triangular":
        return torch.minimum(2 * place, 2 - 2 * place)
    if blend == "cosine":
        return (1 - torch.cos(2 * math.pi * place)) / 2
    return torch.ones_like(place)


def plan_windows(num_frames: int, window: int, config: WindowConfig, step: int = 0) -> list[Window]:
    """The windows of a step with their shares of the prediction."""
    spans = windows_of(num_frames, window, config, step)
    total = torch.zeros(num_frames, dtype=torch.float64)
    weights = weights_of(config.blend, len(spans[0]))
    for span in spans:
        total[list(span)] += weights
    return [Window(span, (weights / total[list(span)]).float()) for span in spans]
