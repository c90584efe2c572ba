"""People's keypoints over the frames of a clip: the protocol of a backend, and tracks.

Keypoints are in 0..1 of the frame with a score in 0..1, 0 where missing; boxes are xyxy in 0..1.
All people of a clip have the body's 18, or 128 with hands and face (`animator.keypoints`); the body
alone says who is seen and where. A clip's people are ordered by how much of the picture they fill
for how long. Scores of different networks mean different things: every backend rescales its own so
that VISIBLE divides the joints worth using from the others.

T frames, P people, K keypoints (18 or 128)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from animator.keypoints import BODY, NUM_KEYPOINTS, VISIBLE

MAX_PEOPLE = 16
MIN_OVERLAP = 0.2
MAX_GAP = 8
# Somebody fast may leave the box of the last frame, but not by more than its size, and the
# direction taken holds for a few frames.
MAX_STEP = 0.8
MAX_STRIDE = 2
MAX_GROWTH = 1.5
SAME_PLACE = 0.4
EDGE = 0.02


class PoseError(ValueError):
    """Keypoints or a pose model that cannot be used; the message says how to mend it."""


@dataclass(frozen=True, kw_only=True)
class PoseTrack:
    """Keypoints (T, P, K, 2), score (T, P, K) and boxes (T, P, 4); absent people are zeros.

    A joint scored below VISIBLE is missing; `backend` says who found the keypoints.
    """

    keypoints: np.ndarray
    score: np.ndarray
    boxes: np.ndarray
    backend: str = ""

    @property
    def num_people(self) -> int:
        """P, the number of tracks."""
        return self.keypoints.shape[1]

    def main(self, person: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Keypoints (T, K, 2) and score (T, K) of one person, zeros where there is none."""
        if person < self.num_people:
            return self.keypoints[:, person], self.score[:, person]
        frames, _, count = self.score.shape
        return np.zeros((frames, count, 2), np.float32), np.zeros((frames, count), np.float32)

    def missing_share(self, threshold: float = VISIBLE, person: int = 0) -> float:
        """Share of one person's body over all frames that is missing; 1 without a person."""
        score = self.main(person)[1][:, BODY]
        return float((score < threshold).mean()) if score.size else 1.0

    @staticmethod
    def empty(frames: int, backend: str = "") -> "PoseTrack":
        """A track of no people."""
        return PoseTrack(
            keypoints=np.zeros((frames, 0, NUM_KEYPOINTS, 2), np.float32),
            score=np.zeros((frames, 0, NUM_KEYPOINTS), np.float32),
            boxes=np.zeros((frames, 0, 4), np.float32),
            backend=backend,
        )


@dataclass(frozen=True, kw_only=True)
class Person:
    """One person in one frame: keypoints (K, 2), score (K,), box (4,)."""

    keypoints: np.ndarray
    score: np.ndarray
    box: np.ndarray


class PoseBackend(Protocol):
    """What the rooms use of a pose model."""

    name: str
    licence: str
    reason: str
    threshold: float

    def track(
        self,
        frames: Sequence[np.ndarray],
        *,
        source: Path | None = None,
        times: np.ndarray | None = None,
        rate: float | None = None,
    ) -> PoseTrack:
        """People over the uint8 RGB frames of one clip.

        `source` is the file that the frames come from, `times` their seconds in it,
        `rate` its frames a second, where they are known: it is then not opened for them.
        """
        ...


def box_overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two xyxy boxes."""
    low, high = np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])
    shared = float(np.prod(np.maximum(high - low, 0)))
    total = float(np.prod(one[2:] - one[:2]) + np.prod(other[2:] - other[:2])) - shared
    return shared / total if total > 0 else 0.0


Row = dict[int, Person]
"""One person over a clip, by frame."""


def link_people(frames: Sequence[Sequence[Person]], *, backend: str = "") -> PoseTrack:
    """Tracks from the people of each frame.

    A person is looked for where the last steps lead, by greatest box overlap first, then nearby,
    and may be lost for MAX_GAP frames; whoever is found again later at the same place, or comes
    back over the edge of the frame that he left by, is the same. Tracks are ordered by visible area
    times duration, and the first MAX_PEOPLE are kept.
    """
    rows: list[Row] = []
    for index, people in enumerate(frames):
        pairs = [
            (_unlikeness(row, index, person.box), number, who)
            for number, row in enumerate(rows)
            for who, person in enumerate(people)
            if index - max(row) <= MAX_GAP
        ]
        taken = _first_come([pair for pair in pairs if pair[0] < np.inf])
        for number, who in taken.items():
            rows[number][index] = people[who]
        rows += [{index: people[who]} for who in range(len(people)) if who not in taken.values()]
    rows = _rejoin(rows)
    rows.sort(key=lambda row: -sum(_area(person.box) for person in row.values()))
    return _stack(rows[:MAX_PEOPLE], len(frames), backend)


def _first_come(pairs: Sequence[tuple[float, int, int]]) -> dict[int, int]:
    """One-to-one pairs (first → second number) out of (cost, first, second), cheapest first."""
    taken: dict[int, int] = {}
    for _, one, two in sorted(pairs):
        if one not in taken and two not in taken.values():
            taken[one] = two
    return taken


def _unlikeness(row: Row, index: int, box: np.ndarray) -> float:
    """Cost of taking `box` for the next of a row; infinite where it cannot be."""
    *earlier, last = sorted(row)[-2:]
    here, steps = row[last].box, index - last
    expected = here
    if earlier and last - earlier[0] <= MAX_STRIDE and steps <= MAX_STRIDE:
        expected = here + (_centre(here) - _centre(row[earlier[0]].box)) * steps / (
            last - earlier[0]
        )
    overlap = max(box_overlap(expected, box), box_overlap(here, box))
    if overlap >= MIN_OVERLAP:
        return 1 - overlap
    size = (box[2:] - box[:2] + here[2:] - here[:2]) / 2
    moved = np.abs(_centre(box) - _centre(expected))[:2] / np.maximum(size, 1e-6)
    near = steps == 1 and moved.max() <= MAX_STEP and _same_height(box, here)
    return 1 + float(moved.max()) if near else np.inf


def _rejoin(rows: Sequence[Row]) -> list[Row]:
    """Rows where one that begins after another ended continues it, if it looks like it.

    The pause may last no longer than the two were seen: of somebody hardly seen nothing is known.
    """
    joined: list[Row] = []
    for row in sorted(rows, key=min):
        first = min(row)
        pairs = [
            (_return_cost(other, row), number, 0)
            for number, other in enumerate(joined)
            if max(other) < first and first - max(other) <= len(row) + len(other)
        ]
        pairs = sorted(pair for pair in pairs if pair[0] < np.inf)
        # Over an edge, whoever is not the only one who left by it is anybody.
        if pairs and (pairs[0][0] < 1 or len(pairs) == 1):
            joined[pairs[0][1]].update(row)
        else:
            joined.append(dict(row))
    return joined


def _return_cost(left: Row, back: Row) -> float:
    """Below 1 for the same place, 1 for the same edge of the frame, else infinite."""
    before, after = left[max(left)].box, back[min(back)].box
    overlap = box_overlap(before, after)
    if overlap >= SAME_PLACE:
        return 1 - overlap
    edges = [(box[:2] <= EDGE).tolist() + (box[2:] >= 1 - EDGE).tolist() for box in (before, after)]
    # Feet at the lower edge are no way out.
    sides = [bool(edges[0][side] and edges[1][side]) for side in (0, 2)]
    return 1.0 if any(sides) and _same_height(before, after) else np.inf


def _centre(box: np.ndarray) -> np.ndarray:
    """The middle of a box, twice, so that it moves one when added."""
    return np.tile((box[:2] + box[2:]) / 2, 2)


def _same_height(one: np.ndarray, other: np.ndarray) -> bool:
    heights = sorted((one[3] - one[1], other[3] - other[1]))
    return bool(heights[1] <= MAX_GROWTH * heights[0])


def _stack(rows: Sequence[Row], num_frames: int, backend: str) -> PoseTrack:
    if not rows:
        return PoseTrack.empty(num_frames, backend)
    shape = (num_frames, len(rows))
    count = len(next(iter(rows[0].values())).score)
    keypoints = np.zeros((*shape, count, 2), np.float32)
    score, boxes = np.zeros((*shape, count), np.float32), np.zeros((*shape, 4), np.float32)
    for number, row in enumerate(rows):
        for index, person in row.items():
            keypoints[index, number] = person.keypoints
            score[index, number] = person.score
            boxes[index, number] = person.box
    return PoseTrack(keypoints=keypoints, score=score, boxes=boxes, backend=backend)


def _area(box: np.ndarray) -> float:
    box = box.clip(0, 1)
    return float(np.prod(np.maximum(box[2:] - box[:2], 0)))


def boxes_around(keypoints: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Boxes (..., 4) around the visible joints of bodies (..., K, 2), a tenth wider; else zeros."""
    keypoints, score = keypoints[..., BODY, :], score[..., BODY]
    visible = (score >= VISIBLE)[..., None]
    low = np.where(visible, keypoints, np.inf).min(-2)
    high = np.where(visible, keypoints, -np.inf).max(-2)
    seen = np.any(visible, axis=-2)
    low, high = np.where(seen, low, 0), np.where(seen, high, 0)
    margin = 0.05 * (high - low)
    return np.concatenate([low - margin, high + margin], -1).clip(0, 1).astype(np.float32)


def calibrate(score: np.ndarray, threshold: float) -> np.ndarray:
    """Scores of a network rescaled, piecewise linearly, so that its `threshold` becomes VISIBLE."""
    if threshold == VISIBLE:
        return score
    return np.interp(score, [0, threshold, 1], [0, VISIBLE, 1]).astype(np.float32)


def without_outside(keypoints: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keypoints and scores where a joint outside the frame, or not finite, is missing."""
    finite = np.isfinite(keypoints).all(-1) & np.isfinite(score)
    inside = finite & ((keypoints >= 0) & (keypoints <= 1)).all(-1) & (score > 0)
    score = np.where(inside, np.where(finite, score, 0).clip(0, 1), 0)
    return np.where(inside[..., None], keypoints, 0).astype(np.float32), score.astype(np.float32)
