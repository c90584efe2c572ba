"""How much the camera moves, and how: points of the background and the models that explain them.

A backend follows points outside the people between frames a fixed time apart; a robust model of
each pair of frames says how far the picture goes (`pipelines.camera_path`). The motion of a clip is
the median over pairs, so neither a moving thing in the background nor a cut decides it. Lengths are
% of the frame's longer side. Real clips of a fixed camera measure below 0.3 a second, hand-held and
panning ones above 4.

T frames, P people, M points
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import numpy as np

from pipelines.camera_flow import FlowBackend
from pipelines.camera_footage import Footage
from pipelines.camera_path import PairMotion, fit_pair, motion_kind, shake_percent
from pipelines.schema import Scores

__all__ = [
    "CameraBackend",
    "CameraError",
    "CameraMotion",
    "FlowBackend",
    "camera_motion",
    "measure_camera",
    "open_camera_backend",
]

SPAN_SECONDS = 0.5
FEW_PAIRS = 12
MAX_PAIRS = 20
RUN_PAIRS = 4
# Followed worse than this, pairs of neighbouring frames are tried as well.
SURE_TRACKS = 20
SURE_SHARE = 0.6
NEAR_PAIRS = 12
PEAK_QUANTILE = 0.8
# As the thresholds of curation are by default; those judge the scores, these name the kind.
STILL_PERCENT = 3.0
STILL_PEAK_PERCENT = 6.0
MIN_TRACKED_SHARE = 0.2
MIN_BACKGROUND = 0.01


class CameraError(ValueError):
    """A camera backend that cannot be opened; the message says how to mend it."""


class CameraBackend(Protocol):
    """What follows the points of the background.

    needs_models: whether it runs a network, so belongs to the process that holds the models.
    """

    name: str
    licence: str
    reason: str
    needs_models: bool

    def describe(self) -> dict[str, Any]:
        """Name, licence and settings, for the records."""
        ...

    def follow(
        self, footage: Footage, pairs: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Background points (M, 2) of the first frame of each pair, and where the second has them.

        In pixels of the footage's work size; points that cannot be followed are left out. `pairs`
        are in the order of their first frames.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class CameraMotion:
    """Motion of the camera over a clip.

    percent_per_second: median displacement of the picture, % of the long side a second.
    peak_percent_per_second: what a fifth of the pairs of frames exceed; those that no
        model explains count as still.
    residual_percent: median distance of the background points from the model, % of it.
    num_tracks: background points a pair of frames, median; few make the rest uncertain.
    tracked_share: share of the pairs of frames that a model explains.
    pan_percent_per_second: median shift of the picture's centre.
    zoom_percent_per_second: median change of scale (100 times its logarithm), whichever way.
    roll_degrees_per_second: median turn about the line of sight, whichever way.
    shake_percent: how far the path jitters about its smooth course, % of the long side.
    background_variance: of a background pixel's colour over half a second, once aligned (grey
        levels squared): about 1 where only noise changes, tens for water, crowds and screens.
    kind: static, pan, zoom, roll, shake, moving (nothing in particular), unknown (too few pairs).
    """

    percent_per_second: float
    peak_percent_per_second: float
    residual_percent: float
    num_tracks: int
    tracked_share: float
    pan_percent_per_second: float
    zoom_percent_per_second: float
    roll_degrees_per_second: float
    shake_percent: float
    background_variance: float
    kind: str


def open_camera_backend(choice: str = "auto") -> CameraBackend:
    """The backend for `auto` (CoTracker where it is present, else flow), `flow` or `cotracker`.

    Raises CameraError for an unknown choice or a network that is not there.
    """
    if choice == "flow":
        return FlowBackend()
    if choice not in ("auto", "cotracker"):
        raise CameraError(f"camera backend {choice!r}; expected auto, flow or cotracker")
    # Loaded where it is used: optical flow needs no network runtime.
    from pipelines.cotracker import CoTrackerBackend, missing_part

    missing = missing_part()
    if missing is None:
        reason = "present, and the surer of the two" if choice == "auto" else "asked for"
        return CoTrackerBackend.open(reason=reason)
    if choice == "cotracker":
        raise CameraError(missing)
    return FlowBackend("CoTracker is not present")


def measure_camera(
    frames: Sequence[np.ndarray],
    fps: float,
    person_boxes: np.ndarray | None,
    backend: CameraBackend,
) -> Scores:
    """Every score of the camera over a shot; arguments and errors as of `camera_motion`."""
    motion = camera_motion(frames, fps, person_boxes, backend)
    return {
        "camera_percent_per_second": motion.percent_per_second,
        "camera_peak_percent_per_second": motion.peak_percent_per_second,
        "camera_residual_percent": motion.residual_percent,
        "camera_tracks": motion.num_tracks,
        "camera_tracked_share": motion.tracked_share,
        "camera_pan_percent_per_second": motion.pan_percent_per_second,
        "camera_zoom_percent_per_second": motion.zoom_percent_per_second,
        "camera_roll_degrees_per_second": motion.roll_degrees_per_second,
        "camera_shake_percent": motion.shake_percent,
        "camera_background_variance": motion.background_variance,
        "camera_kind": motion.kind,
        "camera_backend": backend.name,
    }


def camera_motion(
    frames: Sequence[np.ndarray],
    fps: float,
    person_boxes: np.ndarray | None = None,
    backend: CameraBackend | None = None,
) -> CameraMotion:
    """Motion of the camera over uint8 RGB frames (H, W, 3) of one shot at `fps`.

    `person_boxes` (T, P, 4) xyxy in 0..1 are left out, with a margin; absent people are zeros.
    Where the picture has nothing to track (a plain wall, a fade), the motion is 0 and
    `tracked_share` says so.

    Raises:
        ValueError: no rate, or boxes of another number of frames.
    """
    if fps <= 0:
        raise ValueError(f"fps is {fps}, expected the frames' rate")
    if person_boxes is not None and len(person_boxes) != len(frames):
        raise ValueError(f"{len(person_boxes)} frames of boxes for {len(frames)} frames")
    backend = backend or FlowBackend()
    step = min(max(1, round(SPAN_SECONDS * fps)), max(1, len(frames) - 1))
    motion = _measure(frames, fps, person_boxes, backend, step)
    if step > 1 and (motion.num_tracks < SURE_TRACKS or motion.tracked_share < SURE_SHARE):
        # What moves fast is out of the picture, or of sight, in half a second.
        near = _measure(frames, fps, person_boxes, backend, 1, NEAR_PAIRS)
        motion = max(motion, near, key=lambda found: found.num_tracks * found.tracked_share)
    return motion


def _measure(
    frames: Sequence[np.ndarray],
    fps: float,
    person_boxes: np.ndarray | None,
    backend: CameraBackend,
    step: int,
    most: int | None = None,
) -> CameraMotion:
    """Motion by pairs of frames `step` apart, at most `most` of them."""
    pairs = _choose_pairs(len(frames), step, most or MAX_PAIRS)
    fitted: list[PairMotion] = []
    counts: list[int] = []
    changes: list[float] = []
    footage = Footage(frames, fps, person_boxes) if pairs else None
    if footage is not None:
        followed = backend.follow(footage, pairs)
        for (first, second), (points, there) in zip(pairs, followed, strict=True):
            counts.append(len(points))
            motion = fit_pair(
                points,
                there,
                first=first,
                second=second,
                seconds=(second - first) / fps,
                size=footage.size,
            )
            if motion is not None:
                fitted.append(motion)
                change = _background_change(footage, motion)
                changes += [] if change is None else [change]
            footage.forget(before=first)
    return _summary(fitted, counts, changes, footage)


def _summary(
    fitted: list[PairMotion], counts: list[int], changes: list[float], footage: Footage | None
) -> CameraMotion:
    rates = [pair.percent / pair.seconds for pair in fitted]
    tracked = len(fitted) / max(1, len(counts))
    median = _median(rates)
    # What cannot be followed well is seldom the background: it must not decide for the few.
    known = [*rates, *[0.0] * (len(counts) - len(rates))]
    peak = float(np.quantile(known, PEAK_QUANTILE)) if known else 0.0
    shake = shake_percent(fitted)
    if footage is None or not fitted or tracked < MIN_TRACKED_SHARE:
        kind = "unknown"
    elif median <= STILL_PERCENT and peak <= STILL_PEAK_PERCENT:
        kind = "static"
    else:
        moving = [pair for pair in fitted if pair.percent / pair.seconds > STILL_PERCENT]
        kind = motion_kind(moving, footage.size, shake)
    return CameraMotion(
        percent_per_second=median,
        peak_percent_per_second=peak,
        residual_percent=_median([pair.residual_percent for pair in fitted]),
        num_tracks=int(_median(counts)),
        tracked_share=tracked,
        pan_percent_per_second=_median(
            [float(np.linalg.norm(pair.shift)) / pair.seconds for pair in fitted]
        ),
        zoom_percent_per_second=_median(
            [100 * abs(pair.log_scale) / pair.seconds for pair in fitted]
        ),
        roll_degrees_per_second=_median([abs(pair.turn) / pair.seconds for pair in fitted]),
        shake_percent=shake,
        background_variance=_median(changes),
        kind=kind,
    )


def _median(values: Sequence[float]) -> float:
    return float(np.median(values)) if len(values) else 0.0


def _choose_pairs(num_frames: int, step: int, most: int) -> list[tuple[int, int]]:
    """Pairs of frames `step` apart: all of a short shot; of a longer one such that the next
    begins where one ends; of a long one runs of these, spread over it.
    """
    stride = 1 if num_frames - step <= FEW_PAIRS else step
    starts = np.arange(0, num_frames - step, stride)
    if len(starts) > most:
        runs = np.linspace(0, len(starts) - RUN_PAIRS, most // RUN_PAIRS).round().astype(int)
        starts = starts[np.unique(runs[:, None] + np.arange(RUN_PAIRS))]
    return [(int(start), int(start) + step) for start in starts]


def _background_change(footage: Footage, motion: PairMotion) -> float | None:
    """Variance between the background of two aligned frames; None where hardly any is in both."""
    one, two = footage.colour(motion.first), footage.colour(motion.second)
    size = (one.shape[1], one.shape[0])
    shrink = np.diag([size[0] / footage.size[0], size[1] / footage.size[1], 1.0])
    matrix = shrink @ motion.matrix @ np.linalg.inv(shrink)
    mask = footage.background(motion.first, motion.second, size)
    shared = (cv2.warpPerspective(mask, matrix, size) == 255) & (mask > 0)
    if shared.mean() < MIN_BACKGROUND:
        return None
    moved = cv2.warpPerspective(one, matrix, size)
    # Half the mean square of the difference of two samples is their variance.
    return float((cv2.absdiff(moved, two)[shared].astype(np.float64) ** 2).mean() / 2)
