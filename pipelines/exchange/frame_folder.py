"""A folder of numbered pictures as the frames of a clip: listed under limits, read when asked for.

Names are `frame_12.png` or `0012.png`. What lies there may come from anybody: links are never
followed, and the number, bytes and pixels of pictures are limited before any is decoded.

H W height and width
"""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np

from pipelines.images import ImageLimits, read_image
from pipelines.shards import sha256_file

PICTURE = re.compile(r"(?:frame_)?(\d{1,9})\.(?:png|jpe?g|webp)", re.IGNORECASE)
MAX_ENTRIES = 1_000_000


class ExchangeError(ValueError):
    """A folder that does not follow a known layout, or cannot be written or read safely."""


@dataclass(frozen=True, kw_only=True)
class PictureLimits:
    """What a folder of pictures may cost: pictures, bytes and pixels of one of them."""

    max_frames: int = 20_000
    max_bytes: int = 64 << 20
    max_pixels: int = 40_000_000

    def image(self) -> ImageLimits:
        """The limits of a single picture."""
        return ImageLimits(max_bytes=self.max_bytes, max_pixels=self.max_pixels)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture's file and bytes."""

    path: Path
    bytes: int


class FrameFolder(Sequence[np.ndarray]):
    """Pictures (H, W, 3) uint8 RGB in the order of their numbers, which may have gaps.

    Raises:
        ExchangeError: no numbered pictures, too many, two of a number, or a link; on reading, one
            of another size than the first.
        ImageError: on reading, a picture that is damaged or too large.
    """

    def __init__(self, folder: Path, limits: PictureLimits | None = None) -> None:
        self.folder = folder
        self.limits = limits or PictureLimits()
        found = numbered_pictures(folder, self.limits)
        if not found:
            raise ExchangeError(
                f"{folder.name} holds no numbered pictures; expected frame_0.png or 0001.png …"
            )
        self.numbers = sorted(found)
        self.bytes = sum(picture.bytes for picture in found.values())
        self._paths = [found[number].path for number in self.numbers]
        self._size: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        """One picture, or those of a slice."""
        if isinstance(index, slice):
            return [self._read(path) for path in self._paths[index]]
        return self._read(self._paths[index])

    @property
    def missing_numbers(self) -> int:
        """How many numbers between the first and the last have no picture."""
        return self.numbers[-1] - self.numbers[0] + 1 - len(self.numbers)

    def sha256(self) -> str:
        """SHA-256 (hex) of the pictures' own in their order: the content, whatever the names."""
        digest = hashlib.sha256()
        for path in self._paths:
            digest.update(bytes.fromhex(sha256_file(path)))
        return digest.hexdigest()

    def _read(self, path: Path) -> np.ndarray:
        image = read_image(path, self.limits.image())
        if self._size is None:
            self._size = image.shape
        if image.shape != self._size:
            (height, width), (first_height, first_width) = image.shape[:2], self._size[:2]
            raise ExchangeError(
                f"{path.name} is {width}x{height}, the pictures before it are "
                f"{first_width}x{first_height}; expected one size"
            )
        return image


def numbered_pictures(folder: Path, limits: PictureLimits) -> dict[int, Picture]:
    """Pictures of a folder by number; other files do not count. Raises ExchangeError."""
    found: dict[int, Picture] = {}
    for entry in entries(folder):
        match = PICTURE.fullmatch(entry.name)
        if match is None:
            continue
        if not entry.is_file(follow_symlinks=False):
            raise ExchangeError(f"{entry.name} is a link or no file; links are not followed")
        number, size = int(match[1]), entry.stat(follow_symlinks=False).st_size
        if number in found:
            raise ExchangeError(
                f"{entry.name} and {found[number].path.name} have one number; remove one of them"
            )
        if size > limits.max_bytes:
            raise ExchangeError(
                f"{entry.name} has {size} bytes, expected at most {limits.max_bytes}"
            )
        if len(found) >= limits.max_frames:
            raise ExchangeError(
                f"more than {limits.max_frames} pictures; cut the clip, or raise max_frames"
            )
        found[number] = Picture(path=Path(entry.path), bytes=size)
    return found


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """What lies in a folder, by name; nothing for a folder that is a link.

    Raises:
        ExchangeError: it cannot be listed, or holds more than MAX_ENTRIES.
    """
    if folder.is_symlink():
        raise ExchangeError(f"{folder.name} is a link; links are not followed")
    try:
        with os.scandir(folder) as scan:
            found = [entry for entry, _ in zip(scan, range(MAX_ENTRIES + 1), strict=False)]
    except OSError as error:
        raise ExchangeError(f"{folder.name} cannot be listed: {error.strerror}") from None
    if len(found) > MAX_ENTRIES:
        raise ExchangeError(f"{folder.name} holds more than {MAX_ENTRIES} files")
    return sorted(found, key=lambda entry: entry.name)
