"""Faces to embeddings, differentiable in the pixels: crops, a recognition network, a stand-in.

Shapes: B batch, H W pixels of the image, S side of the crop, E embedding.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from animator import licences, similarity
from animator.config import ChannelOrder
from animator.onnx_torch import OnnxNetwork
from animator.spectrum import ThumbnailSpectrum

CROP = 112  # pixels, what ArcFace networks take
MARGIN = 1.3  # side of the crop over the longer side of the box
# Eyes, nose and mouth corners in a crop of 112 pixels, left to right in the picture (InsightFace).
TEMPLATE = (
    (38.2946, 51.6963),
    (73.5318, 51.5014),
    (56.0252, 71.7366),
    (41.5493, 92.3655),
    (70.7299, 92.2041),
)
BLACK = -1.0


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


def align_faces(images: Tensor, landmarks: Tensor, size: int = CROP) -> Tensor:
    """Faces turned and scaled so that their landmarks lie where recognition networks expect them.

    The least-squares similarity of five points, sampled bilinearly, as in InsightFace's
    `norm_crop`. Differentiable in the pixels.

    Args:
        images: `(B, 3, H, W)` in [-1, 1].
        landmarks: eyes, nose and mouth corners, x and y in 0..1 of the image, `(B, 5, 2)`.

    Returns:
        `(B, 3, S, S)`; what lies outside the image is black.

    Raises:
        ValueError: for landmarks of another shape, or that are not finite.
    """
    if landmarks.shape != (len(images), len(TEMPLATE), 2):
        raise ValueError(
            f"Got landmarks {tuple(landmarks.shape)} for {len(images)} images, but expected "
            f"({len(images)}, {len(TEMPLATE)}, 2)."
        )
    if not bool(torch.isfinite(landmarks).all()):
        raise ValueError("Got a face without landmarks; leave it out, or crop it by its box.")
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    height, width = images.shape[-2:]
    extent = images.new_tensor([width, height])
    points = landmarks.to(images) * extent
    template = images.new_tensor(TEMPLATE) * (size / CROP)
    weight = torch.ones_like(points[..., 0])
    to_image = similarity.invert(similarity.fit(points, template.expand_as(points), weight))
    ramp = torch.arange(size, device=images.device, dtype=images.dtype)
    pixels = torch.stack(torch.meshgrid(ramp, ramp, indexing="xy"), dim=-1)
    sources = similarity.apply(to_image, pixels.flatten(0, 1).expand(len(images), -1, -1))
    # Whole numbers are the centres of pixels here, as in OpenCV.
    grid = (2 * sources + 1) / extent - 1
    # The sampler's border is 0, so black is moved there and back.
    crops = F.grid_sample(images - BLACK, grid.unflatten(1, (size, size)), align_corners=False)
    return crops + BLACK


class ArcFace(nn.Module):
    """A recognition network: who a face is, with gradients to its pixels.

    Args:
        network: takes `(B, 3, 112, 112)`.
        name, licence: for the record of an output.
        channel_order: in which the network is given the colours; published networks want RGB.
        scaled_inside: whether the graph itself takes 0..255 to its own range.
    """

    def __init__(
        self,
        network: OnnxNetwork,
        *,
        name: str,
        licence: str = licences.INSIGHTFACE,
        channel_order: ChannelOrder = "rgb",
        scaled_inside: bool = False,
    ):
        super().__init__()
        self.network = network
        self.name = name
        self.licence = licence
        self.channel_order: ChannelOrder = channel_order
        self.scaled_inside = scaled_inside
        self.dim = network.dim

    @classmethod
    def from_onnx(
        cls,
        path: str | Path,
        *,
        licence: str = licences.INSIGHTFACE,
        channel_order: ChannelOrder = "rgb",
    ) -> "ArcFace":
        """The recogniser of an InsightFace pack, or any network that is used as one.

        Raises:
            OnnxError: a ValueError, for a file that is no such network.
        """
        network = OnnxNetwork.from_file(path, (3, CROP, CROP))
        return cls(
            network,
            name=f"arcface:{Path(path).stem}",
            licence=licence,
            channel_order=channel_order,
            scaled_inside=_scales_inside(network.node_names),
        )

    def forward(self, faces: Tensor) -> Tensor:
        """Aligned RGB faces `(B, 3, 112, 112)` in [-1, 1] to `(B, E)`, not normalised.

        In the network's type: `.to(torch.bfloat16)` halves its memory.
        """
        if faces.shape[1:] != (3, CROP, CROP):
            raise ValueError(
                f"Got faces {tuple(faces.shape)}, but expected (B, 3, {CROP}, {CROP})."
            )
        if self.channel_order == "bgr":
            faces = faces.flip(1)
        # Elsewhere the network takes (x - 127.5) / 127.5, which is what [-1, 1] already is.
        return self.network((faces + 1) * 127.5 if self.scaled_inside else faces)


def _scales_inside(node_names: tuple[str, ...]) -> bool:
    """InsightFace's rule: a subtraction and a multiplication among the first eight nodes."""
    first = node_names[:8]
    return any(name.startswith(("Sub", "_minus")) for name in first) and any(
        name.startswith(("Mul", "_mul")) for name in first
    )


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
