"""Face crops, and a weight-free face embedding for machines without a recognition network.

Shapes: B batch, H W pixels of the image, S side of the crop, E embedding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from animator.spectrum import ThumbnailSpectrum

CROP = 112  # pixels, what ArcFace networks take
MARGIN = 1.3  # side of the crop over the longer side of the box


def crop_faces(images: Tensor, boxes: Tensor, size: int = CROP) -> Tensor:
    """Square crops around faces, sampled bilinearly, differentiable in the pixels.

    Args:
        images: `(B, 3, H, W)`.
        boxes: x0, y0, x1, y1 in 0..1 of the image, `(B, 4)`.

    Returns:
        `(B, 3, S, S)`; what lies outside the image is its edge.
    """
    height, width = images.shape[-2:]
    pixels = boxes * boxes.new_tensor([width, height, width, height])
    centre = (pixels[:, :2] + pixels[:, 2:]) / 2
    half = (pixels[:, 2:] - pixels[:, :2]).amax(1) * MARGIN / 2
    ramp = (torch.arange(size, device=images.device, dtype=boxes.dtype) + 0.5) / size * 2 - 1
    offset = half[:, None] * ramp
    x = (centre[:, :1] + offset) / width * 2 - 1
    y = (centre[:, 1:] + offset) / height * 2 - 1
    grid = torch.stack(
        [x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], dim=-1
    )
    return F.grid_sample(images.float(), grid.float(), padding_mode="border", align_corners=False)


class FaceThumbnail(nn.Module):
    """Low cosine frequencies of a face crop with its brightness and contrast taken out.

    It tells faces apart by their appearance in the picture, not by identity: it is what a
    machine without a recognition network has, and is named so in every output.
    """

    name = "thumbnail"
    licence = "none needed (no weights)"
    side = 24

    def __init__(self, dim: int = 512):
        super().__init__()
        self.dim = dim
        self.spectrum = ThumbnailSpectrum(dim, self.side)

    def forward(self, crops: Tensor) -> Tensor:
        """Crops `(B, 3, S, S)` in [-1, 1] to `(B, E)`."""
        mean = crops.mean(dim=(1, 2, 3), keepdim=True)
        deviation = crops.std(dim=(1, 2, 3), keepdim=True)
        return self.spectrum((crops - mean) / (deviation + 0.05))
