"""Driving poses off their place, as those that alignment gives in use.

Shapes: T frames, P people, K keypoints, H W pixels.
"""

import numpy as np
import torch
from torch import Tensor

from animator.alignment_weights import SHIPPED, open_alignment
from animator.keypoints import SimilarityRange, from_isotropic, misalignment, to_isotropic
from animator.similarity import apply
from inference.retarget import retarget
from training.animate_config import AnimateConfig
from training.frames import FramedClip

NUMBERS = 5  # that an example's augmentation is drawn from
_ALIGNED = ("learned", "closed_form", "kept")


class PoseAugmenter:
    """Moves all keypoints of some clips by one random similarity each.

    `perturbed` moves them a little. `aligned` misaligns them as alignment is trained for and
    aligns them to the reference's pose again, by the block that the model is released with, so
    that what is left is what alignment leaves in use.
    """

    def __init__(self, config: AnimateConfig) -> None:
        self.kind, self.share = config.pose_augmentation, config.pose_augmented
        self.limits = config.perturbation if self.kind == "perturbed" else SimilarityRange()
        self._block = None
        if self.kind == "aligned":
            self._block = open_alignment(config.alignment or SHIPPED)[0]

    def __call__(
        self,
        clip: FramedClip,
        size: tuple[int, int],
        chosen: np.ndarray,
        reference: int,
        uniform: Tensor,
    ) -> np.ndarray | None:
        """The chosen frames' keypoints `(T, P, K, 2)`, moved; None where they stay.

        Args:
            size: (height, width) of the frames.
            reference: number of the reference frame.
            uniform: numbers of 0..1 that decide, `(NUMBERS,)`.
        """
        if self.kind == "none" or float(uniform[0]) >= self.share:
            return None
        height, width = size
        points = clip.keypoints[chosen].astype(np.float32)
        flat = torch.from_numpy(to_isotropic(points, width, height)).reshape(1, -1, 2)
        moved = apply(misalignment(uniform[None, 1:], self.limits), flat).reshape(points.shape)
        keypoints = from_isotropic(moved.numpy(), width, height)
        if self.kind == "perturbed":
            return keypoints
        found = retarget(
            self._block,
            (clip.keypoints[reference], clip.score[reference]),
            (keypoints, clip.score[chosen]),
            (size, size),
            (clip.threshold, clip.threshold),
        )
        # Too little in common: such a clip could not be driven either, and would teach nothing.
        return found.keypoints if found.main.method in _ALIGNED else None
