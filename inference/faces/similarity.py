"""How alike a decoded face is to the reference's: the measure that face optimisation raises.

Shapes: B faces, h w pixels of a picture, E embedding.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from animator import similarity
from animator.face_embedding import CROP, MARGIN, TEMPLATE, ArcFace, align_faces, crop_faces


@dataclass(frozen=True)
class FaceReader:
    """A network that knows faces, and how they are cut out for it.

    `landmarks` turns them upright by five points, as recognition networks learned them; `box` cuts
    out a square.
    """

    network: nn.Module
    by: Literal["landmarks", "box"] = "landmarks"

    def embed(self, pictures: Tensor, landmarks: Tensor, boxes: Tensor) -> Tensor:
        """Embeddings `(B, E)`, differentiable in the pictures `(B, 3, h, w)`.

        Args:
            landmarks: `(B, 5, 2)` in 0..1 of the picture.
            boxes: `(B, 4)` in 0..1 of the picture.
        """
        if self.by == "landmarks":
            faces = align_faces(pictures, landmarks)
        else:
            faces = crop_faces(pictures, boxes, CROP)
        network: Any = self.network
        return network(faces.to(_dtype(network))).float()

    def area(self, landmarks: np.ndarray, boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """What of a picture of (H, W) pixels the network is shown: boxes `(..., 4)` in pixels."""
        extent = torch.tensor(size[::-1], dtype=torch.float32)
        if self.by == "box":
            box = torch.from_numpy(np.asarray(boxes, np.float32)) * extent.repeat(2)
            half = (box[..., 2:] - box[..., :2]).amax(-1, keepdim=True) * MARGIN / 2
            middle = (box[..., :2] + box[..., 2:]) / 2
            return torch.cat([middle - half, middle + half], dim=-1).numpy()
        points = torch.from_numpy(np.asarray(landmarks, np.float32)) * extent
        template = torch.tensor(TEMPLATE).expand_as(points)
        to_picture = similarity.fit(template, points, torch.ones_like(points[..., 0]))
        square = torch.tensor([(0.0, 0.0), (CROP, 0.0), (CROP, CROP), (0.0, CROP)])
        corners = similarity.apply(to_picture, square.expand(*points.shape[:-2], -1, -1))
        return torch.cat([corners.amin(-2), corners.amax(-2)], dim=-1).numpy()


def similarities(embeddings: Tensor, target: Tensor) -> Tensor:
    """Cosines `(B,)` of embeddings `(B, E)` with the target's `(E,)` or `(B, E)`."""
    return F.cosine_similarity(embeddings, target.expand_as(embeddings), dim=-1)


@lru_cache(maxsize=2)
def arcface(path: Path, device: torch.device) -> ArcFace:
    """A recognition network, frozen; the last two are kept open.

    Raises:
        OnnxError: a ValueError, for a file that is no such network.
    """
    return ArcFace.from_onnx(path).eval().requires_grad_(False).to(device)


def _dtype(network: nn.Module) -> torch.dtype:
    return next(network.parameters(), torch.empty(0)).dtype
