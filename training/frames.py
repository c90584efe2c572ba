"""Frames, poses and faces of clips at the training size, cached while they fit in memory.

Shapes: T frames, P people, K keypoints (18 or 128), H W training size.
"""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from animator.config import PoseStyle
from inference.conditioning import pose_images
from pipelines.clips import ClipStore
from pipelines.framing import Framing, fit


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


class FramedClips:
    """A clip store seen through one frame size.

    Whole clips are decoded once and kept as uint8 while the cache has room (least recently used
    go first); a clip larger than a quarter of the cache is read frame by frame instead.

    Args:
        size: (height, width).
        mode: of the framing.
        cache_bytes: for frames and pose images together.
        style: how poses are drawn; the model's `pose_style`.
    """

    def __init__(
        self,
        clips: ClipStore,
        size: tuple[int, int],
        mode: str,
        cache_bytes: int = 1 << 30,
        style: PoseStyle = "bold",
    ):
        self.clips = clips
        self.size = size
        self.mode = mode
        self.style: PoseStyle = style
        self.cache_bytes = cache_bytes
        self._light: dict[int, FramedClip] = {}
        self._frames: OrderedDict[tuple[str, int], np.ndarray] = OrderedDict()

    def clip(self, index: int) -> FramedClip:
        """Poses and faces of a clip at the training size."""
        if index not in self._light:
            framing = fit(self.clips.size(index), self.size, self.mode)
            pose, faces = self.clips.pose(index), self.clips.faces(index)
            meta = self.clips.meta(index)
            self._light[index] = FramedClip(
                framing,
                framing.points(pose.keypoints),
                pose.score,
                float(meta.get("pose", {}).get("threshold", 0.3)),
                framing.boxes(faces.boxes),
                framing.points(faces.landmarks),
            )
        return self._light[index]

    def frames(self, index: int, which: np.ndarray) -> np.ndarray:
        """Chosen frames, `(n, H, W, 3)` uint8."""
        if not self._fits(index):
            return self._read(index, which.tolist())
        return self._cached("frames", index)[which]

    def poses(self, index: int, which: np.ndarray) -> np.ndarray:
        """Chosen frames' drawn poses, `(n, H, W, 3)` uint8."""
        if not self._fits(index):
            return self._draw(index, which)
        return self._cached("poses", index)[which]

    def _fits(self, index: int) -> bool:
        size = self.clips.num_frames(index) * self.size[0] * self.size[1] * 3
        return size <= self.cache_bytes // 4

    def _read(self, index: int, which: list[int]) -> np.ndarray:
        framing = self.clip(index).framing
        return np.stack([framing.image(f) for f in self.clips.frames(index, which)])

    def _draw(self, index: int, which: np.ndarray) -> np.ndarray:
        clip = self.clip(index)
        return pose_images(
            clip.keypoints[which], clip.score[which], self.size, clip.threshold, self.style
        )

    def _cached(self, kind: str, index: int) -> np.ndarray:
        key = (kind, index)
        if key not in self._frames:
            every = np.arange(self.clips.num_frames(index))
            make = self._read_all if kind == "frames" else self._draw
            self._frames[key] = make(index, every)
            while sum(f.nbytes for f in self._frames.values()) > self.cache_bytes:
                self._frames.popitem(last=False)
        else:
            self._frames.move_to_end(key)
        return self._frames[key]

    def _read_all(self, index: int, every: np.ndarray, chunk: int = 64) -> np.ndarray:
        # In chunks: a clip at its own size may not fit in memory.
        parts = [
            self._read(index, part.tolist())
            for part in np.split(every, range(chunk, len(every), chunk))
        ]
        return np.concatenate(parts)
