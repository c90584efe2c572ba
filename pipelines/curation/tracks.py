"""Joining what was seen in single frames and chunks into tracks over a whole clip.

T frames, P people, N = 18 keypoints, D embedding size
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pipelines.faces import Face
from pipelines.pose import PoseTrack
from pipelines.schema import FaceTrack

_MIN_OVERLAP = 0.2


def join_chunks(chunks: Sequence[PoseTrack], max_people: int) -> PoseTrack:
    """One track from chunks of which each begins with the last frame of the one before.

    People are matched by their boxes in the shared frame, and ordered by the size and length of
    their appearance; at most `max_people` are kept.
    """
    length = sum(len(chunk.score) for chunk in chunks) - max(0, len(chunks) - 1)
    slots: list[dict[str, np.ndarray]] = []
    previous: list[int] = []
    begin = 0
    for number, chunk in enumerate(chunks):
        people = chunk.score.shape[1]
        matched: dict[int, int] = {}
        if number > 0:
            last = np.array([slots[slot]["boxes"][begin] for slot in previous]).reshape(-1, 4)
            pairs = match_boxes(chunk.boxes[0], last)
            # Who is absent from the shared frame has only the order to be known by.
            rest = [other for other in range(len(last)) if other not in pairs.values()]
            absent = [other for other in rest if not last[other].any()]
            lost = [p for p in range(people) if p not in pairs and not chunk.boxes[0, p].any()]
            pairs |= dict(zip(lost, absent, strict=False))
            matched = {person: previous[other] for person, other in pairs.items()}
        previous = []
        for person in range(people):
            slot = matched.get(person)
            if slot is None:
                slot = len(slots)
                slots.append(_empty_person(length))
            span = slice(begin, begin + len(chunk.score))
            slots[slot]["keypoints"][span] = chunk.keypoints[:, person]
            slots[slot]["score"][span] = chunk.score[:, person]
            slots[slot]["boxes"][span] = chunk.boxes[:, person]
            previous.append(slot)
        begin += len(chunk.score) - 1
    slots.sort(key=lambda slot: -float(box_areas(slot["boxes"]).sum()))
    return _stack_people(slots[:max_people], length)


def spread_keyframes(
    track: PoseTrack, keyframes: np.ndarray, num_frames: int, threshold: float
) -> PoseTrack:
    """A track of `keyframes` as one of every frame.

    Joints seen at both neighbouring keyframes move in a straight line; others stay with the nearer.
    """
    if len(keyframes) == num_frames:
        return track
    after = np.clip(np.searchsorted(keyframes, np.arange(num_frames)), 1, len(keyframes) - 1)
    before = after - 1
    gap = np.maximum(keyframes[after] - keyframes[before], 1)
    weight = ((np.arange(num_frames) - keyframes[before]) / gap).astype(np.float32)
    nearest = np.where(weight < 0.5, before, after)
    joint = (track.score[before] >= threshold) & (track.score[after] >= threshold)
    box = (box_areas(track.boxes)[before] > 0) & (box_areas(track.boxes)[after] > 0)

    def spread(values: np.ndarray, both: np.ndarray) -> np.ndarray:
        share = weight.reshape(-1, *[1] * (values.ndim - 1))
        moved = values[before] * (1 - share) + values[after] * share
        return np.where(both, moved, values[nearest]).astype(np.float32)

    return PoseTrack(
        keypoints=spread(track.keypoints, joint[..., None]),
        score=spread(track.score, joint),
        boxes=spread(track.boxes, box[..., None]),
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
            for before, after in zip(sampled, [*sampled[1:], None], strict=True):
                here = slot.seen.get(before)
                if here is None:
                    continue
                there = slot.seen.get(after) if after is not None else None
                for frame in range(before, before + 1 if there is None else (after or 0)):
                    share = (frame - before) / ((after or 0) - before) if there else 0.0
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


def _empty_person(length: int) -> dict[str, np.ndarray]:
    return {
        "keypoints": np.zeros((length, 18, 2), np.float32),
        "score": np.zeros((length, 18), np.float32),
        "boxes": np.zeros((length, 4), np.float32),
    }


def _stack_people(slots: Sequence[dict[str, np.ndarray]], length: int) -> PoseTrack:
    empty = _empty_person(length)
    return PoseTrack(
        **{
            name: np.stack([slot[name] for slot in slots], axis=1)
            if slots
            else np.zeros((length, 0, *empty[name].shape[1:]), np.float32)
            for name in empty
        }
    )
