"""Small pictures for people: a frame with its skeletons and faces, a sheet of a clip's frames.

T frames, P people
"""

import io
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from animator.keypoints import VISIBLE
from animator.skeleton import draw_pose
from pipelines.clips import ClipStore
from pipelines.faces import Face
from pipelines.pose import PoseTrack
from pipelines.shards import write_atomic

THUMB_HEIGHT = 240
_SHEET_HEIGHT = 200
_SHEET_FRAMES = 12
_SHEET_COLUMNS = 4
_FACE_COLOUR = (255, 214, 64)


def draw_thumbnail(frame: np.ndarray, pose: PoseTrack, faces: Sequence[Face]) -> np.ndarray:
    """A frame 240 pixels high with the first frame of `pose` and the faces drawn in, RGB."""
    boxes = np.array([face.box for face in faces], np.float32).reshape(-1, 4)
    return _draw(frame, pose.keypoints[0], pose.score[0], boxes, VISIBLE, THUMB_HEIGHT)


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
    """
    from PIL import Image

    store = ClipStore(folder)
    i = store.index(key)
    count = min(_SHEET_FRAMES, store.num_frames(i))
    indices = np.linspace(0, store.num_frames(i) - 1, count).round().astype(int).tolist()
    pose, faces = store.pose(i), store.faces(i)
    tiles = [
        _draw(
            frame,
            pose.keypoints[index],
            pose.score[index],
            faces.boxes[index],
            VISIBLE,
            _SHEET_HEIGHT,
        )
        for frame, index in zip(store.frames(i, indices), indices, strict=True)
    ]
    columns = min(_SHEET_COLUMNS, len(tiles))
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    rows = [np.concatenate(tiles[at : at + columns], 1) for at in range(0, len(tiles), columns)]
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(rows)).save(buffer, "PNG")
    path = Path(png)
    write_atomic(path, buffer.getvalue())
    return path


def _draw(
    frame: np.ndarray,
    keypoints: np.ndarray,
    score: np.ndarray,
    boxes: np.ndarray,
    threshold: float,
    height: int,
) -> np.ndarray:
    width = max(1, round(frame.shape[1] * height / frame.shape[0]))
    quality = cv2.INTER_AREA if height < frame.shape[0] else cv2.INTER_CUBIC
    image = cv2.resize(frame, (width, height), interpolation=quality)
    if len(keypoints):
        # Dimmed under the lines, so that they show on any background.
        lines = draw_pose(keypoints, np.where(score >= threshold, 1.0, 0.0), height, width)
        cover = lines.max(axis=-1, keepdims=True) > 40
        image = np.where(cover, lines // 4 * 3 + image // 4, image)
    image = np.ascontiguousarray(image, np.uint8)
    for box in boxes[(boxes[:, 2:] > boxes[:, :2]).all(axis=1)]:
        left, top, right, bottom = (box * (width, height, width, height)).round().astype(int)
        cv2.rectangle(image, (int(left), int(top)), (int(right), int(bottom)), _FACE_COLOUR, 2)
    return image
