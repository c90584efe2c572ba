"""Cosine transforms of images: the arithmetic that the weight-free encoders share.

Shapes: B batch, H W pixels, S thumbnail side, D numbers kept.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ITU-R BT.601, full range; luma first.
RGB_TO_YCC = (
    (0.299, 0.587, 0.114),
    (-0.168736, -0.331264, 0.5),
    (0.5, -0.418688, -0.081312),
)


def frequencies(side: int) -> list[tuple[int, int]]:
    """(vertical, horizontal) frequencies of a square, lowest first."""
    pairs = [(u, v) for u in range(side) for v in range(side)]
    return sorted(pairs, key=lambda p: (p[0] ** 2 + p[1] ** 2, p))


def cosine_basis(side: int) -> Tensor:
    """Orthonormal DCT-II basis, `(frequency, position)`, in float64."""
    position = torch.arange(side, dtype=torch.float64)
    frequency = position[:, None]
    basis = torch.cos(math.pi * (2 * position + 1) * frequency / (2 * side))
    basis[0] /= math.sqrt(2.0)
    return basis * math.sqrt(2.0 / side)


class ThumbnailSpectrum(nn.Module):
    """The lowest cosine frequencies of a small thumbnail: two thirds luma, one third chroma.

    Amplitudes are multiplied by the frequency, since those of natural images fall with it.
    Differentiable, without weights, the same on every machine.
    """

    def __init__(self, dim: int, side: int):
        super().__init__()
        if not 3 <= dim <= side**2:
            raise ValueError(f"Got {dim} numbers, but expected 3 to {side**2}.")
        self.side = side
        num_chroma = max(1, dim // 6)
        counts = (dim - 2 * num_chroma, num_chroma, num_chroma)
        pairs = frequencies(side)
        index = [
            c * side**2 + u * side + v for c, count in enumerate(counts) for u, v in pairs[:count]
        ]
        gain = [2 / side * (math.hypot(u, v) + 1) for n in counts for u, v in pairs[:n]]
        self.register_buffer("cosine", cosine_basis(side).float(), persistent=False)
        self.register_buffer("ycc", torch.tensor(RGB_TO_YCC), persistent=False)
        self.register_buffer("index", torch.tensor(index), persistent=False)
        self.register_buffer("gain", torch.tensor(gain), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """`(B, 3, H, W)` in [-1, 1] to `(B, D)`."""
        cosine = self.get_buffer("cosine")
        small = F.interpolate(images.float(), (self.side, self.side), mode="area")
        ycc = torch.einsum("dc,bchw->bdhw", self.get_buffer("ycc"), small)
        spectrum = torch.einsum("uh,vw,bdhw->bduv", cosine, cosine, ycc)
        return spectrum.flatten(1)[:, self.get_buffer("index")] * self.get_buffer("gain")
