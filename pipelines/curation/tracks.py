"""From what was seen in some frames to tracks over every frame of a clip.

T frames, P people, D embedding size
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from animator.keypoints import VISIBLE
from pipelines.faces import Face
from pipelines.pose import PoseTrack
from pipelines.schema import FaceTrack

_MIN_OVERLAP = 0.2


def strongest(track: PoseTrack, max_people: int) -> PoseTrack:
    """The first `max_people` of a track, which backends order by size and duration."""
    return replace(
        track,
        keypoints=track.keypoints[:, :max_people],
        score=track.score[:, :max_people],
        boxes=track.boxes[:, :max_people],
    )


def spread_keyframes(track: PoseTrack, keyframes: np.ndarray, num_frames: int) -> PoseTrack:
    """A track of `keyframes` as one of every frame.

    Joints seen at both neighbouring keyframes move in a straight line; others stay with the nearer.
    """
    if len(keyframes) == num_frames:
        return track
    frames = np.arange(num_frames)
    after = np.clip(np.searchsorted(keyframes, frames), 0, len(keyframes) - 1)
    before = np.clip(np.searchsorted(keyframes, frames, side="right") - 1, 0, None)
    gap = np.maximum(keyframes[after] - keyframes[before], 1)
    weight = ((frames - keyframes[before]) / gap).astype(np.float32)
    nearest = np.where(weight < 0.5, before, after)
    seen = track.score >= VISIBLE
    present = box_areas(track.boxes) > 0

    def spread(values: np.ndarray, known: np.ndarray) -> np.ndarray:
        share = weight.reshape(-1, *[1] * (values.ndim - 1))
        moved = values[before] * (1 - share) + values[after] * share
        both = known[before] & known[after]
        return np.where(both, moved, values[nearest]).astype(np.float32)

    return replace(
        track,
        keypoints=spread(track.keypoints, seen[..., None]),
        score=spread(track.score, seen),
        boxes=spread(track.boxes, present[..., None]),
    )


def match_boxes(boxes: np.ndarray, others: np.ndarray) -> dict[int, int]:
    """Pairs (index in `boxes` (A, 4) → index in `others` (B, 4)), greatest overlap first."""
    if not len(boxes) or not len(others):
        return {}
    overlaps = box_overlaps(boxes, others)
    pairs: dict[int, int] = {}
    while overlaps.max() >= _MIN_OVERLAP:
        one, two = np.unravel_index(int(overlaps.argmax()), overlaps.shape)
        pairs[int(one)] = int(two)
        overlaps[one, :] = overlaps[:, two] = 0
    return pairs


def box_areas(boxes: np.ndarray) -> np.ndarray:
    """(..., 4) → (...) area; 0 for absent boxes."""
    sides = np.maximum(boxes[..., 2:] - boxes[..., :2], 0)
    return sides[..., 0] * sides[..., 1]


def box_overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of (A, 4) with (B, 4) as (A, B)."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = np.prod(np.maximum(high - low, 0), axis=-1)
    total = box_areas(boxes)[:, None] + box_areas(others)[None] - shared
    return shared / np.maximum(total, 1e-9)


Sighting = tuple[Face, np.ndarray | None]


class FaceLinker:
    """Faces of sampled frames, taken in order, and whose they are over a whole clip.

    A face belongs to the person whose head it covers; faces of nobody are linked by overlap.
    """

    def __init__(self, max_people: int) -> None:
        self.max_people = max_people
        self._sightings: dict[int, list[Sighting]] = {}

    def add(self, index: int, faces: Sequence[Sighting]) -> None:
        """Take the faces, and where wanted their embeddings, of frame `index`."""
        self._sightings[index] = list(faces)

    def track(self, num_frames: int, pose: PoseTrack, model: str, channel_order: str) -> FaceTrack:
        """Faces of every frame; face p is of person p of `pose`, those of nobody come after."""
        rows = self._rows(pose)
        people = len(rows)
        boxes = np.zeros((num_frames, people, 4), np.float32)
        landmarks = np.zeros((num_frames, people, 5, 2), np.float32)
        score = np.zeros((num_frames, people), np.float32)
        sampled = sorted(self._sightings)
        for person, row in enumerate(rows):
            for before, after in pairwise([*sampled, num_frames]):
                if before not in row:
                    continue
                here = row[before][0]
                there = row[after][0] if after in row else None
                # The last sample holds to the end; a face lost by the next one is gone at once.
                last = before == sampled[-1]
                for frame in range(before, after if there or last else before + 1):
                    share = (frame - before) / (after - before) if there else 0.0
                    other = there or here
                    boxes[frame, person] = _mix(here.box, other.box, share)
                    landmarks[frame, person] = _mix(here.landmarks, other.landmarks, share)
                    score[frame, person] = _mix(here.score, other.score, share)
        return FaceTrack(
            boxes=boxes,
            landmarks=landmarks,
            score=score,
            embeddings=_stack_embeddings(rows),
            model=model,
            channel_order=channel_order,
        )

    def _rows(self, pose: PoseTrack) -> list[dict[int, Sighting]]:
        """The sightings of each track by frame: people first, then faces of nobody."""
        people: list[dict[int, Sighting]] = [{} for _ in range(pose.num_people)]
        others: list[dict[int, Sighting]] = []
        for index, sightings in sorted(self._sightings.items()):
            left = dict(enumerate(sightings))
            votes = np.array([_heads_in(face.box, pose, index) for face, _ in sightings])
            while votes.size and votes.max() > 0:
                number, person = np.unravel_index(int(votes.argmax()), votes.shape)
                people[int(person)][index] = left.pop(int(number))
                votes[number, :] = votes[:, person] = 0
            _link_others(others, index, list(left.values()))
        # Seen once among several looks, and on nobody's head: more likely no face at all.
        others = [row for row in others if len(row) > 1 or len(self._sightings) == 1]
        others.sort(key=lambda row: -sum(face.area for face, _ in row.values()))
        rows = people + others[: max(0, self.max_people - len(people))]
        while rows and not rows[-1]:
            rows.pop()
        return rows


def _link_others(rows: list[dict[int, Sighting]], index: int, sightings: list[Sighting]) -> None:
    boxes = np.array([face.box for face, _ in sightings], np.float32).reshape(-1, 4)
    last = np.array([row[max(row)][0].box for row in rows], np.float32).reshape(-1, 4)
    pairs = match_boxes(boxes, last)
    for number, sighting in enumerate(sightings):
        if number in pairs:
            rows[pairs[number]][index] = sighting
        else:
            rows.append({index: sighting})


def _heads_in(box: np.ndarray, pose: PoseTrack, frame: int) -> np.ndarray:
    """(P,) how well each person's nose, eyes and ears lie in a face's box; 0 = not at all."""
    heads = (0, 14, 15, 16, 17)
    points, score = pose.keypoints[frame][:, heads], pose.score[frame][:, heads]
    margin = 0.25 * (box[2:] - box[:2])
    inside = ((points >= box[:2] - margin) & (points <= box[2:] + margin)).all(axis=-1)
    return (inside * score).sum(axis=-1)


def _mix(one: np.ndarray | float, two: np.ndarray | float, share: float) -> np.ndarray | float:
    return one * (1 - share) + two * share


def _stack_embeddings(rows: Sequence[dict[int, Sighting]]) -> np.ndarray:
    """(P, D) the embedding of each track's surest face; zeros where there is none."""
    surest = [max(row.values(), key=lambda seen: seen[0].score, default=None) for row in rows]
    known = [seen[1] if seen is not None else None for seen in surest]
    size = max((len(embedding) for embedding in known if embedding is not None), default=0)
    stacked = np.zeros((len(rows), size), np.float32)
    for person, embedding in enumerate(known):
        if embedding is not None:
            stacked[person] = embedding
    return stacked
