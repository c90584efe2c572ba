"""What a long video shows of having been made in windows: seams, and drift of colour.

Frames are looked at once, in order, while they are written; a few numbers a frame are kept.

Shapes: T frames, H W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

GOAL = 1.1  # seam score up to which a seam is no more than motion
COLOUR_LIMIT = 16.0  # grey levels of 255
Spans = Sequence[Sequence[int]]


def seams_of(num_frames: int, spans: Spans) -> tuple[list[int], list[int]]:
    """Pairs of neighbouring frames (t, t + 1), as t: where windows meet, and within one alone.

    A seam is every pair that is not seen by one and the same window only, so the whole of an
    overlap: that is where the picture passes from one window to the next. Where windows overlap so
    far that no pair belongs to one alone, both are empty.
    """
    covers: list[list[int]] = [[] for _ in range(num_frames)]
    for number, span in enumerate(spans):
        for frame in span:
            covers[frame].append(number)
    pairs = range(num_frames - 1)
    inside = [t for t in pairs if covers[t] == covers[t + 1] and len(covers[t]) == 1]
    chosen = set(inside)
    return ([t for t in pairs if t not in chosen], inside) if inside else ([], [])


def pose_motion(keypoints: np.ndarray, score: np.ndarray, threshold: float) -> np.ndarray:
    """How far the main person's joints move from frame to frame, on average; `(T - 1,)`.

    Args:
        keypoints: `(T, P, K, 2)`, the main person first.
        score: `(T, P, K)`; joints below `threshold` are not seen and do not count.
    """
    if not keypoints.shape[1]:
        return np.zeros(max(len(keypoints) - 1, 0))
    seen = score[:, 0] >= threshold
    both = (seen[1:] & seen[:-1]).astype(np.float64)
    moved = np.linalg.norm(np.diff(keypoints[:, 0], axis=0), axis=-1)
    return (np.where(both > 0, moved, 0)).sum(-1) / np.maximum(both.sum(-1), 1)


@dataclass(frozen=True, kw_only=True)
class SeamScore:
    """Differences of neighbouring frames, in grey levels of 255."""

    seams: int  # pairs
    at_seams: float
    inside: float

    @property
    def ratio(self) -> float:
        """The seam score: 1 where frames at seams differ as much as frames inside of windows."""
        return self.at_seams / self.inside if self.inside > 0 else float(self.at_seams == 0)

    @classmethod
    def of(cls, differences: np.ndarray, spans: Spans) -> "SeamScore | None":
        """The score of windows that lie as `spans` say; None where there is nothing to compare.

        Args:
            differences: of neighbouring frames, `(T - 1,)`.
        """
        seams, inside = seams_of(len(differences) + 1, spans)
        if not seams or not inside:
            return None
        return cls(
            seams=len(seams),
            at_seams=float(differences[seams].mean()),
            inside=float(differences[inside].mean()),
        )


class SeamMeter:
    """Looks at the frames of a video as they are written.

    Args:
        windows: the frames of each window of the last step, in which details are settled.
        decoded: first and last + 1 frame of what was decoded together.
        motion: how much the person moves from frame to frame, `(T - 1,)`: a seam that lies in a
            quick movement is no worse for it.
    """

    def __init__(
        self,
        windows: Spans,
        decoded: Sequence[tuple[int, int]] = (),
        *,
        motion: np.ndarray | None = None,
    ):
        self._layouts: dict[str, Spans] = {"sampling": windows}
        if len(decoded) > 1:
            self._layouts["decoding"] = [range(start, stop) for start, stop in decoded]
        self._windows = list(windows)
        self._motion = motion
        self._differences: list[float] = []
        self._colours: list[np.ndarray] = []
        self._last: np.ndarray | None = None

    def add(self, frame: np.ndarray) -> np.ndarray:
        """Look at the next frame, uint8 RGB `(H, W, 3)`; returns it."""
        if self._last is not None:
            apart = np.maximum(frame, self._last) - np.minimum(frame, self._last)
            self._differences.append(float(apart.mean()))
        self._last = frame
        self._colours.append(frame.reshape(-1, 3).mean(0))
        return frame

    def record(self) -> dict[str, Any]:
        """For the JSON beside a video; empty for a video of one window.

        `sampling` and `decoding` are the seam scores of the windows of either: `score` is
        `at_seams` over `inside`, and `motion` the same ratio of how much the person moves, so what
        to expect where there are no seams. `colour_drift` is the largest difference of a window's
        mean colour to the first window's.
        """
        scores = {name: row for name, spans in self._layouts.items() if (row := self._row(spans))}
        if len(self._windows) < 2 and not scores:
            return {}
        record = {"windows": len(self._windows), **scores}
        record["colour_drift"] = round(self._colour_drift(), 3)
        return record

    def _row(self, spans: Spans) -> dict[str, float]:
        score = SeamScore.of(np.array(self._differences), spans)
        if score is None:
            return {}
        row: dict[str, float] = {
            "score": round(score.ratio, 4),
            "at_seams": round(score.at_seams, 4),
            "inside": round(score.inside, 4),
            "seams": score.seams,
        }
        moved = None if self._motion is None else SeamScore.of(self._motion, spans)
        if moved is not None and moved.inside > 0:
            row["motion"] = round(moved.ratio, 4)
        return row

    def warnings(self) -> list[str]:
        """What is worth saying of the video, for its record."""
        record, found = self.record(), []
        for name in self._layouts:
            row = record.get(name, {})
            if row.get("score", 0.0) > GOAL * max(1.0, row.get("motion", 1.0)):
                found.append(
                    f"frames differ {row['score']:.2f} times as much where the windows of {name} "
                    f"meet as within them (up to {GOAL} is no more than motion): a larger "
                    "windows.overlap makes seams of sampling softer"
                )
        if record.get("colour_drift", 0.0) > COLOUR_LIMIT:
            found.append(
                f"colours drift by up to {record['colour_drift']:.0f} of 255 levels over the video"
            )
        return found

    def _colour_drift(self) -> float:
        colours = np.array(self._colours)
        means = np.array([colours[list(span)].mean(0) for span in self._windows])
        return float(np.abs(means - means[:1]).max()) if len(means) else 0.0
