"""A multipart upload, streamed to disk under byte caps.

Beside the picture and the video it may hold their keypoints, for servers without a pose network.

The client's file names are never looked at: a part is written to a name of ours, chosen by its
field. Nothing larger than a network chunk is held in memory.
"""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from inference.outputs import sync
from pipelines.images import ImageError, ImageLimits, read_image
from pipelines.pose import PoseError
from pipelines.pose_file import read_keypoints
from pipelines.video import VideoError, VideoLimits, probe

# Field of the form -> name on disk. `input_reference` is what OpenAI's clients send.
FILE_FIELDS = {
    "image": "image",
    "input_reference": "image",
    "video": "video",
    "image_pose": "image.pose.npz",
    "video_pose": "video.pose.npz",
}
REQUIRED = ("image", "video")
KEYPOINTS = ("image.pose.npz", "video.pose.npz")
# `prompt` and `model` are what OpenAI's clients cannot leave out; they have no effect here.
TEXT_FIELDS = ("seed", "steps", "guidance", "reference_face", "prompt", "model")
MAX_TEXT_BYTES = 64 << 10
MAX_PARTS = 16


class UploadError(ValueError):
    """An upload that cannot become a job; `status` is the HTTP status that fits."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class UploadLimits:
    """What one upload may cost, in `seconds` at most, and how many may be under way at once."""

    image_bytes: int = 32 << 20
    video_bytes: int = 512 << 20
    pose_bytes: int = 32 << 20
    image_pixels: int = 40_000_000
    video_pixels: int = 3840 * 2160
    video_seconds: float = 600.0
    seconds: float = 900.0
    at_once: int = 8

    @property
    def body_bytes(self) -> int:
        """The largest request body that can be a valid upload."""
        files = self.image_bytes + self.video_bytes + len(KEYPOINTS) * self.pose_bytes
        return files + MAX_TEXT_BYTES + (64 << 10)


@dataclass(kw_only=True)
class _Part:
    """The part that is being received."""

    header: bytes = b""
    value: bytes = b""
    disposition: bytes = b""
    name: str = ""
    received: int = 0
    text: bytearray = field(default_factory=bytearray)
    file: BinaryIO | None = None


class Upload:
    """Parses one multipart body into `folder`: its files under our names, and text fields."""

    def __init__(self, content_type: str, folder: Path, limits: UploadLimits) -> None:
        from python_multipart.multipart import MultipartParser, parse_options_header

        kind, parameters = parse_options_header(content_type)
        boundary = parameters.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise UploadError(
                415,
                f"the body is {content_type[:60]!r}, expected multipart/form-data with an 'image' "
                "file and a 'video' file",
            )
        self.folder = folder
        self.fields: dict[str, str] = {}
        self._limits = {
            "image": limits.image_bytes,
            "video": limits.video_bytes,
            **dict.fromkeys(KEYPOINTS, limits.pose_bytes),
        }
        self._hashes = {name: hashlib.sha256() for name in self._limits}
        self._seen: set[str] = set()
        self._parts = 0
        self._part = _Part()
        self._ended = False
        self._parse_options = parse_options_header
        callbacks: dict[str, Callable[..., None]] = {
            "on_part_begin": self._begin,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._open,
            "on_part_data": self._data,
            "on_part_end": self._close,
            "on_end": self._end,
        }
        self._parser = MultipartParser(boundary, callbacks)  # pyright: ignore[reportArgumentType]

    async def receive(self, chunks: AsyncIterator[bytes]) -> None:
        """Read the whole body; raises UploadError. Files are on disk when it returns."""
        try:
            async for chunk in chunks:
                await asyncio.to_thread(self._feed, chunk)
            await asyncio.to_thread(self._finish)
        finally:
            if self._part.file is not None:
                self._part.file.close()

    def fingerprint(self, options: str) -> str:
        """SHA-256 over the files and the options: what makes two requests the same."""
        files = [f"{n} {self._hashes[n].hexdigest()}" for n in self._limits if n in self._seen]
        parts = [*files, options]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _feed(self, chunk: bytes) -> None:
        from python_multipart.exceptions import FormParserError

        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise UploadError(400, f"the multipart body is malformed ({error})") from None

    def _finish(self) -> None:
        if not self._ended:
            raise UploadError(400, "the multipart body ends too early; send it again")
        for name in REQUIRED:
            if name not in self._seen:
                raise UploadError(422, f"the {name!r} file is missing; send it as a form file")
        sync(self.folder)

    def _begin(self) -> None:
        self._part = _Part()
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise UploadError(400, f"more than {MAX_PARTS} parts in the multipart body")

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._part.header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._part.value += data[start:end]

    def _header_end(self) -> None:
        if self._part.header.lower() == b"content-disposition":
            self._part.disposition = self._part.value
        self._part.header = self._part.value = b""

    def _open(self) -> None:
        _, options = self._parse_options(self._part.disposition)
        field_name = options.get(b"name", b"").decode("utf-8", "replace")
        name = FILE_FIELDS.get(field_name, field_name)
        if name not in self._limits and name not in TEXT_FIELDS:
            expected = ", ".join((*FILE_FIELDS, *TEXT_FIELDS))
            raise UploadError(422, f"unknown field {field_name[:40]!r}; expected {expected}")
        if name in self._seen:
            raise UploadError(422, f"the field {name!r} is given twice; send it once")
        self._seen.add(name)
        self._part.name = name
        if name in self._limits:
            self._part.file = (self.folder / name).open("xb")

    def _data(self, data: bytes, start: int, end: int) -> None:
        part, piece = self._part, data[start:end]
        part.received += len(piece)
        limit = self._limits.get(part.name, MAX_TEXT_BYTES)
        if part.received > limit:
            raise UploadError(
                413, f"the {part.name!r} part is larger than {limit} bytes; send a smaller one"
            )
        if part.file is None:
            part.text += piece
        else:
            part.file.write(piece)
            self._hashes[part.name].update(piece)

    def _close(self) -> None:
        part = self._part
        if part.file is None:
            self.fields[part.name] = part.text.decode("utf-8", "replace")
            return
        part.file.flush()
        os.fsync(part.file.fileno())
        part.file.close()

    def _end(self) -> None:
        self._ended = True


def check_media(folder: Path, limits: UploadLimits) -> None:
    """Open the received files as what they claim to be; raises UploadError (422) saying why not."""
    image, video = folder / "image", folder / "video"
    try:
        read_image(image, ImageLimits(max_bytes=limits.image_bytes, max_pixels=limits.image_pixels))
        probe(
            video,
            VideoLimits(
                max_bytes=limits.video_bytes,
                max_pixels=limits.video_pixels,
                max_seconds=limits.video_seconds,
            ),
        )
        for name in KEYPOINTS:
            if (folder / name).is_file():
                read_keypoints(folder / name)
    except (ImageError, VideoError, PoseError) as error:
        text = str(error).replace(f"{folder}{os.sep}", "")
        raise UploadError(422, text.splitlines()[0]) from None
