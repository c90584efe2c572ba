"""Pictures for people: a frame with its skeletons and faces, and sheets of a clip or a record.

T frames, P people, K keypoints, F faces
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from animator.keypoints import VISIBLE
from animator.skeleton import draw_pose
from pipelines.clips import ClipStore
from pipelines.curation.config import CurationConfig
from pipelines.curation.filters import REASONS, measures
from pipelines.faces import Face
from pipelines.pose import PoseTrack
from pipelines.schema import ClipRecord, FaceTrack, Scores, SourceRecord
from pipelines.shards import write_atomic

THUMB_HEIGHT = 240
_TILE_AREA = 60_000  # pixels of a sheet's frame, whatever its shape
_SHEET_FRAMES = 12
_SHEET_WIDTH = 1200
_MIN_WIDTH = 760
_GAP = 4
_MARGIN = 14
_BACKGROUND, _INK, _FAINT = (24, 26, 30), (238, 240, 243), (160, 166, 175)
_GOOD, _BAD = (120, 220, 140), (255, 140, 120)
_FACE_COLOUR = (255, 214, 64)
# Of people, where there are several; one alone has the colours of the limbs.
_PEOPLE = ((86, 180, 255), (255, 130, 60), (90, 220, 120), (240, 110, 220), (250, 220, 70))
_MAKER = "animator contact sheet"


class SheetError(ValueError):
    """A sheet that would be written over somebody else's file."""


def draw_thumbnail(frame: np.ndarray, pose: PoseTrack, faces: Sequence[Face]) -> np.ndarray:
    """A frame 240 pixels high with the first frame of `pose` and the faces drawn in, RGB."""
    boxes = np.array([face.box for face in faces], np.float32).reshape(-1, 4)
    return _draw(frame, pose.keypoints[0], pose.score[0], boxes, THUMB_HEIGHT)


def encode_jpeg(image: np.ndarray, quality: int = 80) -> bytes:
    """An RGB image as JPEG bytes, without a date or other traces."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def contact_sheet(folder: Path | str, key: str, png: Path | str) -> Path:
    """Write a PNG with frames of a clip, their skeletons and faces; returns its path.

    Raises:
        ShardError: no such clip, or a damaged one.
        SheetError: `png` is there and is no sheet.
    """
    path = Path(png)
    check_free(path)
    store = ClipStore(folder)
    i = store.index(key)
    count = min(_SHEET_FRAMES, store.num_frames(i))
    indices = np.linspace(0, store.num_frames(i) - 1, count).round().astype(int).tolist()
    pose, faces = store.pose(i), store.faces(i)
    height, width = store.size(i)
    tile_height = round((_TILE_AREA * height / width) ** 0.5)
    tiles = [
        _label(
            _draw(frame, pose.keypoints[index], pose.score[index], faces.boxes[index], tile_height),
            f"{index / store.fps(i):.1f} s",
        )
        for frame, index in zip(store.frames(i, indices), indices, strict=True)
    ]
    meta = store.meta(i)
    seconds = store.num_frames(i) / store.fps(i)
    lines = [
        (key, 22, _INK),
        (
            f"{width}x{height}   {store.fps(i):.4g} fps   {seconds:.1f} s   "
            f"{store.num_frames(i)} frames   {_name(meta)}",
            15,
            _FAINT,
        ),
        ("kept", 15, _GOOD),
        (_facts(dict(meta.get("scores") or {}) | _of_arrays(pose, faces)), 15, _INK),
    ]
    _write(path, _page(lines, _grid(tiles)))
    return path


def record_sheet(
    source: SourceRecord, clip: ClipRecord | None, thumbnail: bytes | None, png: Path | str
) -> Path:
    """Write a PNG of what is known of a source, or of one clip of it, that has no members.

    Raises:
        SheetError: `png` is there and is no sheet.
    """
    from PIL import Image

    path, shown = Path(png), clip or source
    check_free(path)
    picture = None
    if thumbnail is not None:
        picture = np.asarray(Image.open(io.BytesIO(thumbnail), formats=("JPEG",)).convert("RGB"))
    lines = [(clip.key if clip else source.id, 22, _INK), (Path(source.uris[0]).name, 15, _FAINT)]
    lines.append((shown.verdict, 15, _GOOD if shown.verdict == "kept" else _BAD))
    lines += [(f"{REASONS.get(reason, reason)}", 15, _BAD) for reason in shown.reasons]
    if source.error:
        lines.append((source.error, 15, _BAD))
    scores = dict(shown.scores)
    if clip:
        scores |= measures(clip.scores, clip.series, CurationConfig())
    if scores:
        lines.append((_facts(scores), 15, _INK))
    lines += [(line, 13, _FAINT) for line in _all_scores(scores)]
    _write(path, _page(lines, picture))
    return path


def check_free(path: Path) -> None:
    """Raises SheetError where `path` is there and is not a sheet that may be replaced."""
    from PIL import Image

    if not path.exists() and not path.is_symlink():
        return
    try:
        with Image.open(path, formats=("PNG",)) as image:
            ours = image.info.get("Software") == _MAKER
    except OSError:
        ours = False
    if not ours:
        raise SheetError(f"{path} is there and is no contact sheet: give another --out FILE.png.")


def _draw(
    frame: np.ndarray, keypoints: np.ndarray, score: np.ndarray, boxes: np.ndarray, height: int
) -> np.ndarray:
    width = max(1, round(frame.shape[1] * height / frame.shape[0]))
    quality = cv2.INTER_AREA if height < frame.shape[0] else cv2.INTER_CUBIC
    image = cv2.resize(frame, (width, height), interpolation=quality)
    seen = np.where(score >= VISIBLE, 1.0, 0.0)
    present = np.flatnonzero(seen.any(axis=-1)) if len(keypoints) else np.zeros(0, int)
    several = len(keypoints) > 1
    for person in present[::-1]:  # the main one on top
        lines = draw_pose(keypoints[person], seen[person], height, width)
        cover = lines.max(axis=-1, keepdims=True)
        colour = np.array(_PEOPLE[person % len(_PEOPLE)]) if several else lines
        # Dimmed under the lines, so that they show on any background.
        image = np.where(cover > 40, colour // 4 * 3 + image // 4, image)
    image = np.ascontiguousarray(image, np.uint8)
    for number, box in enumerate(boxes):
        if (box[2:] <= box[:2]).any():
            continue
        left, top, right, bottom = (box * (width, height, width, height)).round().astype(int)
        owned = several and number < len(keypoints)
        colour = _PEOPLE[number % len(_PEOPLE)] if owned else _FACE_COLOUR
        cv2.rectangle(image, (int(left), int(top)), (int(right), int(bottom)), colour, 2)
    return image


def _grid(tiles: Sequence[np.ndarray]) -> np.ndarray:
    """Tiles of one size in rows, with gaps."""
    height, width = tiles[0].shape[:2]
    columns = max(1, min(len(tiles), (_SHEET_WIDTH + _GAP) // (width + _GAP)))
    # Full rows where there is a way.
    columns = next((n for n in range(columns, columns // 2, -1) if len(tiles) % n == 0), columns)
    rows = -(-len(tiles) // columns)
    shape = (rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3)
    sheet = np.full(shape, _BACKGROUND, np.uint8)
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        top, left = row * (height + _GAP), column * (width + _GAP)
        sheet[top : top + height, left : left + width] = tile
    return sheet


def _page(lines: Sequence[tuple[str, int, tuple[int, ...]]], picture: np.ndarray | None) -> Any:
    """Lines of (text, size, colour) above a picture, as a PIL image."""
    from PIL import Image, ImageDraw, ImageFont

    picture = np.zeros((0, 0, 3), np.uint8) if picture is None else picture
    width = max(picture.shape[1], _MIN_WIDTH)
    set_lines = []
    for text, size, colour in lines:
        font = ImageFont.load_default(size)
        set_lines += [(part, font, size, colour) for part in _wrapped(text, font, width)]
    top = 2 * _MARGIN + sum(round(1.5 * size) for _, _, size, _ in set_lines)
    page = Image.new("RGB", (width + 2 * _MARGIN, top + picture.shape[0] + _MARGIN), _BACKGROUND)
    draw, at = ImageDraw.Draw(page), _MARGIN
    for text, font, size, colour in set_lines:
        draw.text((_MARGIN, at), text, font=font, fill=colour)
        at += round(1.5 * size)
    if picture.size:
        page.paste(Image.fromarray(picture), (_MARGIN, top))
    return page


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """The text in lines that fit, broken between words; names too long are cut off."""
    lines: list[str] = []
    for word in text.replace("\n", " ").split(" "):
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            while word and font.getlength(word) > width:
                word = word[:-1]
            lines.append(word)
    return lines


def _label(tile: np.ndarray, text: str) -> np.ndarray:
    """A tile with its time in the corner."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.fromarray(tile)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    _, _, right, bottom = draw.textbbox((0, 0), text, font=font)
    top = image.height - bottom - 6
    draw.rectangle((0, top, right + 8, image.height), fill=_BACKGROUND)
    draw.text((4, top + 2), text, font=font, fill=_INK)
    return np.asarray(image)


def _write(path: Path, page: Any) -> None:
    from PIL.PngImagePlugin import PngInfo

    note, buffer = PngInfo(), io.BytesIO()
    note.add_text("Software", _MAKER)
    page.save(buffer, "PNG", pnginfo=note)
    write_atomic(path, buffer.getvalue())


def _name(meta: dict[str, Any]) -> str:
    """The name of the file that a clip is from."""
    provenance = meta.get("provenance")
    uris = provenance.get("uris") if isinstance(provenance, dict) else None
    return Path(str(uris[0])).name if uris else ""


def _of_arrays(pose: PoseTrack, faces: FaceTrack) -> Scores:
    """What a stored clip's own arrays say of its people and faces, over all of its frames."""
    seen = (faces.score > 0).any(axis=1).mean() if faces.score.size else 0.0
    people = (pose.score >= VISIBLE).any(axis=(0, 2)).sum()
    return {
        "face_share": float(seen),
        "pose_missing": pose.missing_share(),
        "people": int(people),
    }


def _facts(scores: Scores) -> str:
    """The scores that people ask for first, in words."""
    wanted = (
        ("camera_percent_per_second", "camera {:.1f} %/s", 1.0),
        ("face_share", "face in {:.0f} % of frames", 100.0),
        ("pose_missing", "{:.0f} % of keypoints missing", 100.0),
        ("people", "people {:.0f}", 1.0),
    )
    found = [
        form.format(value * scale)
        for name, form, scale in wanted
        if isinstance(value := scores.get(name), int | float)
    ]
    return "   ".join(found)


def _all_scores(scores: Scores) -> list[str]:
    """Every score, a few to a line."""
    texts = [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in sorted(scores.items())
        if value is not None
    ]
    return ["   ".join(texts[at : at + 4]) for at in range(0, len(texts), 4)]
