"""Pose images and PoseNet's features of a clip, made when they are asked for.

Both are far larger than the poses they come from. Frames are taken in groups that always begin at
the same places, so a frame's features do not depend on who asks for which others.

Shapes: T frames of a clip, t of those asked for, P people, K keypoints (18 or 128), H W pixels,
C0 channels of the UNet's first block, h w latent size.
"""

import zlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from animator.config import PoseStyle
from animator.pose_net import PoseNet
from inference.conditioning import pose_images, to_tensor

GROUP = 16  # frames that PoseNet takes at a time
KEPT = 4  # groups: those that neighbouring windows share, and the first one's for anchors


class PoseImages:
    """The poses of a clip as pictures, drawn when they are asked for the first time.

    They are kept packed, as they are asked for in every step: black but for a few lines, a picture
    of 576x1024 pixels packs into 22 kB, and unpacking takes a sixth of the time of drawing.

    Args:
        keypoints: `(T, P, K, 2)` in 0..1 of the picture.
        score: `(T, P, K)`.
        size: (height, width).
        threshold: score from which a joint is drawn.
    """

    def __init__(
        self,
        keypoints: np.ndarray,
        score: np.ndarray,
        size: tuple[int, int],
        threshold: float,
        style: PoseStyle,
    ):
        self.keypoints = keypoints
        self.score = score
        self.size = size
        self.threshold = threshold
        self.style: PoseStyle = style
        self._packed: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self.keypoints)

    def __getitem__(self, frames: Sequence[int]) -> np.ndarray:
        """uint8 RGB `(t, H, W, 3)`."""
        return np.stack([self._image(int(frame)) for frame in frames])

    def _image(self, frame: int) -> np.ndarray:
        packed = self._packed.get(frame)
        if packed is not None:
            return np.frombuffer(zlib.decompress(packed), np.uint8).reshape(*self.size, 3)
        image = pose_images(
            self.keypoints[[frame]], self.score[[frame]], self.size, self.threshold, self.style
        )[0]
        self._packed[frame] = zlib.compress(image.tobytes(), level=1)
        return image


class PoseFeatures:
    """PoseNet's output for a clip; the last few groups of frames are kept."""

    def __init__(self, pose_net: PoseNet, images: PoseImages):
        self.pose_net = pose_net
        self.images = images
        self._kept: OrderedDict[int, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, frames: list[int]) -> Tensor:
        """`(t, C0, h, w)` on PoseNet's device."""
        return torch.stack([self._group(frame // GROUP)[frame % GROUP] for frame in frames])

    @torch.no_grad()
    def _group(self, number: int) -> Tensor:
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        start = number * GROUP
        images = self.images[range(start, min(start + GROUP, len(self)))]
        parameter = next(self.pose_net.parameters())
        features = self.pose_net(to_tensor(images).to(parameter.device, parameter.dtype))
        while len(self._kept) >= KEPT:
            self._kept.popitem(last=False)
        self._kept[number] = features
        return features
