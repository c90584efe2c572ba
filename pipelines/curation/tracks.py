"""From what was seen in some frames to tracks over every frame of a clip.

T frames, P people, N = 18 keypoints, D embedding size
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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


@dataclass
class _FaceSlot:
    box: np.ndarray
    seen: dict[int, Face] = field(default_factory=dict)
    best_score: float = -1.0
    embedding: np.ndarray | None = None


class FaceLinker:
    """Faces of sampled frames, taken in order, linked into tracks by overlap."""

    def __init__(self, max_people: int) -> None:
        self.max_people = max_people
        self.seen: set[int] = set()
        self._slots: list[_FaceSlot] = []

    def add(self, index: int, faces: Sequence[tuple[Face, np.ndarray | None]]) -> None:
        """Take the faces, and where wanted their embeddings, of frame `index`."""
        self.seen.add(index)
        boxes = np.array([face.box for face, _ in faces], np.float32).reshape(-1, 4)
        known = np.array([slot.box for slot in self._slots], np.float32).reshape(-1, 4)
        pairs = match_boxes(boxes, known)
        for number, (face, embedding) in enumerate(faces):
            if number in pairs:
                slot = self._slots[pairs[number]]
            else:
                slot = _FaceSlot(face.box)
                self._slots.append(slot)
            slot.box = face.box
            slot.seen[index] = face
            if face.score > slot.best_score:
                slot.best_score, slot.embedding = face.score, embedding

    def track(self, num_frames: int, pose: PoseTrack, model: str, channel_order: str) -> FaceTrack:
        """Faces of every frame; face p belongs to person p of `pose` where it can be told."""
        placed = self._placed(pose)
        people = max(placed, default=-1) + 1
        boxes = np.zeros((num_frames, people, 4), np.float32)
        landmarks = np.zeros((num_frames, people, 5, 2), np.float32)
        score = np.zeros((num_frames, people), np.float32)
        sampled = sorted(self.seen)
        for person, slot in placed.items():
            for before, after in pairwise([*sampled, num_frames]):
                here, there = slot.seen.get(before), slot.seen.get(after)
                if here is None:
                    continue
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
            embeddings=_stack_embeddings(placed, people),
            model=model,
            channel_order=channel_order,
        )

    def _placed(self, pose: PoseTrack) -> dict[int, _FaceSlot]:
        """The slots by person: the one whose head the face covers most often, else a free place."""
        slots = sorted(
            self._slots,
            key=lambda slot: -sum(float(box_areas(face.box)) for face in slot.seen.values()),
        )[: self.max_people]
        people = pose.score.shape[1]
        votes = np.zeros((len(slots), people))
        for number, slot in enumerate(slots):
            for index, face in slot.seen.items():
                votes[number] += _heads_in(face.box, pose, index)
        placed: dict[int, _FaceSlot] = {}
        left = dict(enumerate(slots))
        while votes.size and votes.max() > 0:
            number, person = np.unravel_index(int(votes.argmax()), votes.shape)
            placed[int(person)] = left.pop(int(number))
            votes[number, :] = votes[:, person] = 0
        free = (place for place in range(people + len(slots)) if place not in placed)
        for slot in left.values():
            # A face that no skeleton claims must not pass for another person's.
            place = next(place for place in free if place >= people)
            placed[place] = slot
        return placed


def _heads_in(box: np.ndarray, pose: PoseTrack, frame: int) -> np.ndarray:
    """(P,) how well each person's nose, eyes and ears lie in a face's box; 0 = not at all."""
    heads = (0, 14, 15, 16, 17)
    points, score = pose.keypoints[frame][:, heads], pose.score[frame][:, heads]
    margin = 0.25 * (box[2:] - box[:2])
    inside = ((points >= box[:2] - margin) & (points <= box[2:] + margin)).all(axis=-1)
    return (inside * score).sum(axis=-1)


def _mix(one: np.ndarray | float, two: np.ndarray | float, share: float) -> np.ndarray | float:
    return one * (1 - share) + two * share


def _stack_embeddings(placed: dict[int, _FaceSlot], people: int) -> np.ndarray:
    known = {p: slot.embedding for p, slot in placed.items() if slot.embedding is not None}
    size = max((len(embedding) for embedding in known.values()), default=0)
    stacked = np.zeros((people, size), np.float32)
    for person, embedding in known.items():
        stacked[person] = embedding
    return stacked
