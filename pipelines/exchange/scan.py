"""All that a folder holds, looked through once: folders of frames, videos, keypoints, lists.

Nothing is decoded. Links are refused wherever they lie, so nothing outside of the folder is read.
"""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import schema
from pipelines.exchange.frame_folder import (
    PICTURE,
    ExchangeError,
    FrameFolder,
    PictureLimits,
    entries,
)
from pipelines.schema import ShardError

IMAGES, POSES, FACES = "images", "poses", "faces"
CARD = "clip.json"  # what an export says of a clip, beside its pictures
KEYPOINT_SUFFIXES = (".pose.npz", ".dwpose.npz", ".npz")
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
MAX_CARD_BYTES = 64 << 10
# Pictures of something else than what was filmed.
_NO_FRAMES = {POSES, FACES, "masks", "densepose"}
_LIST = re.compile(r"video.*path\.txt")
_MAX_DEPTH = 6
_MAX_ITEMS = 1_000_000
_MAX_NAME = 500
_MAX_NESTING = 20


@dataclass(frozen=True, kw_only=True)
class ImportItem:
    """One clip to be: `uri` and `keypoints` are paths below the source.

    pictures, bytes: of a folder of frames, as it was listed; bytes alone for a video.
    key: the clip's key in the shards it was exported from. error: why it cannot be imported.
    """

    uri: str
    pictures: int = 0
    bytes: int = 0
    keypoints: str | None = None
    key: str | None = None
    error: str | None = None

    @property
    def id(self) -> str:
        """Of its name, as in every plan."""
        return hashlib.sha256(os.fsencode(self.uri)).hexdigest()[:16]


class Scan:
    """All that lies below a folder, by kind; folders of clips are not looked into further."""

    def __init__(self, root: Path, limits: PictureLimits) -> None:
        self.root = root
        self.limits = limits
        self.clips: list[ImportItem] = []
        self.refused: list[ImportItem] = []
        self.videos: list[tuple[str, int]] = []
        self.arrays: list[str] = []
        self.lists: list[Path] = []
        self.drawn = False  # whether some clip has the predecessor's own folders or names
        if self._is_clip(entries(root)):
            # The source is a clip itself: it is named as it would be from outside.
            self.root = root.parent
            self._add_clip(root)
        else:
            self._walk(root, _MAX_DEPTH)

    def _walk(self, folder: Path, depth: int) -> None:
        for entry in entries(folder):
            path = Path(entry.path)
            if entry.is_symlink():
                self._refuse(path, "it is a link; links are not followed")
            elif entry.is_dir(follow_symlinks=False):
                self._enter(path, depth)
            elif entry.is_file(follow_symlinks=False):
                self._sort(entry, path)
            if len(self.clips) + len(self.refused) + len(self.videos) > _MAX_ITEMS:
                raise ExchangeError(f"{self.root} holds more than {_MAX_ITEMS} clips: divide it.")

    def _enter(self, path: Path, depth: int) -> None:
        if path.name.startswith(".") or path.name in _NO_FRAMES:
            return
        try:
            is_clip = self._is_clip(entries(path))
        except ExchangeError as error:
            self._refuse(path, str(error))
            return
        if is_clip:
            self._add_clip(path)
        elif depth:
            self._walk(path, depth - 1)

    def _is_clip(self, inside: list[os.DirEntry[str]]) -> bool:
        names = {entry.name for entry in inside}
        pictures = sum(PICTURE.fullmatch(name) is not None for name in names)
        return IMAGES in names or (pictures > 1 and pictures > len(names) // 2)

    def _add_clip(self, path: Path) -> None:
        uri = self._uri(path)
        frames = frames_folder(path)
        try:
            _check_name(uri)
            listed = FrameFolder(frames, self.limits)
            self.drawn |= _drawn(path, frames)
            item = ImportItem(
                uri=uri,
                pictures=len(listed),
                bytes=listed.bytes,
                keypoints=self._keypoints_of(path),
                key=_card_key(path),
            )
        except ExchangeError as error:
            item = ImportItem(uri=printable(uri), error=str(error))
        self.clips.append(item)

    def _keypoints_of(self, clip: Path) -> str | None:
        """The keypoints file of a folder of frames: in it, or beside it under its name."""
        for stem in (clip / "clip", clip / clip.name, clip):
            for suffix in KEYPOINT_SUFFIXES[:2]:
                path = stem.with_name(stem.name + suffix)
                if path.is_file() and not path.is_symlink():
                    return self._uri(path)
        return None

    def _sort(self, entry: os.DirEntry[str], path: Path) -> None:
        lower = entry.name.lower()
        if lower.endswith(VIDEO_SUFFIXES):
            self.videos.append((self._uri(path), entry.stat(follow_symlinks=False).st_size))
        elif lower.endswith(".npz"):
            self.arrays.append(self._uri(path))
        elif path.parent == self.root and _LIST.fullmatch(entry.name):
            self.lists.append(path)

    def _refuse(self, path: Path, why: str) -> None:
        self.refused.append(ImportItem(uri=printable(self._uri(path)), error=why))

    def _uri(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


def frames_folder(clip: Path) -> Path:
    """Where the frames of a clip's folder lie: in `images`, or in the folder itself."""
    images = clip / IMAGES
    return images if images.is_dir() or images.is_symlink() else clip


def read_card(clip: Path) -> dict[str, Any] | None:
    """What an export said of a clip (`clip.json`), or None: nothing in it is to be relied on."""
    path = clip / CARD
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_CARD_BYTES:
            return None
        card = schema.decode_json(path.read_bytes(), CARD)
    except (OSError, ShardError):
        return None
    return card if _is_shallow(card) else None


def _is_shallow(card: Any) -> bool:
    """Whether it can be written again; what is nested deeper was made to break that."""
    level = [card]
    for _ in range(_MAX_NESTING):
        inner = [one for one in level if isinstance(one, dict | list)]
        level = [
            value for one in inner for value in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return True
    return False


def printable(text: str) -> str:
    """A name as it can be written into records and terminals; odd characters are escaped."""
    text = os.fsencode(text).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)[:_MAX_NAME]


def _check_name(uri: str) -> None:
    if len(uri) > _MAX_NAME:
        raise ExchangeError(f"its path has {len(uri)} characters, expected at most {_MAX_NAME}")
    if printable(uri) != uri:
        raise ExchangeError("its name holds characters that cannot be shown; rename it")


def _card_key(clip: Path) -> str | None:
    key = (read_card(clip) or {}).get("key")
    try:
        return schema.check_key(key) if isinstance(key, str) else None
    except ShardError:
        return None


def _drawn(clip: Path, frames: Path) -> bool:
    """Whether a clip is of the predecessor's layout: its folders, or its names of frames."""
    if (clip / POSES).is_dir() or (clip / FACES).is_dir():
        return True
    return any(entry.name.startswith("frame_") for entry in entries(frames)[:50])
