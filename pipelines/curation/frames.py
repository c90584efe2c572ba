"""Frames as sequences that hold only the few being looked at: of a file, or set down on the disk.

H W height and width
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from pipelines.curation.machine import own_files
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


class FrameSpool:
    """Frames (H, W, 3) uint8 of one size, raw in an open file that two processes may share.

    What was just written is read from the system's page cache, which gives way where memory is
    short. The slots of frames that are no longer wanted are used again.

    Args:
        descriptor: of a file open for reading and writing, empty for whoever writes into it.
    """

    def __init__(self, descriptor: int, shape: tuple[int, int]) -> None:
        self.descriptor = descriptor
        self.shape = (*shape, 3)
        self.frame_bytes = 3 * shape[0] * shape[1]
        self._used = 0
        self._free: list[int] = []

    def put(self, frame: np.ndarray) -> int:
        """Write a frame; returns its slot."""
        slot = self._free.pop() if self._free else self._used
        data = np.ascontiguousarray(frame).data.cast("B")
        offset = slot * self.frame_bytes
        with own_files():
            while data:
                written = os.pwrite(self.descriptor, data, offset)
                data, offset = data[written:], offset + written
        self._used = max(self._used, slot + 1)
        return slot

    def drop(self, slot: int) -> None:
        """Give a slot up to the next frame."""
        self._free.append(slot)

    def get(self, slot: int) -> np.ndarray:
        """The frame in a slot. Raises VideoError where the file does not reach so far."""
        frame = np.empty(self.shape, np.uint8)
        data = frame.data.cast("B")
        offset = slot * self.frame_bytes
        while data:
            read = os.preadv(self.descriptor, [data], offset)
            if not read:
                raise VideoError(f"frame {slot} was never set down")
            data, offset = data[read:], offset + read
        return frame


class SpooledFrames(Sequence[np.ndarray]):
    """Frames of a spool, in an order of their own, each read when it is asked for."""

    def __init__(self, spool: FrameSpool, slots: Sequence[int]) -> None:
        self.spool = spool
        self.slots = list(slots)

    def __len__(self) -> int:
        return len(self.slots)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        """One frame, or the frames of a slice."""
        if isinstance(index, slice):
            return [self.spool.get(slot) for slot in self.slots[index]]
        return self.spool.get(self.slots[index])
