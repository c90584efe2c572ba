"""A clip that has been sampled, as a stream of frames: decoded while they are read.

Shapes: T frames, t of a part, C latent channels, h w latent size, H W size of the output.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from animator.latents import LatentCodec
from inference.conditioning import to_frames
from inference.faces.optimizer import FaceOptimizer
from inference.pose_features import PoseImages
from inference.retarget import Retargeted
from inference.states import ClipStates
from inference.windows import Window
from pipelines.framing import Framing

if TYPE_CHECKING:
    from inference.settings import AnimationSettings


@dataclass(frozen=True)
class AnimationResult:
    """What the pipeline made, all in memory."""

    frames: np.ndarray  # (T, H, W, 3) uint8
    pose_frames: np.ndarray  # (T, H, W, 3) uint8, the poses that drove them
    alignment: Retargeted
    framing: Framing
    settings: "AnimationSettings"


class SampledLatents:
    """Clean latents of a clip, read from where they were sampled a few frames at a time."""

    def __init__(self, states: ClipStates, device: torch.device):
        self._states = states
        self._device = device

    def __len__(self) -> int:
        return len(self._states)

    def __getitem__(self, frames: slice) -> Tensor:
        """`(t, C, h, w)` on the device.

        Raises:
            ValueError: where sampling ended in numbers that are not finite.
        """
        latents = self._states.current.read(range(*frames.indices(len(self))))
        if not latents.isfinite().all():
            raise ValueError(
                "Sampling ended in numbers that are not finite: try another --dtype (fp32 is the "
                "safest) or the model's own sampler settings."
            )
        return latents.to(self._device)


@dataclass(frozen=True)
class AnimationStream:
    """A sampled clip. Its frames may be read as often as wanted, until it is closed."""

    states: ClipStates
    codec: LatentCodec
    device: torch.device
    poses: PoseImages  # what drove it, at the model's size
    alignment: Retargeted
    framing: Framing
    settings: "AnimationSettings"
    plan: Callable[[int], list[Window]]  # the windows of a step
    faces: FaceOptimizer | None = None  # what optimised the faces
    no_faces: str = ""  # why nothing did, where it was asked for
    faceless: tuple[int, ...] = ()  # see `inference.clip_conditions.faceless_people`

    def __len__(self) -> int:
        return len(self.states)

    @cached_property
    def size(self) -> tuple[int, int]:
        """(H, W): the picture without the padding, even on both sides."""
        y0, y1, x0, x1 = self._inner
        return y1 - y0, x1 - x0

    def frames(self) -> Iterator[np.ndarray]:
        """uint8 RGB `(H, W, 3)`, in order."""
        for part in self._decoded():
            yield from self._cropped(part)

    def pose_frames(self) -> Iterator[np.ndarray]:
        """The poses as pictures, uint8 RGB `(H, W, 3)`."""
        for frame in range(len(self)):
            yield from self._cropped(self.poses[[frame]])

    def decoded_spans(self) -> list[tuple[int, int]]:
        """First and last + 1 frame of what is decoded together."""
        return self.codec.decode_spans(self._latents)

    def collect(self) -> AnimationResult:
        """All frames in memory."""
        return AnimationResult(
            np.stack(list(self.frames())),
            np.stack(list(self.pose_frames())),
            self.alignment,
            self.framing,
            self.settings,
        )

    @property
    def _latents(self) -> SampledLatents:
        return SampledLatents(self.states, self.device)

    def _decoded(self) -> Iterator[np.ndarray]:
        stream = self.codec.decode_stream(self._latents)
        while True:
            with torch.no_grad():  # not over a `yield`, which would hand it to the reader
                part = next(stream, None)
                if part is None:
                    return
                frames = to_frames(part)
            del part
            yield frames

    @cached_property
    def _inner(self) -> tuple[int, int, int, int]:
        x0, y0, x1, y1 = self.framing.inner_box()
        return y0, y1 - (y1 - y0) % 2, x0, x1 - (x1 - x0) % 2

    def _cropped(self, frames: np.ndarray) -> np.ndarray:
        """Cut the padding away: the output has the reference's own shape."""
        y0, y1, x0, x1 = self._inner
        return np.ascontiguousarray(frames[:, y0:y1, x0:x1])
