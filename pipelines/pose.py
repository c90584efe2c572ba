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
    ) -> PoseTrack:
        """People over the uint8 RGB frames of one clip.

        `source` is the file that the frames come from, `times` their seconds in it.
        """
        ...


def box_overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two xyxy boxes."""
    low, high = np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])
    shared = float(np.prod(np.maximum(high - low, 0)))
    total = float(np.prod(one[2:] - one[:2]) + np.prod(other[2:] - other[:2])) - shared
    return shared / total if total > 0 else 0.0


def link_people(frames: Sequence[Sequence[Person]], *, backend: str = "") -> PoseTrack:
    """Tracks from the people of each frame, by greatest box overlap first.

    A person may be lost for MAX_GAP frames. Tracks are ordered by visible area times duration, and
    the first MAX_PEOPLE are kept.
    """
    tracks: list[dict[int, Person]] = []
    for index, people in enumerate(frames):
        pairs = []
        for number, track in enumerate(tracks):
            last = max(track)
            if index - last <= MAX_GAP:
                pairs += [
                    (box_overlap(track[last].box, person.box), number, who)
                    for who, person in enumerate(people)
                ]
        free, unmatched = set(range(len(tracks))), set(range(len(people)))
        for overlap, number, who in sorted(pairs, key=lambda pair: (-pair[0], pair[1:])):
            if overlap >= MIN_OVERLAP and number in free and who in unmatched:
                tracks[number][index] = people[who]
                free.discard(number)
                unmatched.discard(who)
        tracks += [{index: people[who]} for who in sorted(unmatched)]
    tracks.sort(key=lambda track: -sum(_area(person.box) for person in track.values()))
    tracks = tracks[:MAX_PEOPLE]
    if not tracks:
        return PoseTrack.empty(len(frames), backend)
    shape = (len(frames), len(tracks))
    count = len(next(iter(tracks[0].values())).score)
    keypoints = np.zeros((*shape, count, 2), np.float32)
    score, boxes = np.zeros((*shape, count), np.float32), np.zeros((*shape, 4), np.float32)
    for number, track in enumerate(tracks):
        for index, person in track.items():
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
