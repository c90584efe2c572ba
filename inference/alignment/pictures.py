"""Pictures of an alignment: moved skeletons over the dimmed reference, with room around it.

Shapes: T frames, P people, K keypoints (18 or 128), H W pixels of the picture, CH CW those of the
canvas around it. Images are uint8 RGB.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from animator.keypoints import BODY
from animator.skeleton import draw_pose
from inference.perception import Pose

TILE, TALL = 300, 440  # pixels of the longer side of a picture, and of a tall one's at most
NARROW = 250  # pixels, which a tall picture should be wide
SMALL = 0.5  # of a tile: pictures of the strip
MIN_MARGIN, MAX_MARGIN = 0.04, 0.45  # of the picture's longer side, on each side
RING = 4  # pixels, round a joint outside of the picture
FURTHEST = 2  # frames shown because the pose is far from the one most alike
_PAPER, _EDGE, _OUT = (38, 42, 50), (150, 156, 168), (255, 96, 96)
_DIM, _GREY, _GREY_COVER = 0.5, 150.0, 0.7
_SOLID = 150.0  # brightness from which a drawn line covers what is below it


@dataclass(frozen=True)
class Canvas:
    """A dimmed picture with paper around it, for joints that leave it."""

    paper: np.ndarray  # (CH, CW, 3)
    corner: tuple[int, int]  # x and y of the picture's corner
    size: tuple[int, int]  # (H, W) of the picture

    def points(self, keypoints: np.ndarray) -> np.ndarray:
        """Keypoints `(..., 2)` in 0..1 of the picture to 0..1 of the canvas."""
        height, width = self.paper.shape[:2]
        inside = keypoints * (self.size[1], self.size[0]) + self.corner
        return inside / (width, height)


def make_canvas(image: np.ndarray, points: np.ndarray, side: int | None = None) -> Canvas:
    """A canvas for a picture with margins as wide as the points need, within limits.

    Args:
        image: `(H, W, 3)`.
        points: `(..., 2)` in 0..1 of it; those that are not finite do not count.
        side: pixels of the picture's longer side; by default such that it is not too narrow.
    """
    if side is None:
        side = round(min(max(TILE, NARROW * image.shape[0] / image.shape[1]), TALL))
    scale = side / max(image.shape[:2])
    height, width = (max(round(length * scale), 1) for length in image.shape[:2])
    quality = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    small = cv2.resize(image, (width, height), interpolation=quality)
    points = points[np.isfinite(points).all(-1)].reshape(-1, 2) * (width, height)
    low, high = (points.min(0), points.max(0)) if len(points) else (np.zeros(2), np.zeros(2))
    room = np.stack([-low, high - (width, height)]) + side * MIN_MARGIN
    (left, top), (right, bottom) = (
        np.clip(room, side * MIN_MARGIN, side * MAX_MARGIN).round().astype(int)
    )
    paper = np.empty((top + height + bottom, left + width + right, 3), np.uint8)
    paper[:] = _PAPER
    paper[top : top + height, left : left + width] = (small * _DIM).astype(np.uint8)
    corner = (int(left), int(top))
    cv2.rectangle(paper, (left - 1, top - 1), (left + width, top + height), _EDGE, 1)
    return Canvas(paper, corner, (height, width))


def draw_on(
    canvas: Canvas,
    keypoints: np.ndarray,
    score: np.ndarray,
    threshold: float,
    who: Sequence[int] = (0,),
) -> np.ndarray:
    """The canvas with people `(P, K, 2)` in colour, joints outside of the picture ringed.

    One that lies beyond the canvas is a triangle at its edge. Only those of `who`, the people that
    are aligned, are marked.
    """
    seen = score >= threshold
    image = _blend(canvas.paper, canvas.points(keypoints), seen, grey=False)
    height, width = image.shape[:2]
    body, seen = keypoints[[*who]][..., BODY, :], seen[[*who]][..., BODY]
    body = body[seen & np.isfinite(body).all(-1)]
    outside = ((body < 0) | (body > 1)).any(-1)
    for x, y in canvas.points(body[outside]) * (width, height):
        if 0 <= x < width and 0 <= y < height:
            cv2.circle(image, (round(x), round(y)), RING, _OUT, 1, cv2.LINE_AA)
        else:
            _point_out(image, x, y)
    return image


def with_reference(canvas: Canvas, reference: Pose) -> Canvas:
    """The canvas with the reference's own skeletons in grey."""
    seen = reference.score >= reference.threshold
    paper = _blend(canvas.paper, canvas.points(reference.keypoints), seen, grey=True)
    return Canvas(paper, canvas.corner, canvas.size)


def draw_frame(
    frame: np.ndarray, keypoints: np.ndarray, score: np.ndarray, threshold: float, height: int
) -> np.ndarray:
    """A driving frame `height` pixels high with its people `(P, K, 2)`."""
    width = max(round(frame.shape[1] * height / frame.shape[0]), 1)
    quality = cv2.INTER_AREA if height < frame.shape[0] else cv2.INTER_CUBIC
    small = cv2.resize(frame, (width, height), interpolation=quality)
    return _blend((small * 0.7).astype(np.uint8), keypoints, score >= threshold, grey=False)


def choose_frames(
    poses: np.ndarray, seen: np.ndarray, alike: int | None
) -> list[tuple[int, list[str]]]:
    """Frames to look at and why: the one most like the picture, first, last, and the furthest.

    Args:
        poses: the main person's moved body `(T, N, 2)`.
        seen: whether a joint is seen, `(T, N)`.
        alike: the frame whose pose is most like the picture's, where one is known.
    """
    count = seen.sum(-1)
    usable = np.flatnonzero(count >= min(5, max(int(count.max(initial=0)), 1)))
    if not len(usable):
        return [(0, ["first"])]
    start = int(usable[0]) if alike is None else alike
    reasons: dict[int, list[str]] = {start: [] if alike is None else ["most like the picture"]}
    reasons.setdefault(int(usable[0]), []).append("first with a person")
    reasons.setdefault(int(usable[-1]), []).append("last with a person")
    chosen = [start]
    for _ in range(FURTHEST):
        away = np.min([_distances(poses, seen, index) for index in chosen], axis=0)
        furthest = int(usable[np.argmax(away[usable])])
        if away[furthest] <= 0:
            break
        reasons.setdefault(furthest, []).append("the pose is furthest away")
        chosen.append(furthest)
    rest = sorted(index for index in reasons if index != start)
    return [(index, reasons[index]) for index in (start, *rest)]


def embed(image: np.ndarray, quality: int = 82) -> str:
    """An image as a WebP data URI."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", quality=quality, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def spread_over(count: int, wanted: int) -> Sequence[int]:
    """Numbers of at most `wanted` of `count` frames, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).round().astype(int)).tolist()


def _distances(poses: np.ndarray, seen: np.ndarray, index: int) -> np.ndarray:
    """Mean distance of every frame's joints to those of one frame; 0 where few are common."""
    common = seen & seen[index]
    away = np.where(common, np.linalg.norm(poses - poses[index], axis=-1), 0)
    number = common.sum(-1)
    return np.where(number >= 3, away.sum(-1) / np.maximum(number, 1), 0)


def _blend(image: np.ndarray, points: np.ndarray, seen: np.ndarray, *, grey: bool) -> np.ndarray:
    """Skeletons over an image; all joints that are seen count as sure, so that they show."""
    height, width = image.shape[:2]
    if not points.size:
        return image.copy()
    lines = draw_pose(points, seen.astype(np.float32), height, width).astype(np.float32)
    strength = lines.max(-1, keepdims=True)
    cover = np.minimum(strength / _SOLID, 1)
    if grey:
        cover = cover * _GREY_COVER
        lines = cover * _GREY
    return np.clip(image * (1 - cover) + lines, 0, 255).astype(np.uint8)


def _point_out(image: np.ndarray, x: float, y: float) -> None:
    """A triangle at the edge towards a point beyond it."""
    height, width = image.shape[:2]
    at = np.clip((x, y), 7, (width - 8, height - 8))
    towards = np.array((x, y)) - at
    towards = towards / max(float(np.linalg.norm(towards)), 1e-6)
    across = np.array((-towards[1], towards[0]))
    corners = [at + 6 * towards, at - 3 * towards + 4 * across, at - 3 * towards - 4 * across]
    cv2.fillConvexPoly(image, np.array(corners).round().astype(np.int32), _OUT, cv2.LINE_AA)
