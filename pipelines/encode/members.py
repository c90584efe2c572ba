"""The members of a shard of latents: written a few frames at a time, read at the frames asked for.

    KEY.latents.npy    latents (T, C, h, w) float16, multiplied by the `scale` in KEY.json
    KEY.image.npz      tokens (S, D) float16 of the frames with numbers `frames` (S,)
    KEY.embedding.npz  embeddings (S, P, D) and score (S, P), 0 = no face, of `frames` (S,);
                       person (P, D), the mean direction of each person's embeddings, or zeros
    KEY.json           what of these there is, how frames were fitted, encoders, the source shard

T frames, S sampled frames, P people, C channels, h w latent size, D width of a token or embedding.
Latents are a plain array, so that any frames of a clip can be read without the others.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from pipelines import schema
from pipelines.framing import MODES, Framing, fit
from pipelines.schema import ShardError, ShardRecord
from pipelines.tars import Slice, index_tar, read_member

KIND = "latents"
LATENTS, IMAGE, EMBEDDING, META = "latents.npy", "image.npz", "embedding.npz", "json"
# The member that each encoder makes, by the encoder's name in a record's `models`.
PARTS = {"codec": LATENTS, "image_token": IMAGE, "face_embedding": EMBEDDING}
MAX_LATENT_BYTES = 4 << 30
_HEADER_BYTES = 256  # of a .npy header, more than one of four numbers has


class LatentWriter:
    """The latents of one clip on their way into a file, whose length is known before.

    Args:
        shape: (T, C, h, w).

    Raises:
        ShardError: more bytes than a member may have, or, at the end, frames that are missing.
    """

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        if (size := 2 * math.prod(shape)) > MAX_LATENT_BYTES:
            raise ShardError(
                f"its latents would take {size} bytes, expected at most {MAX_LATENT_BYTES}: "
                "encode at a smaller --size, or curate shorter clips"
            )
        self._path = path
        self._shape = shape
        self._written = 0

    def __enter__(self) -> Self:
        self._stream = self._path.open("wb")
        about = {"descr": "<f2", "fortran_order": False, "shape": self._shape}
        np.lib.format.write_array_header_1_0(self._stream, about)
        return self

    def write(self, latents: np.ndarray) -> None:
        """Add `(n, C, h, w)` float16 of the next frames."""
        if latents.dtype != np.float16 or latents.shape[1:] != self._shape[1:]:
            raise ShardError(
                f"the codec gave {latents.dtype} {latents.shape[1:]} a frame, expected float16 "
                f"{self._shape[1:]}"
            )
        self._written += len(latents)
        self._stream.write(np.ascontiguousarray(latents).data)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.close()
        if error is None and self._written != self._shape[0]:
            raise ShardError(f"got latents of {self._written} frames, expected {self._shape[0]}")


@dataclass(frozen=True)
class LatentArray:
    """The latents of a clip where they lie in a tar; nothing of them is in memory."""

    tar: Path
    offset: int  # of the first frame, in bytes from the start of the tar
    shape: tuple[int, int, int, int]

    def read(self, frames: Sequence[int] | None = None) -> np.ndarray:
        """Latents `(n, C, h, w)` float16 of the frames with those numbers, in that order.

        Raises:
            IndexError: a number outside 0 .. T - 1.
            ShardError: the tar was cut short.
        """
        numbers = range(self.shape[0]) if frames is None else [int(number) for number in frames]
        if len(numbers) and not 0 <= min(numbers) <= max(numbers) < self.shape[0]:
            raise IndexError(
                f"got frames {list(numbers)}, expected numbers from 0 to {self.shape[0] - 1}."
            )
        latents = np.empty((len(numbers), *self.shape[1:]), np.float16)
        step = 2 * math.prod(self.shape[1:])
        with self.tar.open("rb") as stream:
            for first, count in _runs(numbers):
                stream.seek(self.offset + numbers[first] * step)
                if stream.readinto(latents[first : first + count].data.cast("B")) != count * step:
                    raise ShardError(f"{self.tar.name} was cut short: encode its shard again.")
        return latents


def locate_latents(content: Slice, what: str) -> LatentArray:
    """Find a clip's latents in the tar without reading them.

    Args:
        content: `KEY.latents.npy` in its tar.
        what: a name for it in errors.

    Raises:
        ShardError: a member that breaks the contract.
    """
    header = io.BytesIO(read_member(content.path, content.offset, min(_HEADER_BYTES, content.size)))
    try:
        version = np.lib.format.read_magic(header)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(header)
    except Exception as error:  # NumPy's parser raises many kinds on damaged bytes
        raise ShardError(f"{what} is no array of latents ({error}): encode it again.") from None
    plain = version == (1, 0) and dtype == np.dtype("<f2") and not fortran
    if not plain or len(shape) != 4 or min(shape) < 1:
        raise ShardError(f"{what} is {dtype} {shape}, expected float16 of (T, C, h, w).")
    # Python's own integers: a hostile shape must not overflow into a match.
    if math.prod(shape) * 2 != content.size - header.tell():
        raise ShardError(f"{what} has {content.size} bytes, which do not hold float16 of {shape}.")
    frames, channels, height, width = map(int, shape)
    return LatentArray(
        content.path, content.offset + header.tell(), (frames, channels, height, width)
    )


def describe_framing(framing: Framing, mode: str) -> dict[str, Any]:
    """How frames were fitted, for KEY.json: `points` of 0..1 are mapped by scale, left and top."""
    return {
        "source_size": list(framing.source),
        "size": list(framing.target),
        "fit": mode,
        "scale": framing.scale,
        "left": framing.left,
        "top": framing.top,
    }


def read_framing(meta: Mapping[str, Any], what: str) -> Framing:
    """The framing that a clip's KEY.json describes. Raises ShardError that names `what`."""
    stored = meta.get("framing")
    try:
        if not isinstance(stored, dict) or stored["fit"] not in MODES:
            raise ValueError("it is none of ours")
        source, target = ((int(h), int(w)) for h, w in (stored["source_size"], stored["size"]))
        return fit(source, target, stored["fit"])
    except (KeyError, TypeError, ValueError) as error:
        raise ShardError(f"{what} holds no readable framing ({error}): encode it again.") from None


def check_samples(arrays: Mapping[str, np.ndarray], suffix: str, frames: int, what: str) -> None:
    """Raises ShardError unless image tokens or face embeddings have the contract's shapes.

    Args:
        suffix: `image.npz` or `embedding.npz`.
        frames: of the clip.
    """
    numbers = arrays.get("frames", np.zeros((0, 0)))
    if numbers.ndim != 1 or numbers.dtype.kind != "i" or not _increasing(numbers, frames):
        raise ShardError(f"{what}: frames are not increasing numbers from 0 to {frames - 1}.")
    name, kind, rank = ("tokens", "f2", 2) if suffix == IMAGE else ("embeddings", "f4", 3)
    array = arrays.get(name, np.zeros(0))
    if array.dtype != np.dtype(kind) or array.ndim != rank or len(array) != len(numbers):
        raise ShardError(
            f"{what}: {name} is {array.dtype} {array.shape}, expected {np.dtype(kind)} of {rank} "
            f"dimensions, the first {len(numbers)}."
        )
    if not np.isfinite(array).all():
        raise ShardError(f"{what}: {name} holds numbers that are not finite.")
    if suffix == EMBEDDING:
        for other, shape in (("score", array.shape[:2]), ("person", array.shape[1:])):
            if arrays.get(other, np.zeros(())).shape != shape:
                raise ShardError(f"{what}: {other} does not have the shape {shape}.")


def shard_problems(tar: Path, record: ShardRecord) -> list[str]:
    """What of a shard's members breaks the contract, latents read a little at a time.

    Args:
        tar: one whose size, SHA-256 and list of members are those of the record.
    """
    frames = {clip.key: clip.num_frames for clip in record.kept_clips}
    suffixes: dict[str, set[str]] = {key: set() for key in frames}
    problems = []
    for name, (offset, size) in index_tar(tar).items():
        key, suffix = schema.split_member(name)
        if key not in frames:
            problems.append(f"{tar.name}: {name} is of no clip.")
            continue
        suffixes[key].add(suffix)
        try:
            _check_member(name, Slice(tar, offset, size), frames[key])
        except ShardError as error:
            problems.append(str(error))
    wanted = {META, *(part for name, part in PARTS.items() if name in record.models)}
    for key, found in suffixes.items():
        problems += [f"{tar.name}: {key}.{name} is missing." for name in sorted(wanted - found)]
    return problems


def _check_member(name: str, content: Slice, frames: int) -> None:
    """Raises ShardError where a member of a clip of so many frames breaks the contract."""
    what = f"{content.path.name}: {name}"
    _, suffix = schema.split_member(name)
    if suffix == LATENTS:
        array = locate_latents(content, what)
        if array.shape[0] != frames:
            raise ShardError(f"{what} has {array.shape[0]} frames, expected {frames}.")
        _check_finite(array, what)
        return
    data = read_member(content.path, content.offset, content.size)
    if suffix in (IMAGE, EMBEDDING):
        check_samples(schema.unpack_arrays(data, what), suffix, frames, what)
    elif suffix == META:
        meta = schema.decode_json(data, what)
        read_framing(meta, what)
        if meta.get("num_frames") != frames:
            raise ShardError(f"{what} says {meta.get('num_frames')} frames, expected {frames}.")
    else:
        raise ShardError(f"{what} is no member of a shard of latents.")


def _check_finite(array: LatentArray, what: str) -> None:
    step = max(1, (16 << 20) // (2 * math.prod(array.shape[1:])))
    for first in range(0, array.shape[0], step):
        part = array.read(range(first, min(first + step, array.shape[0])))
        if not np.isfinite(part).all():
            raise ShardError(f"{what} holds numbers that are not finite: encode it again.")


def _increasing(numbers: np.ndarray, frames: int) -> bool:
    if not len(numbers):
        return True
    return bool(numbers[0] >= 0 and numbers[-1] < frames and (np.diff(numbers) > 0).all())


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Positions and lengths of the stretches of consecutive numbers."""
    runs: list[tuple[int, int]] = []
    for position, number in enumerate(numbers):
        if runs and number == numbers[position - 1] + 1:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((position, 1))
    return runs
