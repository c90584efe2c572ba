"""The latents of a clip while it is sampled, kept on the host or in a work folder.

A clip is worked through a few frames at a time, so what is kept here is all that grows with its
length. In a work folder it is kept in files that are read and written frame by frame: they take no
memory of the process, and outlive it. After each step the new latents are synced to disk and only
then does `state.json` name the step, so a run that is killed at any moment is continued from the
last whole step; files take turns, so that a half-written step spoils nothing.

Shapes: T frames of a clip, t of a portion, C latent channels, h w latent size.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from inference.outputs import FolderLock, read_json, sync, write_json
from pipelines.shards import write_atomic

FORMAT = 2  # of a work folder; another one's states are not continued
STATE, CONDITIONS, LOCK = "state.json", "conditions.safetensors", "lock"
# All that a work folder holds, what a kill left of a file that was being written included.
OWN = re.compile(
    r"lock|(latents-\d+|predicted|corrected)\.f32"
    r"|\.?(state\.json|conditions\.safetensors|faces-\d+\.npz)(\.\d+\.tmp)?"
)
_BYTES = 4  # of a float32


class WorkFolderError(ValueError):
    """A work folder that cannot be used; the message says what to do."""


class Frames(Protocol):
    """Float32 `(T, C, h, w)` of which any frames can be read and written."""

    def read(self, frames: Sequence[int]) -> Tensor:
        """These frames, `(t, C, h, w)`, on the host."""
        ...

    def write(self, frames: Sequence[int], values: Tensor) -> None:
        """Replace these frames."""
        ...

    def clear(self) -> None:
        """Make all frames zeros."""
        ...


class HostFrames:
    """Frames in the memory of the process."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype = torch.float32):
        self._values = torch.zeros(*shape, dtype=dtype)

    def read(self, frames: Sequence[int]) -> Tensor:
        """These frames, a copy."""
        return self._values[list(frames)]

    def write(self, frames: Sequence[int], values: Tensor) -> None:
        """Replace these frames."""
        self._values[list(frames)] = values.to("cpu", self._values.dtype)

    def clear(self) -> None:
        """Make all frames zeros."""
        self._values.zero_()


class FileFrames:
    """Frames in a file of plain float32, one after another."""

    def __init__(self, path: Path, shape: Sequence[int]):
        self.path = path
        self._frame = tuple(shape[1:])
        self._frame_bytes = _BYTES * prod(self._frame)
        self._size = self._frame_bytes * shape[0]
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        if os.fstat(self._descriptor).st_size != self._size:
            self.clear()

    def read(self, frames: Sequence[int]) -> Tensor:
        """These frames, a copy."""
        values = np.empty((len(frames), *self._frame), np.float32)
        for row, frame in zip(values, frames, strict=True):
            target = memoryview(row).cast("B")
            if os.preadv(self._descriptor, [target], frame * self._frame_bytes) != len(target):
                raise OSError(f"{self.path}: frame {frame} cannot be read; is the disk full?")
        return torch.from_numpy(values)

    def write(self, frames: Sequence[int], values: Tensor) -> None:
        """Replace these frames."""
        rows = values.detach().to("cpu", torch.float32).contiguous().numpy()
        for row, frame in zip(rows, frames, strict=True):
            source = memoryview(row).cast("B")
            if os.pwrite(self._descriptor, source, frame * self._frame_bytes) != len(source):
                raise OSError(f"{self.path}: frame {frame} cannot be written; is the disk full?")

    def clear(self) -> None:
        """Make all frames zeros."""
        os.ftruncate(self._descriptor, 0)
        os.ftruncate(self._descriptor, self._size)

    def sync(self) -> None:
        """Have what was written reach the disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Give the file back; nothing can be read or written afterwards."""
        os.close(self._descriptor)


class ClipStates:
    """The noisy latents of a clip between steps, and room for predictions within one.

    Args:
        shape: `(T, C, h, w)`.
        folder: where the states are kept; None keeps them in the memory of the process.
        identity: of everything that the states depend on; states of another are not continued.
        replace: what to do with a folder of another identity: start afresh, or refuse it.
        every: steps after which a run can be continued, where those between depend on what is not
            kept here.
        dtype: of states in memory; those in files are float32.

    Raises:
        WorkFolderError: for a folder with the states of another request, and for one that holds
            other files.
        FolderInUseError: where another process works in the folder.
    """

    def __init__(
        self,
        shape: Sequence[int],
        folder: Path | None = None,
        identity: str = "",
        *,
        replace: bool = False,
        every: int = 1,
        dtype: torch.dtype = torch.float32,
    ):
        self._dtype = dtype
        self._every = every
        self._slot = 0  # of the current latents
        self._safe: int | None = None  # the slot that the folder's state names
        self.shape = tuple(shape)
        self.folder = folder
        self.step = 0  # steps that are done
        self.continued_from = 0  # those that another process did
        self._frames: dict[str, HostFrames | FileFrames] = {}
        self._lock: FolderLock | None = None
        self._about = {
            "format": FORMAT,
            "identity": identity,
            "shape": list(self.shape),
            "every": every,
        }
        if folder is not None:
            self._open(folder, replace)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def current(self) -> Frames:
        """The latents after `step` steps."""
        return self.room(f"latents-{self._slot}")

    @property
    def coming(self) -> Frames:
        """Where the latents of the next step are written."""
        return self.room(f"latents-{self._next_slot}")

    @property
    def _next_slot(self) -> int:
        return min({0, 1, 2} - {self._slot, self._safe})

    def room(self, name: str) -> Frames:
        """Frames for use within a step; they hold what was last written, if anything."""
        if name not in self._frames:
            self._frames[name] = (
                HostFrames(self.shape, self._dtype)
                if self.folder is None
                else FileFrames(self.folder / f"{name}.f32", self.shape)
            )
        return self._frames[name]

    def kept(self, conditions: dict[str, Tensor]) -> dict[str, Tensor]:
        """The conditions that the steps so far were computed with, the given ones at the start.

        Computed a second time they could be rounded otherwise, and the video be another one.
        """
        if self.folder is None:
            return conditions
        path = self.folder / CONDITIONS
        if self.step:
            found = load_file(path)
            return {name: found[name].to(value.device) for name, value in conditions.items()}
        write_atomic(path, save({name: v.cpu().contiguous() for name, v in conditions.items()}))
        return conditions

    def commit(self, *, last: bool = False) -> None:
        """What is `coming` is whole and becomes `current`; `last` says that no step follows."""
        coming = self.coming
        if self.folder is not None and (last or (self.step + 1) % self._every == 0):
            assert isinstance(coming, FileFrames)
            coming.sync()
            state = {**self._about, "step": self.step + 1, "latents": self._next_slot}
            write_json(self.folder / STATE, state)
            self._slot = self._safe = self._next_slot
        else:
            self._slot = self._next_slot
        self.step += 1

    def close(self) -> None:
        """Let go of the files and the folder, which stays to be continued."""
        for frames in self._frames.values():
            if isinstance(frames, FileFrames):
                frames.close()
        self._frames.clear()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def remove(self) -> None:
        """Close, and remove the work folder: what it was for is done."""
        self.close()
        if self.folder is not None:
            with suppress(OSError):
                for path in self.folder.iterdir():
                    if OWN.fullmatch(path.name):
                        path.unlink(missing_ok=True)
                self.folder.rmdir()  # what somebody else put there stays

    def _open(self, folder: Path, replace: bool) -> None:
        self._lock = FolderLock(folder, LOCK, "run")
        try:
            found = read_json(folder / STATE)
            if found is None:
                self._refuse_foreign(folder)
            elif all(found.get(name) == value for name, value in self._about.items()):
                self.step = self.continued_from = int(found["step"])
                self._slot = self._safe = int(found["latents"])
            elif not replace:
                raise WorkFolderError(
                    f"{folder}: holds the unfinished states of another request; finish that one, "
                    "remove the folder or give another."
                )
            if not self.step:
                for path in folder.iterdir():
                    if path.name != LOCK and OWN.fullmatch(path.name):
                        path.unlink(missing_ok=True)
                sync(folder)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _refuse_foreign(folder: Path) -> None:
        foreign = [path.name for path in folder.iterdir() if not OWN.fullmatch(path.name)]
        if foreign:
            raise WorkFolderError(
                f"{folder}: holds other files ({min(foreign)}), expected an empty folder or none: "
                "it is removed once the video is done."
            )


@dataclass(frozen=True)
class WorkPlace:
    """A folder for the states of one request.

    `inputs` tells what the inputs were made from, such as the hashes of files: found a second time
    in another process, poses may be rounded otherwise. Without it the inputs themselves tell.
    """

    folder: Path
    model: str = ""  # fingerprint of the weights
    inputs: str = ""
    replace: bool = False  # start afresh where the folder holds another request's states


def open_states(
    shape: Sequence[int],
    work: WorkPlace | None,
    about: Any,
    inputs: Sequence[np.ndarray | None],
    *,
    every: int = 1,
) -> ClipStates:
    """States in the memory of the process, or in a work folder, continued where they are there.

    Args:
        about: plain values that the states depend on.
        inputs: arrays that they depend on.
        every: see `ClipStates`.

    Raises:
        WorkFolderError, FolderInUseError: see `ClipStates`.
    """
    if work is None:
        return ClipStates(shape)
    text = json.dumps([work.model, work.inputs, about], sort_keys=True)
    digest = hashlib.sha256(text.encode())
    for array in () if work.inputs else inputs:
        if array is not None:
            digest.update(repr((array.shape, array.dtype.str)).encode())
            digest.update(np.ascontiguousarray(array).data)
    return ClipStates(shape, work.folder, digest.hexdigest(), replace=work.replace, every=every)
