"""Random numbers of a clip as a function of seed, step and frame.

No frame's noise depends on which others are drawn with it, so a clip may be worked through in
portions of any size, by several devices, and continued in the middle, with the same result.

Shapes: t frames, C latent channels, h w latent size, H W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# "Steps" of what is drawn before the first one.
REFERENCE, START = -2, -1


@dataclass(frozen=True)
class ClipNoise:
    """Standard normal noise from Philox, a generator that counts: the frame is in its counter.

    Args:
        seed: 0 or more.
        shape: of one frame.
    """

    seed: int
    shape: tuple[int, ...]

    def __call__(self, step: int, frames: Sequence[int]) -> Tensor:
        """Float32 noise `(t, *shape)` of these frames at a step (or at REFERENCE or START)."""
        noise = np.empty((len(frames), *self.shape), np.float32)
        for row, frame in zip(noise, frames, strict=True):
            counts = np.random.Philox(key=[self.seed, step - REFERENCE], counter=[0, 0, 0, frame])
            np.random.Generator(counts).standard_normal(dtype=np.float32, out=row)
        return torch.from_numpy(noise)
