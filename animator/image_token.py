"""Weight-free image token: what stands in for a CLIP image embedding on a bare machine.

Shapes: B batch, H W pixels, D context width.
"""

from einops import rearrange
from torch import Tensor, nn

from animator.spectrum import ThumbnailSpectrum

SIDE = 16


class ThumbnailToken(nn.Module):
    """Colours and layout of a 16x16 thumbnail as one token; no semantics."""

    name = "thumbnail"
    licence = "none needed (no weights)"

    def __init__(self, dim: int):
        super().__init__()
        self.spectrum = ThumbnailSpectrum(dim, SIDE)

    def forward(self, images: Tensor) -> Tensor:
        """`(B, 3, H, W)` in [-1, 1] to `(B, 1, D)`."""
        return rearrange(self.spectrum(images), "b d -> b 1 d")
