"""Clips at the training size: frames, drawn poses and faces, kept while they fit in memory.

Safe to share by threads. Shapes: T frames, P people, K keypoints (18 or 128), H W training size.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from animator.config import PoseStyle
from inference.conditioning import pose_images
from pipelines.clips import ClipStore
from pipelines.framing import Framing, fit

Value = TypeVar("Value")
_LIGHT_BYTES = 256 << 20  # of poses and faces kept


def open_clips(shards: str) -> ClipStore:
    """The clips that a task learns from.

    Raises:
        ValueError: no folder was given, or it holds no kept clip.
    """
    if not shards:
        raise ValueError(
            "There are no shards to learn from: give the folder that `animator curate` wrote, "
            "with --set task.shards=DIR."
        )
    clips = ClipStore(shards)
    if not len(clips):
        raise ValueError(f"{shards} holds no kept clip: its report says why each was rejected.")
    return clips


@dataclass(frozen=True)
class FramedClip:
    """One clip's light data, mapped to the training size."""

    framing: Framing
    keypoints: np.ndarray  # (T, P, K, 2)
    score: np.ndarray  # (T, P, K)
    threshold: float
    face_boxes: np.ndarray  # (T, P, 4)
    landmarks: np.ndarray  # (T, P, 5, 2)
    source_boxes: np.ndarray  # (T, P, 4), of faces in the clip's own frames
    source_landmarks: np.ndarray  # (T, P, 5, 2), likewise
    face_score: np.ndarray  # (T, P)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(v.nbytes for v in vars(self).values() if isinstance(v, np.ndarray))


class Pictures(NamedTuple):
    """What an example shows of a clip."""

    frames: np.ndarray  # (n, H, W, 3)
    reference: np.ndarray  # (H, W, 3)
    native: np.ndarray | None  # the reference in the clip's own size, where it was asked for


class FramedClips:
    """A clip store seen through one frame size, or one for each clip.

    Where all clips together fit in the cache, each is decoded once and kept as uint8. Otherwise
    only the frames asked for are read: in a large store a clip comes back too late to be kept.

    Args:
        size: (height, width).
        mode: of the framing.
        cache_bytes: for frames and pose images together.
        style: how poses are drawn; the model's `pose_style`.
        sizes: (height, width) of each clip instead of `size`.
    """

    def __init__(
        self,
        clips: ClipStore,
        size: tuple[int, int],
        mode: str,
        cache_bytes: int = 1 << 30,
        style: PoseStyle = "bold",
        sizes: Sequence[tuple[int, int]] | None = None,
    ):
        self.clips = clips
        self.size = size
        self.mode = mode
        self.style: PoseStyle = style
        self._sizes = sizes
        self._light: ByteCache[FramedClip] = ByteCache(_LIGHT_BYTES, lambda clip: clip.nbytes)
        self._whole: ByteCache[np.ndarray] = ByteCache(cache_bytes, lambda frames: frames.nbytes)
        pixels = (
            clips.num_frames(i) * height * width
            for i, (height, width) in enumerate(map(self.size_of, range(len(clips))))
        )
        self._keeps = 2 * 3 * sum(pixels) <= cache_bytes

    def size_of(self, index: int) -> tuple[int, int]:
        """(height, width) of a clip's frames here."""
        return self.size if self._sizes is None else self._sizes[index]

    def clip(self, index: int) -> FramedClip:
        """Poses and faces of a clip at the training size."""
        return self._light.get(index, lambda: self._read_light(index))

    def frames(self, index: int, which: np.ndarray) -> np.ndarray:
        """Chosen frames, `(n, H, W, 3)` uint8."""
        if not self._keeps:
            return self._framed(index, self.clips.frames(index, which.tolist()))
        return self._whole.get(("frames", index), lambda: self._read_all(index))[which]

    def poses(self, index: int, which: np.ndarray) -> np.ndarray:
        """Chosen frames' drawn poses, `(n, H, W, 3)` uint8."""
        if not self._keeps:
            return self.draw(index, self.clip(index).keypoints[which], which)
        clip, every = self.clip(index), np.arange(self.clips.num_frames(index))
        return self._whole.get(("poses", index), lambda: self.draw(index, clip.keypoints, every))[
            which
        ]

    def draw(self, index: int, keypoints: np.ndarray, which: np.ndarray) -> np.ndarray:
        """Other keypoints `(n, P, K, 2)` in place of those of the chosen frames, drawn."""
        clip = self.clip(index)
        score = clip.score[which]
        return pose_images(keypoints, score, self.size_of(index), clip.threshold, self.style)

    def pictures(
        self, index: int, which: np.ndarray, reference: int, *, native: bool = False
    ) -> Pictures:
        """Chosen frames and a reference frame, from one pass over the clip."""
        if self._keeps:
            both = self.frames(index, np.append(which, reference))
            own = self.clips.frames(index, [reference])[0] if native else None
            return Pictures(both[:-1], both[-1], own)
        found = self.clips.frames(index, [*which.tolist(), reference])
        both = self._framed(index, found)
        return Pictures(both[:-1], both[-1], found[-1].copy() if native else None)

    def _read_light(self, index: int) -> FramedClip:
        framing = fit(self.clips.size(index), self.size_of(index), self.mode)
        pose, faces = self.clips.pose(index), self.clips.faces(index)
        meta = self.clips.meta(index)
        return FramedClip(
            framing,
            framing.points(pose.keypoints),
            pose.score,
            float(meta.get("pose", {}).get("threshold", 0.3)),
            framing.boxes(faces.boxes),
            framing.points(faces.landmarks),
            faces.boxes,
            faces.landmarks,
            faces.score,
        )

    def _framed(self, index: int, frames: np.ndarray) -> np.ndarray:
        framing = self.clip(index).framing
        return np.stack([framing.image(frame) for frame in frames])

    def _read_all(self, index: int, chunk: int = 64) -> np.ndarray:
        # In chunks: a clip at its own size may not fit in memory.
        every = range(self.clips.num_frames(index))
        return np.concatenate(
            [
                self._framed(index, self.clips.frames(index, every[first : first + chunk]))
                for first in range(0, len(every), chunk)
            ]
        )


class ByteCache(Generic[Value]):
    """Values by key while they fit in so many bytes; the least recently used go first.

    A value is made once, however many threads ask for it at a time, and without holding up those
    that ask for others.
    """

    def __init__(self, limit: int, size: Callable[[Value], int]) -> None:
        self._limit = limit
        self._size = size
        self._lock = threading.Lock()
        self._held: OrderedDict[Hashable, Value] = OrderedDict()
        self._making: dict[Hashable, Future[Any]] = {}
        self._bytes = 0

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of a key; `make` gives it where it is not held."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
            other = self._making.get(key)
            if other is None:
                own = self._making[key] = Future()
        if other is not None:
            return other.result()
        try:
            value = make()
        except BaseException as error:
            with self._lock:
                del self._making[key]
            own.set_exception(error)
            raise
        with self._lock:
            del self._making[key]
            self._held[key] = value
            self._bytes += self._size(value)
            while self._bytes > self._limit:
                self._bytes -= self._size(self._held.popitem(last=False)[1])
        own.set_result(value)
        return value
