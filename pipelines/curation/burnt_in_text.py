"""Text that was laid over the picture: subtitles, captions, watermarks; no model.

Letters are thin strokes of high contrast that stay put in the picture while it moves, and stand in
lines. A row of strokes is taken for a line of text where it is crossed by about as many strokes in
both directions, counted over a stretch as long as the line is high, as letters have, and where
nothing like it lies above and below. Leaves, knitting and fences fail one of these: their strokes
run one way or go on in all directions. Lettering in the scene itself that holds still, on shirts or
signs, cannot be told from what was laid over it. Lines that run downwards are not found.

H W height and width
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

_SIDE = 480
_MAX_PAIRS = 8
# Samples between the two frames of a pair, and between pairs.
_APART, _STEP = 2, 4
# Grey levels: strokes differ from what is around them by more, and stay as they are within.
_CONTRAST, _STILL = 40, 16
_STROKE = 11  # pixels; wider things are no strokes
_MIN_STROKES = 50  # pixels of strokes, under which there is nothing to read
# Shares of the longer side: the height of a line, and the gaps that it is joined over.
_MIN_HEIGHT, _MAX_HEIGHT = 0.014, 0.14
_GAPS = (0.015, 0.05)
# A line is longer than high, and its strokes fill this much of it.
_MIN_LENGTH = 2.5
_MIN_FILL, _MAX_FILL = 0.1, 0.72
_MIN_JOINED = 0.35  # and with the gaps between them
# Strokes crossed along each direction, over a stretch as long as the line is high, and in sum.
_MIN_CROSSINGS, _MIN_ALL_CROSSINGS = 1.0, 2.4
_MIN_MEDIAN_CONTRAST = 60
_MAX_UNEVEN = 1.0
_MAX_BESIDE = 0.3


def text_share(frames: Sequence[np.ndarray]) -> float:
    """Share of the picture, 0..1, that lines of text cover, the mean over uint8 RGB frames."""
    apart = min(_APART, len(frames) - 1)
    last = len(frames) - apart - 1
    count = min(_MAX_PAIRS, last // _STEP + 1)
    shares = []
    for start in np.linspace(0, last, count).astype(int):
        grey, later = _grey(frames[start]), _grey(frames[start + apart])
        covered = np.zeros(grey.shape, bool)
        for x, y, width, height in text_lines(grey, later):
            covered[y : y + height, x : x + width] = True
        shares.append(covered.mean())
    return float(np.mean(shares)) if shares else 0.0


def _grey(frame: np.ndarray) -> np.ndarray:
    height, width = frame.shape[:2]
    grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    scale = _SIDE / max(height, width)
    if scale >= 1:
        return grey
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(grey, size, interpolation=cv2.INTER_AREA)


def text_lines(grey: np.ndarray, later: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Lines of text (x, y, width, height) in pixels of two grey frames (H, W) a moment apart."""
    side = max(grey.shape)
    still = cv2.absdiff(grey, later) <= _STILL
    kernel = np.ones((_STROKE, _STROKE), np.uint8)
    lines = []
    for polarity in (cv2.MORPH_TOPHAT, cv2.MORPH_BLACKHAT):
        contrast = cv2.morphologyEx(grey, polarity, kernel)
        strokes = ((contrast > _CONTRAST) & still).view(np.uint8)
        if cv2.countNonZero(strokes) < _MIN_STROKES:
            continue
        for gap in _GAPS:
            reach = np.ones((3, max(3, round(gap * side)) | 1), np.uint8)
            joined = cv2.morphologyEx(strokes, cv2.MORPH_CLOSE, reach)
            boxes = cv2.connectedComponentsWithStats(joined, connectivity=4)[2][1:]
            x, y, width, height, area = boxes.T
            fits = (height >= _MIN_HEIGHT * side) & (height <= _MAX_HEIGHT * side)
            fits &= (width >= _MIN_LENGTH * height) & (area >= _MIN_JOINED * width * height)
            for x, y, width, height in boxes[fits, :4].tolist():
                row = _Row(x, y, width, height)
                if row.is_text(strokes, contrast, grey):
                    lines.append((x, y, width, height))
    return lines


@dataclass(frozen=True)
class _Row:
    """A rectangle of pixels that may be a line of text."""

    x: int
    y: int
    width: int
    height: int

    def is_text(self, strokes: np.ndarray, contrast: np.ndarray, grey: np.ndarray) -> bool:
        """Whether strokes (H, W) of 0 and 1 in it look like letters."""
        here = np.s_[self.y : self.y + self.height, self.x : self.x + self.width]
        mask = strokes[here] > 0
        fill = mask.mean()
        if not _MIN_FILL <= fill <= _MAX_FILL:
            return False
        across = (mask[:, 1:] & ~mask[:, :-1]).sum() + mask[:, 0].sum()
        down = (mask[1:] & ~mask[:-1]).sum() + mask[0].sum()
        if min(across, down) < _MIN_CROSSINGS * self.width:
            return False
        if across + down < _MIN_ALL_CROSSINGS * self.width:
            return False
        if self._beside(strokes) > _MAX_BESIDE * fill:
            return False
        level = np.median(contrast[here][mask])
        low, high = np.percentile(grey[here][mask], [20, 80])
        return bool(level >= _MIN_MEDIAN_CONTRAST and high - low <= _MAX_UNEVEN * level)

    def _beside(self, strokes: np.ndarray) -> float:
        """Share of strokes just above and below."""
        margin = max(2, self.height // 4)
        columns = np.s_[self.x : self.x + self.width]
        above = strokes[max(0, self.y - margin) : self.y, columns]
        end = self.y + self.height
        below = strokes[end : end + margin, columns]
        return float(np.concatenate([above, below]).mean()) if above.size + below.size else 0.0
