"""A weight-free latent codec: the low frequencies of an 8x8 block cosine transform.

It stands where a trained VAE stands, so that everything runs on a machine that has downloaded
nothing. It is linear, exact in its 48 channels (32 of luma, 8 of each chroma), differentiable
and the same for every image.

Shapes: T frames, H W pixels, h w = H/8 W/8 latent size, C = 48 channels.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from animator.decoder_windows import Latents
from animator.spectrum import RGB_TO_YCC, cosine_basis, frequencies

BLOCK = 8
NUM_LUMA, NUM_CHROMA = 32, 8
DECODED = 16  # frames of a stream that are decoded together

# Spread of the coefficients of natural images at video-thumbnail size, as a law of the spatial
# frequency f: DC, then a / f^1.37 (the 1/f amplitude spectrum of natural scenes), for frames in
# [-1, 1]. Only their ratios matter much.
LUMA_DC, LUMA_AC = 4.1, 0.70
CHROMA_DC, CHROMA_AC = 1.2, 0.16
FALL_OFF = 1.37
# Between 0 (no whitening) and 1 (every channel of unit spread). Full whitening makes the
# unpredictable high frequencies count as much as the picture itself.
WHITENING = 0.5


def _spread(dc: float, ac: float, chosen: list[tuple[int, int]]) -> list[float]:
    return [dc if p == (0, 0) else ac / math.hypot(*p) ** FALL_OFF for p in chosen]


class BlockDCT(nn.Module):
    """Frames to scaled low-frequency coefficients of 8x8 blocks, and back."""

    latent_channels = NUM_LUMA + 2 * NUM_CHROMA
    spatial_factor = BLOCK
    licence = "none needed (no weights)"

    def __init__(self) -> None:
        super().__init__()
        pairs = frequencies(BLOCK)
        luma, chroma = pairs[:NUM_LUMA], pairs[:NUM_CHROMA]
        cosine = cosine_basis(BLOCK)
        ycc = torch.tensor(RGB_TO_YCC, dtype=torch.float64)
        channels = [(0, p) for p in luma] + [(1, p) for p in chroma] + [(2, p) for p in chroma]
        planes = torch.stack([torch.outer(cosine[u], cosine[v]) for _, (u, v) in channels])
        analysis = torch.stack([ycc[c] for c, _ in channels])[:, :, None, None] * planes[:, None]
        inverse = torch.linalg.inv(ycc)
        synthesis = torch.stack([inverse[:, c] for c, _ in channels])
        synthesis = synthesis[:, :, None, None] * planes[:, None]
        spread = torch.tensor(
            _spread(LUMA_DC, LUMA_AC, luma) + 2 * _spread(CHROMA_DC, CHROMA_AC, chroma)
        )
        scale = spread.pow(WHITENING)
        scale = scale * (spread / scale).square().mean().sqrt()  # unit spread over all channels
        self.register_buffer("analysis", analysis.float(), persistent=False)
        self.register_buffer("synthesis", synthesis.float(), persistent=False)
        self.register_buffer("scale", rearrange(scale.float(), "c -> 1 c 1 1"), persistent=False)

    def encode(self, frames: Tensor) -> Tensor:
        """`(T, 3, H, W)` in [-1, 1] to latents `(T, 48, h, w)` of about unit spread.

        Raises:
            ValueError: where H or W is not a multiple of 8.
        """
        height, width = frames.shape[-2:]
        if height % BLOCK or width % BLOCK:
            raise ValueError(
                f"Got frames of {height} x {width}, but expected multiples of {BLOCK} pixels."
            )
        return F.conv2d(
            frames.float(), self.get_buffer("analysis"), stride=BLOCK
        ) / self.get_buffer("scale")

    def encode_reference(self, frames: Tensor) -> Tensor:
        """Latents of reference images: the same as `encode`."""
        return self.encode(frames)

    def decode(self, latents: Tensor) -> Tensor:
        """`(T, 48, h, w)` to frames `(T, 3, H, W)`, not clamped."""
        return F.conv_transpose2d(
            latents.float() * self.get_buffer("scale"), self.get_buffer("synthesis"), stride=BLOCK
        )

    def decode_stream(self, latents: Latents) -> Iterator[Tensor]:
        """Frames `(t, 3, H, W)` of a clip in order, a few at a time."""
        for start in range(0, len(latents), DECODED):
            yield self.decode(latents[start : start + DECODED])

    def decode_spans(self, latents: Latents) -> list[tuple[int, int]]:
        """One span: each frame is decoded by itself."""
        return [(0, len(latents))]
