"""Shot boundaries: hard cuts, fades and dissolves, in one pass over small frames.

PySceneDetect proposes hard cuts; a proposal stands only if the picture before it cannot be tracked
to the picture after it, since fast motion and flashes look like cuts to any difference of frames.
A stretch of empty frames between two pictures is a fade. A dissolve is where the frames are a
steady mix of an earlier and a later picture that have nothing in common.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from scenedetect import FrameTimecode
from scenedetect.detectors import AdaptiveDetector

from pipelines.curation.config import ShotConfig
from pipelines.video import VideoInfo, VideoLimits, iter_frames

_THUMB = (48, 32)
_DISSOLVE_SECONDS = (0.25, 0.4, 0.6)
_DISSOLVE_CORRELATION = 0.4
_FLASH_SECONDS = 0.25
_SETTLE_SECONDS = 0.16

CutKind = Literal["cut", "fade", "dissolve"]


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A shot change: the earlier shot ends at `start`, the next begins at `end` (seconds)."""

    start: float
    end: float
    kind: CutKind


@dataclass(frozen=True, kw_only=True)
class ShotScan:
    """Shots as (start, end) in seconds, in order, and the changes between them."""

    shots: tuple[tuple[float, float], ...]
    cuts: tuple[Cut, ...]
    seconds: float


def find_shots(
    path: Path, info: VideoInfo, config: ShotConfig, limits: VideoLimits | None = None
) -> ShotScan:
    """The shots of a video file.

    Raises:
        VideoError: the file stops decoding.
    """
    fps = min(info.fps, config.fps)
    frames = iter_frames(path, fps=fps, max_side=config.side, limits=limits, exact=False)
    return scan_frames(frames, fps, config)


def scan_frames(frames: Iterable[np.ndarray], fps: float, config: ShotConfig) -> ShotScan:
    """The shots of a run of small RGB frames (H, W, 3) at the constant rate `fps`."""
    scanner = ShotScanner(fps, config)
    for frame in frames:
        scanner.add(frame)
    return scanner.finish()


class _Detector(AdaptiveDetector):
    """PySceneDetect's detector on RGB frames, with its own score from one call of OpenCV."""

    _before: np.ndarray | None = None

    def _calculate_frame_score(self, timecode: FrameTimecode, frame_img: np.ndarray) -> float:
        """The mean difference of hue, saturation and value to the frame before, of equal weight."""
        before, self._before = self._before, cv2.cvtColor(frame_img, cv2.COLOR_RGB2HSV)
        if before is None:
            return 0.0
        return cv2.norm(self._before, before, cv2.NORM_L1) / self._before.size


@dataclass(frozen=True)
class _Thumb:
    """A frame at 48 x 32 in grey: its levels, and how they deviate from their mean."""

    levels: np.ndarray
    deviation: np.ndarray
    energy: float


class ShotScanner:
    """Takes small RGB frames one by one; holds a second of them, the rest is numbers a frame."""

    def __init__(self, fps: float, config: ShotConfig) -> None:
        self.fps = fps
        self.config = config
        self.lags = sorted({max(2, round(seconds * fps)) for seconds in _DISSOLVE_SECONDS})
        self.settle = max(1, round(_SETTLE_SECONDS * fps))
        self.detector = _Detector(
            adaptive_threshold=config.adaptive_threshold,
            min_scene_len=1,
            min_content_val=config.min_content,
        )
        self.count = 0
        self.recent: deque[np.ndarray] = deque(maxlen=2 * self.lags[-1] + 1)
        self.thumbs: deque[_Thumb] = deque(maxlen=2 * self.lags[-1] + 1)
        self.empty: list[bool] = []
        self.before_empty: np.ndarray | None = None
        self.proposed: list[int] = []
        self.hard: list[int] = []
        self.fades: list[tuple[int, int]] = []
        self.dissolves: list[tuple[float, int, int]] = []

    @property
    def shot_start(self) -> int:
        """The frame that the shot began with, as far as cuts and fades are known by now."""
        return max(self.hard[-1] if self.hard else 0, self.fades[-1][1] if self.fades else 0)

    def add(self, frame: np.ndarray) -> None:
        """Take the next frame."""
        small = cv2.resize(_grey(frame), _THUMB, interpolation=cv2.INTER_AREA)
        mean, spread = cv2.meanStdDev(small)
        levels = small.astype(np.float32).ravel()
        deviation = levels - np.float32(mean[0, 0])
        self.recent.append(frame)
        self.thumbs.append(_Thumb(levels, deviation, float(deviation @ deviation)))
        self._follow_fade(frame, bool(spread[0, 0] < self.config.uniform_spread))
        found = self.detector.process_frame(FrameTimecode(self.count, float(self.fps)), frame)
        self.proposed += [timecode.frame_num for timecode in found]
        self.count += 1
        if self.proposed:
            self._judge_proposals(self.settle)
        self._look_for_dissolve()

    def finish(self) -> ShotScan:
        """The shots, once the last frame is in."""
        self._judge_proposals(0)
        changes = [(frame, frame, "cut") for frame in self.hard]
        changes += [(start, end, "fade") for start, end in self.fades]
        changes += [(start, end, "dissolve") for start, end in self._merged_dissolves()]
        changes.sort()
        first, last = self._content()
        cuts = tuple(
            Cut(start=start / self.fps, end=end / self.fps, kind=kind)  # type: ignore[arg-type]
            for start, end, kind in changes
        )
        starts = [first, *(end for _, end, _ in changes)]
        ends = [*(start for start, _, _ in changes), last]
        shots = tuple(
            (start / self.fps, end / self.fps)
            for start, end in zip(starts, ends, strict=True)
            if end > start
        )
        return ShotScan(shots=shots, cuts=cuts, seconds=self.count / self.fps)

    def _content(self) -> tuple[int, int]:
        """The frames between the empty ones at both ends; all frames where none shows anything."""
        shown = [index for index, empty in enumerate(self.empty) if not empty]
        return (shown[0], shown[-1] + 1) if shown else (0, self.count)

    def _follow_fade(self, frame: np.ndarray, empty: bool) -> None:
        if empty and self.empty and not self.empty[-1]:
            self.before_empty = self.recent[-2]
        if not empty and self.empty and self.empty[-1] and self.before_empty is not None:
            start = len(self.empty)
            while self.empty[start - 1]:
                start -= 1
            long = len(self.empty) - start >= _FLASH_SECONDS * self.fps
            if long or not _same_scene(self.before_empty, frame, self.config):
                self.fades.append((start, len(self.empty)))
        self.empty.append(empty)

    def _judge_proposals(self, settle: int) -> None:
        """Decide on the proposals after which `settle` frames have come in."""
        ready = [cut for cut in self.proposed if cut + settle < self.count]
        self.proposed = [cut for cut in self.proposed if cut + settle >= self.count]
        for cut in ready:
            around = self.empty[max(0, cut - 1) : cut + 1]
            if any(around):
                continue  # the edge of a fade
            # A flash is over a few frames later, and was not there a few before; a cut stays.
            before = (cut - 1, max(0, cut - 1 - settle))
            after = (cut, min(cut + settle, self.count - 1))
            pairs = ((self._frame(one), self._frame(two)) for one in before for two in after)
            if not any(_same_scene(one, two, self.config) for one, two in pairs):
                self.hard.append(cut)

    def _frame(self, index: int) -> np.ndarray:
        return self.recent[max(0, index - self.count + len(self.recent))]

    def _look_for_dissolve(self) -> None:
        for lag in self.lags:
            if len(self.thumbs) < 2 * lag + 1:
                return
            if not _unlike(self.thumbs[-1 - 2 * lag], self.thumbs[-1]):
                continue
            window = [self.thumbs[-1 - 2 * lag + offset].levels for offset in _mix_offsets(lag)]
            residual = _mix_residual(window)
            if residual is None or residual > self.config.dissolve_residual:
                continue
            if not _same_scene(self.recent[-1 - 2 * lag], self.recent[-1], self.config):
                self.dissolves.append((residual, self.count - 1 - 2 * lag, self.count))

    def _merged_dissolves(self) -> list[tuple[int, int]]:
        """Overlapping finds as one, without those that hold a cut or a fade."""
        taken = [(frame, frame + 1) for frame in self.hard] + self.fades
        margin = self.lags[0]
        merged: list[tuple[int, int]] = []
        for _, start, end in sorted(self.dissolves):
            clear = all(end + margin <= low or start - margin >= high for low, high in taken)
            if clear and not any(self.empty[start:end]):
                taken.append((start, end))
                merged.append((start, end))
        return merged


def _mix_offsets(lag: int) -> tuple[int, ...]:
    return 0, lag // 2, lag, lag + lag // 2, 2 * lag


def _unlike(one: _Thumb, two: _Thumb) -> bool:
    """Whether two pictures show something, and have nothing in common."""
    norm = (one.energy * two.energy) ** 0.5
    if norm < 25.0 * len(one.levels):
        return False
    return float(one.deviation @ two.deviation) <= _DISSOLVE_CORRELATION * norm


def _mix_residual(window: list[np.ndarray]) -> float | None:
    """How far the inner pictures are from a mix of the outer two; None where it is no mix.

    A mix gets steadily more of the later picture.
    """
    first = window[0]
    step = window[-1] - first
    energy = float(step @ step)
    weights, residuals = [0.05], []
    for picture in window[1:-1]:
        offset = picture - first
        weight = float(np.clip(offset @ step / energy, 0.0, 1.0))
        rest = offset - weight * step
        weights.append(weight)
        residuals.append(float(np.sqrt(rest @ rest / energy)))
    steady = all(a < b for a, b in zip(weights, [*weights[1:], 0.95], strict=True))
    return max(residuals) if steady else None


def _same_scene(before: np.ndarray, after: np.ndarray, config: ShotConfig) -> bool:
    """Whether two RGB frames show one scene: points survive tracking, colours stay."""
    if _colour_overlap(before, after) < config.same_colours:
        return False
    share = _tracked_share(_grey(before), _grey(after))
    if share is None:  # too plain to track: the picture as a whole decides
        one, two = (
            cv2.resize(_grey(f), _THUMB, interpolation=cv2.INTER_AREA) for f in (before, after)
        )
        return float(np.abs(one.astype(np.float32) - two).mean()) < config.min_content
    return share >= config.same_share


def _tracked_share(before: np.ndarray, after: np.ndarray) -> float | None:
    """Share of corner points that track there and back within 0.7 pixels; None for plain frames."""
    points = cv2.goodFeaturesToTrack(before, 150, 0.01, 4)
    if points is None or len(points) < 8:
        return None
    options = {"winSize": (15, 15), "maxLevel": 3}
    moved, there, _ = cv2.calcOpticalFlowPyrLK(before, after, points, None, **options)  # type: ignore[call-overload]
    back, home, _ = cv2.calcOpticalFlowPyrLK(after, before, moved, None, **options)  # type: ignore[call-overload]
    error = np.linalg.norm((points - back).reshape(-1, 2), axis=1)
    return float(((there.ravel() > 0) & (home.ravel() > 0) & (error < 0.7)).mean())


def _colour_overlap(before: np.ndarray, after: np.ndarray) -> float:
    """Intersection of the two 8x8x8 RGB histograms, blurred a little: 1 = the same colours."""
    histograms = []
    for frame in (before, after):
        counts = cv2.calcHist([frame], [0, 1, 2], None, [8, 8, 8], [0, 256, 0, 256, 0, 256])
        for _ in range(3):
            # Along the last axis, which then becomes the first: all three in turn.
            padded = np.pad(counts, [(0, 0), (0, 0), (1, 1)], "edge")
            blurred = np.mean([padded[..., k : k + 8] for k in range(3)], axis=0)
            counts = np.moveaxis(blurred, -1, 0)
        histograms.append(counts / counts.sum())
    return float(np.minimum(*histograms).sum())


def _grey(frame: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
