"""What a folder in somebody else's layout holds: clips by their paths, found without decoding.

    stableanimator   NAME/images/frame_0.png …, and NAME/poses, NAME/faces with pictures of the same
                     names; NAME mostly in rec/ (512x512) and vec/ (576x1024), and listed in
                     video_rec_path.txt, video_vec_path.txt or video_path.txt
    tiktok           NAME/images/0001.png …, or the pictures in NAME itself
    dwpose           videos, and keypoints in .npz files of the same name beside or below them

Links are refused wherever they lie, so nothing outside of the folder is ever read.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

from pipelines.exchange.frame_folder import ExchangeError, PictureLimits
from pipelines.exchange.scan import KEYPOINT_SUFFIXES, ImportItem, Scan, printable

Layout = Literal["stableanimator", "tiktok", "dwpose"]
LAYOUTS: tuple[str, ...] = get_args(Layout)
_MAX_LIST_BYTES = 64 << 20
_EXPECTED = {
    "stableanimator": "NAME/images/frame_0.png …",
    "tiktok": "NAME/images/0001.png …",
    "dwpose": "NAME.mp4 with NAME.dwpose.npz",
}


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The layout of a source, its folder, its items by name, and remarks for people."""

    layout: Layout
    root: Path
    items: tuple[ImportItem, ...]
    notes: tuple[str, ...] = ()


def list_source(
    source: Path | str, layout: str = "auto", limits: PictureLimits | None = None
) -> Listing:
    """What is to be imported from `source`: a folder, or a .txt list in it of clip folders.

    Raises:
        ExchangeError: no such folder, an unknown layout, or nothing of the layout in it.
    """
    if layout not in ("auto", *LAYOUTS):
        raise ExchangeError(f"got layout {layout!r}, expected auto, {', '.join(LAYOUTS)}.")
    path = Path(source).resolve()
    lists = [path] if path.is_file() and path.suffix == ".txt" else []
    root = path.parent if lists else path
    if not root.is_dir() or (path.is_file() and not lists):
        raise ExchangeError(
            f"{source} is no folder: give one with clips ({'; '.join(_EXPECTED.values())})."
        )
    found = Scan(root, limits or PictureLimits())
    kind = _layout_of(found) if layout == "auto" else layout
    if kind is None or not (found.videos if kind == "dwpose" else found.clips):
        raise ExchangeError(_nothing(source, layout, found))
    if kind == "dwpose":
        return Listing(layout="dwpose", root=root, items=_sorted(_pair(found)))
    lists = lists or [entry for entry in found.lists if kind == "stableanimator"]
    items, notes = _listed(found, lists) if lists else (found.clips + found.refused, ())
    made: Layout = "tiktok" if kind == "tiktok" else "stableanimator"
    return Listing(layout=made, root=found.root, items=_unique(items), notes=notes)


def _layout_of(found: Scan) -> str | None:
    if found.clips:
        return "stableanimator" if found.drawn else "tiktok"
    return "dwpose" if found.videos and found.arrays else None


def _nothing(source: Path | str, layout: str, found: Scan) -> str:
    """Why there is nothing to import, and what to do."""
    if layout != "auto":
        return f"{source} holds nothing of layout {layout}: expected {_EXPECTED[layout]}."
    if found.videos:
        return (
            f"{source} holds {len(found.videos)} videos but no keypoints (.npz) of theirs: "
            "give it to `animator curate`, which finds them."
        )
    refused = f" {found.refused[0].uri}: {found.refused[0].error}." if found.refused else ""
    return f"{source} holds no clips; expected {'; or '.join(_EXPECTED.values())}.{refused}"


def _listed(found: Scan, lists: Iterable[Path]) -> tuple[list[ImportItem], tuple[str, ...]]:
    """The clips that lists name, by the ends of the paths, which mostly are of another machine."""
    by_end: dict[str, list[ImportItem]] = {}
    for item in found.clips:
        parts = PurePosixPath(item.uri).parts
        for length in range(1, len(parts) + 1):
            by_end.setdefault("/".join(parts[-length:]), []).append(item)
    wanted: dict[str, ImportItem] = {}
    for path in lists:
        for line in _lines(path):
            item = _ending(by_end, line)
            if item is None:
                name = printable("/".join(PurePosixPath(line).parts[-2:]))
                item = ImportItem(uri=name, error=f"{path.name} lists it, but it is not there")
            wanted[item.uri] = item
    left_out = len({item.uri for item in found.clips} - wanted.keys())
    note = f"{left_out} folders of clips are in no list, and are left out"
    return [*wanted.values(), *found.refused], (note,) if left_out else ()


def _ending(by_end: dict[str, list[ImportItem]], line: str) -> ImportItem | None:
    parts = [part for part in PurePosixPath(line.replace("\\", "/")).parts if part != "/"]
    for length in range(len(parts), 0, -1):
        matches = by_end.get("/".join(parts[-length:]), [])
        if len(matches) == 1:
            return matches[0]
        if matches:
            return None
    return None


def _lines(path: Path) -> list[str]:
    if path.is_symlink() or path.stat().st_size > _MAX_LIST_BYTES:
        raise ExchangeError(f"{path.name} is a link or has more than {_MAX_LIST_BYTES} bytes.")
    text = path.read_bytes().decode("utf-8", "surrogateescape")
    return [line.strip() for line in text.splitlines() if line.strip()]


def _pair(found: Scan) -> list[ImportItem]:
    """Videos with the keypoints of their name: beside them, else the only ones of that name."""
    by_name: dict[str, list[str]] = {}
    for uri in found.arrays:
        by_name.setdefault(_stem(uri), []).append(uri)
    used: set[str] = set()
    items = list(found.refused)
    for uri, size in found.videos:
        of_name = by_name.get(PurePosixPath(uri).stem, [])
        beside = [one for one in of_name if PurePosixPath(one).parent == PurePosixPath(uri).parent]
        choice = beside or (of_name if len(of_name) == 1 else [])
        used.update(choice)
        item = ImportItem(uri=uri, bytes=size, keypoints=_best(choice))
        items.append(item if choice else _failed(uri, "no keypoints (.npz) of its name were found"))
    return items + [
        _failed(uri, "keypoints without a video of their name")
        for uri in found.arrays
        if uri not in used
    ]


def _failed(uri: str, why: str) -> ImportItem:
    return ImportItem(uri=printable(uri), error=why)


def _stem(uri: str) -> str:
    name = PurePosixPath(uri).name
    suffix = next(one for one in KEYPOINT_SUFFIXES if name.lower().endswith(one))
    return name[: -len(suffix)]


def _best(uris: list[str]) -> str | None:
    """Our own arrays before DWPose's, as beside a video."""
    rank = {suffix: number for number, suffix in enumerate(KEYPOINT_SUFFIXES)}
    order = sorted(
        uris, key=lambda uri: (rank[next(s for s in rank if uri.lower().endswith(s))], uri)
    )
    return order[0] if order else None


def _unique(items: list[ImportItem]) -> tuple[ImportItem, ...]:
    """Items by name; of two that claim one key, the later gets a key of its own."""
    claimed: set[str] = set()
    unique = []
    for item in _sorted(items):
        if item.key in claimed:
            item = replace(item, key=None)
        elif item.key:
            claimed.add(item.key)
        unique.append(item)
    return tuple(unique)


def _sorted(items: Iterable[ImportItem]) -> tuple[ImportItem, ...]:
    by_uri = {item.uri: item for item in items}
    return tuple(by_uri[uri] for uri in sorted(by_uri))
