"""The camera's path: what moves between two frames, and what kind of motion many pairs make.

A robust homography explains the points that were followed between two frames, a similarity where
they are too few for one. The similarity that is nearest to the model over the points it explains
splits the motion into a shift of the picture's centre, a change of scale and a turn.
Lengths are % of the frame's longer side.

M points
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

MIN_POINTS = 8
MIN_HOMOGRAPHY_POINTS = 40
MIN_INLIERS = 0.4
REPROJECTION = 2.0  # pixels of the work size


@dataclass(frozen=True, kw_only=True, eq=False)
class PairMotion:
    """Motion between two frames `seconds` apart.

    matrix: (3, 3) from pixels of the first frame to those of the second, at the work size.
    percent: median distance that the explained points go.
    residual_percent: median distance of all points from the model.
    shift: (2,) of the picture's centre; log_scale: above 0 the picture grows; turn: degrees.
    """

    first: int
    second: int
    seconds: float
    matrix: np.ndarray
    percent: float
    residual_percent: float
    shift: np.ndarray
    log_scale: float
    turn: float


def fit_pair(
    points: np.ndarray,
    there: np.ndarray,
    *,
    first: int,
    second: int,
    seconds: float,
    size: tuple[int, int],
) -> PairMotion | None:
    """The motion that most of the points (M, 2) agree on; None where there is none.

    Args:
        points, there: pixels of two frames of `size` (width, height).
    """
    model = _robust(points, there)
    if model is None:
        return None
    matrix, inliers = model
    placed = cv2.perspectiveTransform(points[None].astype(np.float64), matrix)[0]
    if not np.isfinite(placed[inliers]).all():
        return None
    percent = 100 / max(size)
    distance = np.linalg.norm(placed - points, axis=1)[inliers]
    missed = np.linalg.norm(placed - there, axis=1)
    centre = (np.array(size) - 1) / 2
    factor, shift = _similarity(points[inliers] - centre, placed[inliers] - centre)
    if factor == 0 or not np.isfinite(factor):
        return None
    return PairMotion(
        first=first,
        second=second,
        seconds=seconds,
        matrix=matrix,
        percent=float(np.median(distance) * percent),
        residual_percent=float(np.median(missed) * percent),
        shift=shift * percent,
        log_scale=float(np.log(abs(factor))),
        turn=float(np.degrees(np.angle(factor))),
    )


def _robust(points: np.ndarray, there: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Matrix (3, 3) and which points (M,) it explains."""
    if len(points) < MIN_POINTS:
        return None
    cv2.setRNGSeed(0)
    if len(points) < MIN_HOMOGRAPHY_POINTS:
        # Eight unknowns from a handful of points in one corner say nothing of the rest.
        affine, inliers = cv2.estimateAffinePartial2D(
            points, there, method=cv2.RANSAC, ransacReprojThreshold=REPROJECTION
        )
        matrix = None if affine is None else np.vstack([affine, [0, 0, 1]])
    else:
        matrix, inliers = cv2.findHomography(points, there, cv2.USAC_MAGSAC, REPROJECTION)
    if matrix is None or inliers is None or inliers.mean() < MIN_INLIERS:
        return None
    return matrix, inliers.ravel() > 0


def _similarity(points: np.ndarray, there: np.ndarray) -> tuple[complex, np.ndarray]:
    """Least-squares scale and turn as one complex factor, and where the origin goes (2,)."""
    one, two = points[:, 0] + 1j * points[:, 1], there[:, 0] + 1j * there[:, 1]
    spread = one - one.mean()
    power = float((np.abs(spread) ** 2).sum())
    factor = complex((spread.conj() * (two - two.mean())).sum() / power) if power else 1 + 0j
    origin = complex(two.mean() - factor * one.mean())
    return factor, np.array([origin.real, origin.imag])


def shake_percent(pairs: Sequence[PairMotion]) -> float:
    """How far the path jitters about its smooth course: the median distance of its points from the
    middle between the points before and after, a pair's time apart.

    For jitter without memory this is its root mean square; an even pan has none.
    """
    after = {pair.first: pair for pair in pairs}
    bends = [
        np.linalg.norm(after[pair.second].shift - pair.shift) / 2
        for pair in pairs
        if pair.second in after and np.isclose(after[pair.second].seconds, pair.seconds)
    ]
    return float(np.median(bends)) if bends else 0.0


def motion_kind(pairs: Sequence[PairMotion], size: tuple[int, int], shake: float) -> str:
    """What moves the picture most in pairs of frames with motion: pan, zoom, roll, shake; `moving`
    where it is nothing in particular.

    `size` is (width, height), in any unit; `shake` that of `shake_percent`.
    """
    # The mean distance of a frame's points from its centre is about .27 of its diagonal.
    radius = 27 * float(np.hypot(*size)) / max(size)
    shift = np.median([np.linalg.norm(pair.shift) for pair in pairs])
    zoom = np.median([abs(pair.log_scale) for pair in pairs]) * radius
    roll = np.median([abs(np.radians(pair.turn)) for pair in pairs]) * radius
    if shake > 0.5 * max(shift, zoom, roll):
        return "shake"
    ranked = sorted([(shift, "pan"), (zoom, "zoom"), (roll, "roll")], reverse=True)
    return ranked[0][1] if ranked[0][0] > 1.5 * ranked[1][0] else "moving"
