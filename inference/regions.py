"""Whose place each latent cell is, where a clip shows several people.

Shapes: T frames, P people, K keypoints (N = 18 of them the body's), h w latent size, L limbs.
"""

import numpy as np
import torch
from torch import Tensor

from animator.keypoints import BODY, LIMBS

PORTION = 16  # frames at a time


class ClipRegions:
    """The regions of a clip, made when they are asked for (`inference.guidance.Regions`).

    Args:
        keypoints, score, threshold: see `person_regions`; people in the order of the context.
        size: (h, w) of the latents.
        device: where they are wanted.
    """

    def __init__(
        self,
        keypoints: np.ndarray,
        score: np.ndarray,
        size: tuple[int, int],
        threshold: float,
        device: torch.device | str = "cpu",
    ):
        self.keypoints = keypoints
        self.score = score
        self.size = size
        self.threshold = threshold
        self.device = device
        self._kept: dict[int, Tensor] = {}  # of frames, as they are asked for in every step

    def __getitem__(self, frames: list[int], /) -> Tensor:
        """Those of some frames, `(t, h, w)`."""
        missing = [frame for frame in frames if frame not in self._kept]
        if missing:
            chosen = self.keypoints[missing], self.score[missing]
            found = person_regions(*chosen, self.size, self.threshold).byte()
            self._kept.update(zip(missing, found, strict=True))
        return torch.stack([self._kept[frame] for frame in frames]).to(self.device).long()

    def to(self, device: torch.device) -> "ClipRegions":
        """The same, wanted on another device."""
        return ClipRegions(self.keypoints, self.score, self.size, self.threshold, device)


def person_regions(
    keypoints: np.ndarray, score: np.ndarray, size: tuple[int, int], threshold: float
) -> Tensor:
    """Number of the person, from 0, to whose skeleton each latent cell is nearest, `(T, h, w)`.

    Background goes to the nearest person too, as a single person's face tokens reach all of it in
    training. Where nobody is seen, cells are those of the first person.

    Args:
        keypoints: where the people are drawn, in 0..1 of the frame, `(T, P, K, 2)`.
        score: `(T, P, K)`.
        size: (h, w) of the latents.
        threshold: score from which a joint is seen.
    """
    points = torch.from_numpy(np.asarray(keypoints[:, :, BODY], np.float32))
    seen = torch.from_numpy(np.asarray(score[:, :, BODY], np.float32) >= threshold)
    seen = seen & points.isfinite().all(-1)
    height, width = size
    points = torch.where(seen[..., None], points, 0.0) * points.new_tensor([width, height])
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    cells = torch.stack([columns, rows], dim=-1).flatten(0, 1) + 0.5
    parts = [
        _distances(points[start : start + PORTION], seen[start : start + PORTION], cells).argmin(1)
        for start in range(0, len(points), PORTION)
    ]
    return torch.cat(parts).reshape(len(points), height, width)


def _distances(points: Tensor, seen: Tensor, cells: Tensor) -> Tensor:
    """From each cell `(h·w, 2)` to the nearest limb or joint of each person, `(T, P, h·w)`."""
    best = torch.full((*points.shape[:2], len(cells)), torch.inf)
    joints = [
        (joint, joint) for joint in range(points.shape[2])
    ]  # a limb's other end may be unseen
    for a, b in [*LIMBS, *joints]:
        start, along = points[:, :, a, None], (points[:, :, b] - points[:, :, a])[:, :, None]
        length = along.square().sum(-1).clamp(min=1e-9)
        share = (((cells - start) * along).sum(-1) / length).clamp(0, 1)
        distance = (cells - start - share[..., None] * along).square().sum(-1)
        there = (seen[:, :, a] & seen[:, :, b])[..., None]
        best = torch.where(there, torch.minimum(best, distance), best)
    return best
