"""The frames of a video, shrunk, decoded when they are asked for: a sequence that keeps none.

Shapes: H W pixels of the shrunk frame.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from pipelines.video import VideoError, VideoLimits, iter_frames

_TINY = (8, 8)  # pixels, of frames that are only counted


class SmallFrames(Sequence[np.ndarray]):
    """Frames `(H, W, 3)` uint8 RGB of a video at a constant rate.

    It is quick where frames are taken in order; to go back is to begin at the start again.

    Args:
        fps: frames a second.
        max_side: pixels that the longer side has at most.

    Raises:
        VideoError: for a video that cannot be read or has no frame.
    """

    def __init__(self, path: Path, *, fps: float, max_side: int, limits: VideoLimits):
        self.path = path
        self._fps, self._max_side, self._limits = fps, max_side, limits
        counted = iter_frames(path, fps=fps, size=_TINY, limits=limits, exact=False)
        self._length = sum(1 for _ in counted)
        if not self._length:
            raise VideoError(f"{path}: no frame can be read; give another video")
        self._next = 0
        self._reader: Iterator[np.ndarray] | None = None

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self._frame(number) for number in range(*index.indices(self._length))]
        number = int(index) + (self._length if index < 0 else 0)
        if not 0 <= number < self._length:
            raise IndexError(f"frame {index} of {self._length}")
        return self._frame(number)

    def _frame(self, number: int) -> np.ndarray:
        if self._reader is None or number < self._next:
            self._next = 0
            self._reader = iter_frames(
                self.path, fps=self._fps, max_side=self._max_side, limits=self._limits
            )
        frame = None
        while self._next <= number:
            frame = next(self._reader, None)
            self._next += 1
        if frame is None:
            raise VideoError(f"{self.path}: frame {number} could not be read a second time")
        return frame
