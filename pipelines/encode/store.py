"""Random access to the latents, image tokens and face embeddings of encoded shards.

T frames, S sampled frames, P people, C channels, h w latent size, D width of a token or embedding.
Opening a store reads the records; a clip's latents are read in place, at the frames asked for. No
file stays open, so a store may be copied into other processes.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import schema, shards
from pipelines.clips import ClipStore
from pipelines.encode.members import (
    EMBEDDING,
    IMAGE,
    KIND,
    LATENTS,
    META,
    PARTS,
    LatentArray,
    check_samples,
    locate_latents,
    read_framing,
)
from pipelines.framing import Framing
from pipelines.schema import ClipRecord, ShardError, ShardRecord
from pipelines.tars import Slice


@dataclass(frozen=True)
class ImageTokens:
    """Image tokens of some of a clip's frames."""

    tokens: np.ndarray  # (S, D) float16
    frames: np.ndarray  # (S,) their numbers


@dataclass(frozen=True)
class FaceEmbeddings:
    """Who is in some of a clip's frames; person p is person p of the clip's stored faces."""

    embeddings: np.ndarray  # (S, P, D) float32, not normalised; zeros where there is no face
    score: np.ndarray  # (S, P), 0 where there is no face
    frames: np.ndarray  # (S,) their numbers
    person: np.ndarray  # (P, D) mean direction of each person, of length 1, or zeros


class LatentStore:
    """The encoded clips of a folder, numbered from 0 in the order of shards and keys.

    Args:
        root: a folder that `animator encode` wrote. Only committed shards count.

    Raises:
        ShardError: no shards of latents, or a tar that is not as large as its record says.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self._shards: list[ShardRecord] = shards.read_records(self.root)
        self._indices: dict[int, dict[str, tuple[int, int]]] = {}
        places: list[tuple[int, str, ClipRecord]] = []
        for number, shard in enumerate(self._shards):
            self._check(shard)
            for clip in shard.kept_clips:
                schema.check_key(clip.key)
                places.append((number, clip.key, clip))
        places.sort(key=lambda place: place[:2])
        self._places = [(number, clip) for number, _, clip in places]
        self.keys: tuple[str, ...] = tuple(key for _, key, _ in places)
        self._numbers = {key: i for i, key in enumerate(self.keys)}
        if len(self._numbers) != len(self.keys):
            raise ShardError(f"{self.root} holds a clip key twice: do not mix folders of shards.")

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return key in self._numbers

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the shards' own: equal for equal data, wherever it lies."""
        lines = sorted(f"{shard.name} {shard.tar_sha256}\n" for shard in self._shards)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def models(self) -> Mapping[str, Mapping[str, Any]]:
        """Name, files with their SHA-256, data type and licence of each encoder."""
        return self._shards[0].models

    def index(self, key: str) -> int:
        """The number of the clip with that key. Raises ShardError if there is none."""
        if key not in self._numbers:
            raise ShardError(
                f"{self.root} holds no latents of a clip {key!r}; it holds {len(self)} such as "
                f"{', '.join(self.keys[:3])}."
            )
        return self._numbers[key]

    def check_made_from(self, clips: ClipStore) -> None:
        """Check that every clip of a store is here, encoded from the very shards it reads.

        Raises:
            ShardError: clips that are missing, or shards that have changed since.
        """
        missing = [key for key in clips.keys if key not in self._numbers]
        if missing:
            raise ShardError(
                f"{self.root} lacks {len(missing)} of the {len(clips)} clips of {clips.root}, such "
                f"as {missing[0]}: run `animator encode {clips.root} --out {self.root}`."
            )
        made_from = {source.sha256 for shard in self._shards for source in shard.sources}
        for record in shards.iter_records(clips.root):
            if record.tar_sha256 in made_from or not record.kept_clips:
                continue
            raise ShardError(
                f"{self.root} was made from another {record.name} than {clips.root} holds: run "
                f"`animator encode {clips.root} --out {self.root}` again."
            )

    def num_frames(self, i: int) -> int:
        """Frames of clip i."""
        return self._places[i][1].num_frames

    def fps(self, i: int) -> float:
        """Frames a second of clip i."""
        return self._places[i][1].fps

    def meta(self, i: int) -> dict[str, Any]:
        """Clip i's own JSON: framing, encoders, source shard, licence, versions."""
        data, what = self._read(i, META)
        return schema.decode_json(data, what)

    def framing(self, i: int) -> Framing:
        """How the frames of clip i lie in those that its latents are of.

        Keypoints and boxes of the clip go through the same mapping (`Framing.points`, `.boxes`).
        """
        return read_framing(self.meta(i), self._name(i, META))

    def latent_array(self, i: int) -> LatentArray:
        """Where the latents of clip i lie, and their shape (T, C, h, w)."""
        what = self._name(i, LATENTS)
        array = locate_latents(self._slice(i, LATENTS), what)
        if array.shape[0] != self.num_frames(i):
            raise ShardError(
                f"{what} has {array.shape[0]} frames, expected {self.num_frames(i)}: encode its "
                "shard again."
            )
        return array

    def latents(self, i: int, frames: Sequence[int] | None = None) -> np.ndarray:
        """Latents (n, C, h, w) float16 of clip i, of all frames or of those given, in that order.

        They are on the scale of the codec's `encode`; divided by `scale` they are references.

        Raises:
            IndexError: a number outside 0 .. num_frames - 1.
            ShardError: the store holds no latents, or they are damaged.
        """
        return self.latent_array(i).read(frames)

    def scale(self, i: int) -> float:
        """What the latents of clip i were multiplied by."""
        stored = self.meta(i).get("latents")
        scale = stored.get("scale") if isinstance(stored, dict) else None
        if not isinstance(scale, int | float) or not scale > 0:
            raise ShardError(f"{self._name(i, META)} has no scale of latents: encode it again.")
        return float(scale)

    def image_tokens(self, i: int) -> ImageTokens:
        """The image tokens of clip i. Raises ShardError where the store holds none."""
        arrays = self._samples(i, IMAGE)
        return ImageTokens(arrays["tokens"], arrays["frames"])

    def face_embeddings(self, i: int) -> FaceEmbeddings:
        """The face embeddings of clip i. Raises ShardError where the store holds none."""
        arrays = self._samples(i, EMBEDDING)
        return FaceEmbeddings(*(arrays[n] for n in ("embeddings", "score", "frames", "person")))

    def _samples(self, i: int, suffix: str) -> dict[str, np.ndarray]:
        data, what = self._read(i, suffix)
        arrays = schema.unpack_arrays(data, what)
        check_samples(arrays, suffix, self.num_frames(i), what)
        return arrays

    def _read(self, i: int, suffix: str) -> tuple[bytes, str]:
        place = self._slice(i, suffix)
        return shards.read_member(place.path, place.offset, place.size), self._name(i, suffix)

    def _slice(self, i: int, suffix: str) -> Slice:
        shard, clip = self._places[i]
        tar = self.root / f"{self._shards[shard].name}.tar"
        if shard not in self._indices:
            self._indices[shard] = shards.index_tar(tar)
        name = f"{clip.key}.{suffix}"
        if name not in self._indices[shard]:
            held = sorted(part for model, part in PARTS.items() if model in self.models)
            raise ShardError(
                f"{tar.name} has no {name}: this folder was encoded for {', '.join(held)}; encode "
                "into another with --latents, --image-tokens or --faces."
            )
        return Slice(tar, *self._indices[shard][name])

    def _name(self, i: int, suffix: str) -> str:
        shard, clip = self._places[i]
        return f"{self._shards[shard].name}.tar: {clip.key}.{suffix}"

    def _check(self, shard: ShardRecord) -> None:
        if shard.kind != KIND:
            raise ShardError(
                f"{self.root} holds shards of {shard.kind}, expected {KIND}: give the folder that "
                "`animator encode` wrote."
            )
        tar = self.root / f"{shard.name}.tar"
        size = tar.stat().st_size if tar.is_file() else 0
        if size != shard.tar_bytes:
            raise ShardError(
                f"{tar} has {size} bytes, its record says {shard.tar_bytes}: copy it again, or "
                "encode into the folder again to rebuild it."
            )
