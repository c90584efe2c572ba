"""Random access to the clips of committed shards, straight from the tars.

T frames, P people. Opening a store reads the records; a tar's headers are read on the first
access to one of its clips. No file stays open, so a store may be copied into other processes, and
threads may share one.
"""

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import schema, shards
from pipelines.pose import PoseTrack
from pipelines.schema import ClipRecord, FaceTrack, ShardError, ShardRecord
from pipelines.video import VideoError, iter_frames

# Frames further apart than this are decoded by separate seeks: about two GOPs of a stored clip.
_SEEK_GAP = 24
_MAX_CLIP_BYTES = 2 << 30
# Of the process, as a store with a lock of its own could not be copied into others.
_INDEXING = threading.Lock()


@dataclass(frozen=True)
class _Place:
    record: ClipRecord
    shard: int


class ClipStore:
    """The clips of a folder of shards, numbered from 0 in the order of shards and keys.

    Args:
        root: a folder that `animator curate` wrote. Only committed shards count.

    Raises:
        ShardError: no shards, or a tar that is not as large as its record says.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self._shards: list[ShardRecord] = shards.read_records(self.root)
        self._indices: dict[int, dict[str, tuple[int, int]]] = {}
        self._places: list[_Place] = []
        for number, shard in enumerate(self._shards):
            self._check_size(shard)
            for clip in shard.kept_clips:
                _check_clip(clip, shard.name)
                self._places.append(_Place(clip, number))
        self._places.sort(key=lambda place: (place.shard, place.record.key))
        self.keys: tuple[str, ...] = tuple(place.record.key for place in self._places)
        if len(set(self.keys)) != len(self.keys):
            raise ShardError(f"{self.root} holds a clip key twice: do not mix folders of shards.")

    def __len__(self) -> int:
        return len(self._places)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the shards' own: equal for equal data, wherever it lies."""
        lines = sorted(f"{shard.name} {shard.tar_sha256}\n" for shard in self._shards)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def index(self, key: str) -> int:
        """The number of the clip with that key. Raises ShardError if there is none."""
        try:
            return self.keys.index(key)
        except ValueError:
            raise ShardError(
                f"{self.root} holds no clip {key!r}; it holds {len(self)} such as "
                f"{', '.join(self.keys[:3])}."
            ) from None

    def num_frames(self, i: int) -> int:
        """Frames of clip i."""
        return self._places[i].record.num_frames

    def fps(self, i: int) -> float:
        """Frames a second of clip i."""
        return self._places[i].record.fps

    def size(self, i: int) -> tuple[int, int]:
        """(height, width) of clip i in pixels."""
        record = self._places[i].record
        return record.height, record.width

    def meta(self, i: int) -> dict[str, Any]:
        """Clip i's own JSON: source, span, scores, provenance, versions."""
        data, what = self.read(i, "json")
        return schema.decode_json(data, what)

    def pose(self, i: int) -> PoseTrack:
        """Keypoints (T, P, K, 2), score (T, P, K) and boxes (T, P, 4) of clip i; K is 18 or 128."""
        data, what = self.read(i, "pose.npz")
        arrays = schema.unpack_arrays(data, what)
        schema.check_pose(arrays, self.num_frames(i), what)
        return PoseTrack(
            keypoints=arrays["keypoints"],
            score=arrays["score"],
            boxes=arrays["boxes"],
            backend=str(arrays.get("model", "")),
        )

    def faces(self, i: int) -> FaceTrack:
        """Boxes (T, P, 4), landmarks (T, P, 5, 2) and score (T, P) of clip i's faces."""
        data, what = self.read(i, "face.npz")
        arrays = schema.unpack_arrays(data, what)
        schema.check_faces(arrays, self.num_frames(i), what)
        return FaceTrack(
            boxes=arrays["boxes"],
            landmarks=arrays["landmarks"],
            score=arrays["score"],
            embeddings=arrays.get("embeddings", np.zeros((0, 0), np.float32)),
            model=str(arrays.get("model", "")),
            channel_order=str(arrays.get("channel_order", "")),
        )

    def frames(
        self, i: int, indices: Sequence[int], size: tuple[int, int] | None = None
    ) -> np.ndarray:
        """The frames of clip i with those numbers, uint8 RGB (n, H, W, 3), in that order.

        Args:
            size: (height, width) to scale to exactly; the stored size by default.

        Raises:
            IndexError: a number outside 0 .. num_frames - 1.
            ShardError: the clip does not decode.
        """
        wanted = sorted(set(indices))
        if not wanted or wanted[0] < 0 or wanted[-1] >= self.num_frames(i):
            raise IndexError(
                f"clip {self.keys[i]} got frames {list(indices)}, "
                f"expected numbers from 0 to {self.num_frames(i) - 1}."
            )
        data, what = self.read(i, "mp4")
        found: dict[int, np.ndarray] = {}
        try:
            with shards.as_file(data) as path:
                for run in _runs(wanted):
                    found |= _decode_run(path, run, self.fps(i), size)
        except VideoError as error:
            raise ShardError(f"{what} does not decode: {error}") from None
        if missing := [index for index in wanted if index not in found]:
            raise ShardError(f"{what} has no frame {missing[0]}: curate its shard again.")
        return np.stack([found[index] for index in indices])

    def read(self, i: int, suffix: str) -> tuple[bytes, str]:
        """The bytes of a clip's member and a name for it in errors."""
        place = self._places[i]
        name = f"{place.record.key}.{suffix}"
        tar = self._tar(place.shard)
        index = self._indices.get(place.shard)
        if index is None:
            with _INDEXING:  # once, however many threads begin with this tar
                if place.shard not in self._indices:
                    self._indices[place.shard] = shards.index_tar(tar)
                index = self._indices[place.shard]
        if name not in index:
            raise ShardError(f"{tar.name} has no {name}: run `animator shards verify {self.root}`.")
        offset, length = index[name]
        if length > _MAX_CLIP_BYTES:
            raise ShardError(f"{tar.name}: {name} has {length} bytes, too large for a clip.")
        return shards.read_member(tar, offset, length), f"{tar.name}: {name}"

    def _tar(self, shard: int) -> Path:
        return self.root / f"{self._shards[shard].name}.tar"

    def _check_size(self, shard: ShardRecord) -> None:
        tar = self.root / f"{shard.name}.tar"
        size = tar.stat().st_size if tar.is_file() else 0
        if size != shard.tar_bytes:
            raise ShardError(
                f"{tar} has {size} bytes, its record says {shard.tar_bytes}: "
                "copy it again, or curate into the folder again to rebuild it."
            )


def _check_clip(clip: ClipRecord, shard: str) -> None:
    schema.check_key(clip.key)
    if clip.num_frames < 1 or not 0 < clip.fps <= 1000 or min(clip.width, clip.height) < 1:
        raise ShardError(
            f"{shard}.json: clip {clip.key} has {clip.num_frames} frames of {clip.width}x"
            f"{clip.height} at {clip.fps} a second, expected all above 0: curate again."
        )


def _runs(indices: list[int]) -> list[list[int]]:
    """Sorted frame numbers cut where a seek is cheaper than decoding on."""
    runs = [[indices[0]]]
    for index in indices[1:]:
        if index - runs[-1][-1] > _SEEK_GAP:
            runs.append([])
        runs[-1].append(index)
    return runs


def _decode_run(
    path: Path, run: list[int], fps: float, size: tuple[int, int] | None
) -> dict[int, np.ndarray]:
    # Half a frame late: the middle of a frame's time on screen is safe from rounding.
    start = (run[0] + 0.5) / fps
    end = (run[-1] + 1) / fps
    wanted = set(run)
    frames = iter_frames(path, start=start, end=end, fps=fps, size=size)
    return {index: frame for index, frame in enumerate(frames, run[0]) if index in wanted}
