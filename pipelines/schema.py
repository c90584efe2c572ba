"""The shard contract: names, records and arrays that pass between curation and its readers.

A shard is `shard-000123.tar` with the clips and `shard-000123.json` with a `ShardRecord`; the JSON
is written last and is the commit. Each clip has a key and four members:

    KEY.mp4       one shot, constant frame rate, square pixels, upright, H.264 with short GOPs
    KEY.pose.npz  keypoints (T, P, K, 2), score (T, P, K), boxes (T, P, 4), track_ids (P,)
    KEY.face.npz  boxes (T, P, 4), landmarks (T, P, 5, 2), score (T, P), embeddings (P, D)
    KEY.json      source, span, fps, size, scores, provenance, versions

T frames, P people, K keypoints: the body's 18, or 128 with hands and face (`animator.keypoints`).
Coordinates are 0..1 of the frame; an absent person is all zeros.
"""

import io
import json
import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from animator.keypoints import KEYPOINT_COUNTS, NUM_KEYPOINTS
from pipelines.overrides import from_dict, to_dict

FORMAT = 1
CLIP_MEMBERS = ("mp4", "pose.npz", "face.npz", "json")
MAX_ARRAYS_BYTES = 256 << 20
MAX_JSON_BYTES = 64 << 20
# A run of millions has hundreds of sources a shard, each with a record of every clip.
MAX_RECORD_BYTES = 512 << 20

_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")
_MEMBER = re.compile(r"([A-Za-z0-9_-]{1,80})\.([a-z0-9]+(?:\.[a-z0-9]+)?)")
_SHARD = re.compile(r"shard-(\d{6,})")

Verdict = Literal["kept", "rejected", "failed"]
Scores = dict[str, float | int | str | None]


class ShardError(ValueError):
    """A shard that is damaged, incomplete or does not follow the contract."""


@dataclass(frozen=True, kw_only=True)
class FaceTrack:
    """Faces of a clip: boxes (T, P, 4), landmarks (T, P, 5, 2), score (T, P); 0 = no face."""

    boxes: np.ndarray
    landmarks: np.ndarray
    score: np.ndarray
    embeddings: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    model: str = ""
    channel_order: str = ""


@dataclass(frozen=True, kw_only=True)
class ClipRecord:
    """One shot of a source, kept or not, with every score. Times are seconds in the source.

    series: a value a sampled frame, from which thresholds can be applied anew.
    signature: perceptual hashes of frames spread over the clip, 16 hex digits each.
    duplicate_of: the key of the earlier clip that shows the same.
    """

    key: str
    start: float
    end: float
    verdict: Verdict
    reasons: tuple[str, ...] = ()
    scores: Scores = field(default_factory=dict)
    series: dict[str, list[float]] = field(default_factory=dict)
    signature: str = ""
    duplicate_of: str | None = None
    num_frames: int = 0
    fps: float = 0.0
    width: int = 0
    height: int = 0


@dataclass(frozen=True, kw_only=True)
class SourceRecord:
    """One source video: what it was, what was measured and what became of it.

    id: of its name in the plan (the URI); sha256: of its bytes, by which it is known.
    duplicate_of: the id of the earlier source with the same bytes.
    provenance: licence, uploader, title, page and time of the download, as far as known.
    """

    id: str
    sha256: str
    bytes: int
    uris: tuple[str, ...]
    verdict: Verdict
    reasons: tuple[str, ...] = ()
    error: str | None = None
    info: dict[str, Any] = field(default_factory=dict)
    scores: Scores = field(default_factory=dict)
    clips: tuple[ClipRecord, ...] = ()
    duplicate_of: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """The commit of one shard; `members` gives every tar member's size in bytes."""

    name: str
    config_hash: str
    tar_sha256: str
    tar_bytes: int
    members: dict[str, int]
    counts: dict[str, int]
    sources: tuple[SourceRecord, ...] = ()
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    kind: str = "clips"
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ShardError(
                f"{self.name} has format {self.format}, expected {FORMAT}: "
                "read it with the version that wrote it or curate again."
            )
        shard_index(self.name)
        for member in self.members:
            split_member(member)

    @property
    def kept_clips(self) -> tuple[ClipRecord, ...]:
        """The clips whose members are in the tar, in order."""
        return tuple(
            clip for source in self.sources for clip in source.clips if clip.verdict == "kept"
        )


def shard_name(index: int) -> str:
    """`shard-000123` for 123."""
    return f"shard-{index:06d}"


def shard_index(name: str) -> int:
    """The number in `shard-000123`. Raises ShardError for other names."""
    match = _SHARD.fullmatch(name)
    if match is None:
        raise ShardError(f"got shard name {name!r}, expected one like shard-000123.")
    return int(match[1])


def check_key(key: str) -> str:
    """`key` itself. Raises ShardError unless it is made of A-Z a-z 0-9 _ - (at most 80)."""
    if _KEY.fullmatch(key) is None:
        raise ShardError(f"got clip key {key!r}, expected 1 to 80 of A-Z a-z 0-9 _ -.")
    return key


def split_member(name: str) -> tuple[str, str]:
    """(key, suffix) of a member's name, `abc_000.pose.npz` → ("abc_000", "pose.npz")."""
    match = _MEMBER.fullmatch(name)
    if match is None:
        raise ShardError(
            f"got member name {name!r}, expected KEY.SUFFIX with a key of A-Z a-z 0-9 _ -."
        )
    return match[1], match[2]


def encode_json(data: Any, digits: int = 6) -> bytes:
    """Sorted, indented JSON of dataclasses and plain values; floats rounded to `digits`.

    Not-a-number and infinity become null, which every reader understands.
    """
    text = json.dumps(_rounded(to_dict(data), digits), sort_keys=True, indent=1, allow_nan=False)
    return text.encode() + b"\n"


def encode_record(record: Any) -> bytes:
    """The JSON of a commit: as `encode_json`, without the spaces, which are most of a large one.

    Raises:
        ShardError: it is larger than `decode_json` reads of a record.
    """
    text = json.dumps(
        _rounded(to_dict(record), 6), sort_keys=True, separators=(",", ":"), allow_nan=False
    )
    data = text.encode() + b"\n"
    if len(data) > MAX_RECORD_BYTES:
        raise ShardError(
            f"the record of {record.name} has {len(data)} bytes, expected at most "
            f"{MAX_RECORD_BYTES}: use another --out folder with a smaller "
            "output.sources_per_shard."
        )
    return data


def decode_json(data: bytes, what: str, most: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in `data`. Raises ShardError that names `what` if there is none.

    Args:
        most: bytes it may have; MAX_RECORD_BYTES for commits.
    """
    if len(data) > most:
        raise ShardError(f"{what} has {len(data)} bytes, expected at most {most}.")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{what} is not JSON ({error}): curate its shard again.") from None
    if not isinstance(value, dict):
        raise ShardError(f"{what} holds {type(value).__name__}, expected a JSON object.")
    return value


def decode_record(data: bytes, what: str) -> ShardRecord:
    """The ShardRecord in a commit's JSON. Raises ShardError that names `what`."""
    try:
        return from_dict(ShardRecord, decode_json(data, what, MAX_RECORD_BYTES))
    except ShardError:
        raise
    except ValueError as error:
        raise ShardError(f"{what} is not a shard record: {error}") from None


def pack_arrays(arrays: Mapping[str, np.ndarray]) -> bytes:
    """An .npz whose bytes depend on nothing but the arrays: sorted, stored, fixed dates."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(arrays):
            payload = io.BytesIO()
            array = np.asarray(arrays[name])
            if not array.flags.c_contiguous:
                array = array.copy(order="C")
            np.lib.format.write_array(payload, array, version=(1, 0), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, payload.getvalue())
    return buffer.getvalue()


def unpack_arrays(data: bytes, what: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz; sizes are checked before memory is taken, nothing is unpickled.

    Raises:
        ShardError: damaged, too large, or holding Python objects.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            total = sum(entry.file_size for entry in entries)
            if total > MAX_ARRAYS_BYTES:
                raise ShardError(
                    f"{what} unpacks to {total} bytes, expected at most {MAX_ARRAYS_BYTES}."
                )
            return {
                entry.filename.removesuffix(".npy"): _read_array(archive.read(entry), what)
                for entry in entries
            }
    except ShardError:
        raise
    # zipfile and NumPy's header parser raise many kinds on damaged bytes.
    except Exception as error:
        raise ShardError(f"{what} is not a readable array file: {error}") from None


def check_pose(arrays: Mapping[str, np.ndarray], num_frames: int, what: str) -> None:
    """Raises ShardError unless keypoints, score and boxes have the contract's shapes."""
    people = _people(arrays, "keypoints", what)
    count = arrays["keypoints"].shape[2] if arrays["keypoints"].ndim > 2 else NUM_KEYPOINTS
    if count not in KEYPOINT_COUNTS:
        body, whole = KEYPOINT_COUNTS
        raise ShardError(f"{what}: {count} keypoints a person, expected {body} or {whole}.")
    _check_shape(arrays, "keypoints", (num_frames, people, count, 2), what)
    _check_shape(arrays, "score", (num_frames, people, count), what)
    _check_shape(arrays, "boxes", (num_frames, people, 4), what)


def check_faces(arrays: Mapping[str, np.ndarray], num_frames: int, what: str) -> None:
    """Raises ShardError unless boxes, landmarks and score have the contract's shapes."""
    people = _people(arrays, "boxes", what)
    _check_shape(arrays, "boxes", (num_frames, people, 4), what)
    _check_shape(arrays, "landmarks", (num_frames, people, 5, 2), what)
    _check_shape(arrays, "score", (num_frames, people), what)


def _people(arrays: Mapping[str, np.ndarray], name: str, what: str) -> int:
    if name not in arrays or arrays[name].ndim < 2:
        raise ShardError(f"{what} has no array {name!r} of frames and people.")
    return arrays[name].shape[1]


def _check_shape(
    arrays: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...], what: str
) -> None:
    if name not in arrays or arrays[name].shape != shape or arrays[name].dtype.kind != "f":
        found = "nothing"
        if name in arrays:
            found = f"{arrays[name].dtype} {arrays[name].shape}"
        raise ShardError(f"{what}: {name} is {found}, expected floats of shape {shape}.")


def _read_array(data: bytes, what: str) -> np.ndarray:
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ShardError(f"{what} has an array of version {version}, expected (1, 0).")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.hasobject:
        raise ShardError(f"{what} holds Python objects, which are never read.")
    # Python's own integers: a hostile shape must not overflow into a match.
    if math.prod(shape) * dtype.itemsize != len(data) - stream.tell() or min(shape, default=0) < 0:
        raise ShardError(f"{what}: {len(data)} bytes do not hold {dtype} of shape {shape}.")
    flat = np.frombuffer(data, dtype, offset=stream.tell())
    return flat.reshape(shape, order="F" if fortran else "C")


def _rounded(value: Any, digits: int) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry, digits) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry, digits) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return round(value, digits) if math.isfinite(value) else None
    return value
