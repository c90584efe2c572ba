"""A clip's frames as a sequence that holds only the few being looked at."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from pipelines.video import VideoError, iter_frames


class FrameStream(Sequence[np.ndarray]):
    """Frames (H, W, 3) uint8 RGB of a file at a constant rate, decoded as they are asked for.

    Reading forwards, singly or by slices, decodes once; going back begins again.

    Args:
        length: how many frames there are.
        every: take each n-th frame only.
    """

    def __init__(self, path: Path, fps: float, length: int, every: int = 1) -> None:
        self.path = path
        self.fps = fps
        self.numbers = range(0, length, every)
        self._rest: Iterator[np.ndarray] = iter(())
        self._next = length
        self._held: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        """One frame, or the frames of a slice. Raises VideoError where the file ends early."""
        wanted = self.numbers[index]
        if isinstance(wanted, int):
            return self._read([wanted])[0]
        return self._read(list(wanted))

    def _read(self, numbers: list[int]) -> list[np.ndarray]:
        if not numbers:
            return []
        low, high = min(numbers), max(numbers)
        self._held = {number: frame for number, frame in self._held.items() if number >= low}
        if low not in self._held and low < self._next:
            self._rest, self._next, self._held = iter_frames(self.path, fps=self.fps), 0, {}
        while self._next <= high:
            frame = next(self._rest, None)
            if frame is None:
                raise VideoError(f"{self.path}: ends before frame {high}")
            if self._next >= low:
                self._held[self._next] = frame
            self._next += 1
        return [self._held[number] for number in numbers]
