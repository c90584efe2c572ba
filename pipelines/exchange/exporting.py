"""Shards into the folders that StableAnimator's trainer reads, a clip at a time.

    OUT/rec/KEY/images/frame_0.png …   the frames, RGB; rec for square clips, vec for upright ones
    OUT/rec/KEY/poses/frame_0.png …    skeletons as its own extraction draws them, RGB
    OUT/rec/KEY/faces/frame_0.png …    face boxes, white on black, one channel; all white without
    OUT/rec/KEY/clip.json, clip.pose.npz, clip.face.npz    what pictures cannot hold
    OUT/video_rec_path.txt, video_vec_path.txt, video_path.txt    the folders, a line each

A clip's folder is made under another name, checked, and appears by a rename. The trainer stretches
every frame to 512x512 (rec) or 576x1024 (vec).

H W height and width
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

import numpy as np

from animator.skeleton import draw_pose
from pipelines import schema, shards
from pipelines.clips import ClipStore
from pipelines.curation.ledger import WORK_FOLDER, folder_lock
from pipelines.exchange.face_masks import draw_mask
from pipelines.exchange.frame_folder import ExchangeError
from pipelines.exchange.import_people import FACE_FILE
from pipelines.exchange.scan import CARD, FACES, IMAGES, POSES, read_card
from pipelines.shards import write_atomic
from pipelines.video import VideoError, iter_frames

EXPORT_FILE = "export.json"
POSE_FILE = "clip.pose.npz"
# The trainer's two sizes by the folder they lie in, as width over height.
GROUPS = {"rec": 512 / 512, "vec": 576 / 1024}
_LISTS = {"rec": "video_rec_path.txt", "vec": "video_vec_path.txt"}
_ALL = "video_path.txt"
_STRETCH = 1.1  # a clip is called distorted where its shape is changed by more
_FORMAT = 1
_CARD_FIELDS = ("key", "source", "span", "scores", "provenance", "models")


@dataclass(frozen=True, kw_only=True)
class ExportSummary:
    """What an export did. `stretched` clips are of a shape that the trainer will distort."""

    out: str
    layout: str
    clips: int
    written: int
    skipped: int
    frames: int
    bytes: int
    stretched: tuple[str, ...] = ()
    failures: dict[str, str] | None = None


def export_shards(
    folder: Path | str,
    out: Path | str,
    *,
    layout: str = "stableanimator",
    limit: int | None = None,
    jobs: int = 1,
    progress: Callable[[int, int, str], Any] | None = None,
) -> ExportSummary:
    """Write the clips of a folder of shards as pictures; called again, it writes what is missing.

    Args:
        limit: only so many clips, the first in the order of the shards.
        jobs: threads, a clip each.
        progress: called with clips done, clips in all, and the key of the last one.

    Raises:
        ExchangeError: another layout, or `out` holds something else.
        ShardError: `folder` holds no shards. A damaged clip is in the summary's `failures`.
        FolderInUseError: another run writes into `out`.
    """
    if layout != "stableanimator":
        raise ExchangeError(f"got layout {layout!r}, expected stableanimator.")
    if jobs < 1 or (limit is not None and limit < 1):
        raise ExchangeError(f"got {jobs} jobs and limit {limit}, expected 1 or more.")
    store, target = ClipStore(folder), Path(out)
    _claim(target, Path(folder))
    with folder_lock(target):
        work = target / WORK_FOLDER
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            return _run(store, target, work, limit, jobs, progress or (lambda *_: None))
        finally:
            shutil.rmtree(work, ignore_errors=True)


def group_of(height: int, width: int) -> str:
    """The trainer's folder whose shape is nearest to a clip's."""
    return min(GROUPS, key=lambda name: abs(log(width / height / GROUPS[name])))


def _claim(target: Path, source: Path) -> None:
    """Make the folder ours. Raises ExchangeError where it is somebody else's."""
    if target.resolve() == source.resolve():
        raise ExchangeError(f"{target} is the folder of shards itself: give another --out folder.")
    target.mkdir(parents=True, exist_ok=True)
    mark = target / EXPORT_FILE
    ours = {EXPORT_FILE, ".lock", WORK_FOLDER}
    if not mark.is_file():
        if any(entry.name not in ours for entry in target.iterdir()):
            raise ExchangeError(
                f"{target} is not empty and holds no export: give an --out folder of its own."
            )
        write_atomic(mark, schema.encode_json({"layout": "stableanimator", "format": _FORMAT}))


def _run(
    store: ClipStore,
    target: Path,
    work: Path,
    limit: int | None,
    jobs: int,
    tell: Callable[[int, int, str], Any],
) -> ExportSummary:
    count = min(len(store), limit or len(store))
    written = frames = num_bytes = 0
    failures: dict[str, str] = {}
    stretched: list[str] = []
    with ThreadPoolExecutor(jobs) as pool:
        for i, result in enumerate(_in_order(pool, store, target, work, count, 2 * jobs)):
            if isinstance(result, str):
                failures[store.keys[i]] = result
            else:
                written += result > 0
                num_bytes += result
                frames += store.num_frames(i)
                if _stretch(*store.size(i)) > _STRETCH:
                    stretched.append(store.keys[i])
            tell(i + 1, count, store.keys[i])
    complete = _write_lists(store, target)
    return ExportSummary(
        out=str(target),
        layout="stableanimator",
        clips=complete,
        written=written,
        skipped=count - written - len(failures),
        frames=frames,
        bytes=num_bytes,
        stretched=tuple(stretched),
        failures=failures,
    )


def _in_order(
    pool: ThreadPoolExecutor, store: ClipStore, target: Path, work: Path, count: int, ahead: int
) -> Iterator[int | str]:
    """The bytes written for each clip (0 where it was there), or what was wrong with it."""
    futures = [pool.submit(_safely, store, i, target, work) for i in range(min(ahead, count))]
    for i in range(count):
        yield futures[i].result()
        if (following := i + ahead) < count:
            futures.append(pool.submit(_safely, store, following, target, work))


def _safely(store: ClipStore, i: int, target: Path, work: Path) -> int | str:
    try:
        return _export(store, i, target, work)
    except (schema.ShardError, VideoError, ExchangeError) as error:
        return str(error)


def _export(store: ClipStore, i: int, target: Path, work: Path) -> int:
    """Write one clip, unless it is there; returns the bytes written."""
    key = schema.check_key(store.keys[i])
    place = target / group_of(*store.size(i)) / key
    video, what = store.read(i, "mp4")
    content = hashlib.sha256(video).hexdigest()
    if place.exists() or place.is_symlink():
        card = read_card(place)
        if card is None or card.get("key") != key:
            raise ExchangeError(f"{place} is there and is no export of {key}: remove it.")
        if card.get("mp4_sha256") == content and _complete(place, store.num_frames(i)):
            return 0
    made = work / key
    (made / IMAGES).mkdir(parents=True)
    (made / POSES).mkdir()
    (made / FACES).mkdir()
    _write_pictures(store, i, video, made)
    _write_rest(store, i, content, made)
    if not _complete(made, store.num_frames(i)):
        raise ExchangeError(f"{what} gave fewer pictures than it has frames.")
    size = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
    place.parent.mkdir(exist_ok=True)
    if place.exists():
        shutil.rmtree(place)
    os.replace(made, place)
    return size


def _write_pictures(store: ClipStore, i: int, video: bytes, made: Path) -> None:
    pose, faces = store.pose(i), store.faces(i)
    height, width = store.size(i)
    with shards.as_file(video) as path:
        for index, frame in enumerate(iter_frames(path, fps=store.fps(i))):
            if index >= store.num_frames(i):
                break
            drawn = draw_pose(
                pose.keypoints[index], pose.score[index], height, width, style="published"
            )
            mask = draw_mask(faces.boxes[index], height, width)
            for part, picture in ((IMAGES, frame), (POSES, drawn), (FACES, mask)):
                _write_png(made / part / f"frame_{index}.png", picture)


def _write_png(path: Path, picture: np.ndarray) -> None:
    """Write a picture and read it back, so that what is renamed into place is known to be whole."""
    from PIL import Image

    # Levels above 1 make files a few per cent smaller in several times the time.
    Image.fromarray(picture).save(path, "PNG", compress_level=1)
    with Image.open(path) as written:
        if not np.array_equal(np.asarray(written), picture):
            raise ExchangeError(f"{path.name} was not written as it should be: is the disk full?")


def _write_rest(store: ClipStore, i: int, content: str, made: Path) -> None:
    meta = store.meta(i)
    height, width = store.size(i)
    card = {name: meta.get(name) for name in _CARD_FIELDS} | {
        "key": store.keys[i],
        "fps": store.fps(i),
        "num_frames": store.num_frames(i),
        "size": [height, width],
        "mp4_sha256": content,
    }
    (made / POSE_FILE).write_bytes(store.read(i, "pose.npz")[0])
    (made / FACE_FILE).write_bytes(store.read(i, "face.npz")[0])
    (made / CARD).write_bytes(schema.encode_json(card, digits=17))


def _complete(place: Path, num_frames: int) -> bool:
    """Whether a clip's folder has every picture, and none of them is empty."""
    wanted = {f"frame_{index}.png" for index in range(num_frames)}
    for part in (IMAGES, POSES, FACES):
        try:
            with os.scandir(place / part) as scan:
                found = {entry.name for entry in scan if entry.stat().st_size}
        except OSError:
            return False
        if found != wanted:
            return False
    return all((place / name).is_file() for name in (CARD, POSE_FILE, FACE_FILE))


def _write_lists(store: ClipStore, target: Path) -> int:
    """Write the lists of all complete folders, with whole paths; returns how many there are."""
    lines: dict[str, list[str]] = {name: [] for name in GROUPS}
    for i, key in enumerate(store.keys):
        group = group_of(*store.size(i))
        place = target.resolve() / group / key
        if (place / CARD).is_file():
            lines[group].append(f"{place}\n")
    for group, name in _LISTS.items():
        write_atomic(target / name, "".join(lines[group]).encode())
    everything = [line for group in GROUPS for line in lines[group]]
    write_atomic(target / _ALL, "".join(everything).encode())
    return len(everything)


def _stretch(height: int, width: int) -> float:
    """By how much the trainer changes a clip's shape, 1 for not at all."""
    shape = width / height / GROUPS[group_of(height, width)]
    return max(shape, 1 / shape)
