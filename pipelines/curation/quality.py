"""What the picture is like: sharpness, light, bars at the edges and burnt-in text.

Bars come in two kinds: black ones, and a blurred, enlarged copy of the picture behind it. Sharpness
and light are those of the picture between them.

T frames, H W height and width; frames are uint8 RGB (H, W, 3), all of one size
"""

from collections.abc import Sequence

import cv2
import numpy as np

from pipelines.curation.burnt_in_text import text_share
from pipelines.curation.face_scores import BURNT_OUT, DROWNED
from pipelines.curation.filters import Series
from pipelines.schema import Scores

_SIDE = 160
_MAX_FRAMES, _COPY_FRAMES = 32, 4
# A bar is black (grey levels 0..255) in nearly all its pixels and all frames, and ends at an edge.
_BLACK = 24
_NOT_BLACK = 0.02
_EDGE = 16
# The copy behind a picture is far less sharp than it, and follows it closely.
_COPY_SHARPNESS = 0.25
_COPY_AGREEMENT = 0.8
_MIN_BAR = 0.08

Span = tuple[int, int]


def picture_scores(frames: Sequence[np.ndarray]) -> tuple[Scores, Series]:
    """Scores of the picture over sampled frames; no series, since none is judged by frames.

    sharpness: variance of the Laplacian at 160 pixels of the shorter side, the median over frames.
    luma: mean brightness, 0..255.
    clipped_share: share of pixels that are burnt out or drowned in black.
    black_bars: share of the frame that black bars, or a blurred copy behind the picture, take.
    text_share: share of the frame that lines of burnt-in text cover, the mean over frames.
    """
    if not len(frames):
        return {}, {}
    chosen = [frames[index] for index in _spread(len(frames), _MAX_FRAMES)]
    grey = np.stack([reduced(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)) for frame in chosen])
    rows, columns = picture_area(grey)
    picture = np.ascontiguousarray(grey[:, slice(*rows), slice(*columns)])
    clipped = (picture <= DROWNED) | (picture >= BURNT_OUT)
    area = (rows[1] - rows[0]) * (columns[1] - columns[0])
    return {
        "sharpness": float(np.median([cv2.Laplacian(one, cv2.CV_32F).var() for one in picture])),
        "luma": float(picture.mean()),
        "clipped_share": float(clipped.mean()),
        "black_bars": 1 - area / (grey.shape[1] * grey.shape[2]),
        "text_share": text_share(frames),
    }, {}


def _spread(count: int, most: int) -> np.ndarray:
    """Indices of at most `most` of `count` frames."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def reduced(frame: np.ndarray) -> np.ndarray:
    """A frame at 160 pixels of its shorter side."""
    height, width = frame.shape[:2]
    scale = _SIDE / min(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    quality = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return cv2.resize(frame, size, interpolation=quality)


def picture_area(grey: np.ndarray) -> tuple[Span, Span]:
    """Rows and columns of the picture between the bars, of reduced grey frames (T, H, W)."""
    brightest = grey.max(axis=0)
    rows, columns = _between_black(brightest), _between_black(brightest.T)
    if (rows, columns) != ((0, grey.shape[1]), (0, grey.shape[2])):
        return rows, columns
    few = grey[_spread(len(grey), _COPY_FRAMES)]
    return _before_copy(np.ascontiguousarray(few.transpose(0, 2, 1))), _before_copy(few)


def _between_black(brightest: np.ndarray) -> Span:
    """The first and past-the-last row of (H, W) that is not in a black bar."""
    dark = (brightest > _BLACK).mean(axis=1) <= _NOT_BLACK
    height = len(dark)
    if dark.all():
        return 0, height  # a dark picture, not a bar
    first, last = int(np.argmin(dark)), height - int(np.argmin(dark[::-1]))
    level = brightest.mean(axis=1)
    # The row at the edge may be a mix of both.
    if first and level[first : first + 3].max() < level[:first].mean() + _EDGE:
        first = 0
    if last < height and level[last - 3 : last].max() < level[last:].mean() + _EDGE:
        last = height
    return first, last


def _before_copy(frames: np.ndarray) -> Span:
    """The columns of (T, H, W) that stand before a blurred, enlarged copy of themselves."""
    width = frames.shape[2]
    detail = np.mean([np.abs(cv2.Laplacian(frame, cv2.CV_32F)) for frame in frames], axis=(0, 1))
    total = np.concatenate([[0], np.cumsum(detail)])
    best, span = _COPY_SHARPNESS, (0, width)
    for bar in range(max(3, round(_MIN_BAR * width)), round(0.45 * width)):
        # The edges of the picture itself belong to neither side.
        beside = (total[bar - 2] + total[-1] - total[width - bar + 2]) / (2 * bar - 4)
        inside = (total[width - bar - 2] - total[bar + 2]) / (width - 2 * bar - 4)
        if beside < best * inside:
            best, span = beside / inside, (bar, width - bar)
    if span != (0, width) and _copy_agreement(frames, span) >= _COPY_AGREEMENT:
        return span
    return 0, width


def _copy_agreement(frames: np.ndarray, span: Span) -> float:
    """Correlation of what lies beside the span with the span enlarged to the whole frame."""
    height, width = frames.shape[1:3]
    first, last = span
    beside = np.r_[: first - 2, last + 2 : width]
    tall = max(height, round(height * width / (last - first)))
    top = (tall - height) // 2
    pairs = []
    for frame in frames:
        copy = cv2.resize(frame[:, first:last], (width, tall), interpolation=cv2.INTER_LINEAR)
        blurred = cv2.blur(copy[top : top + height], (width // 12 | 1, width // 12 | 1))
        pairs.append((blurred[:, beside], frame[:, beside]))
    one, two = (np.concatenate([pair[i].ravel() for pair in pairs]).astype(float) for i in (0, 1))
    spread = one.std() * two.std()
    return float(((one - one.mean()) * (two - two.mean())).mean() / spread) if spread else 0.0
