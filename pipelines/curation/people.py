"""The people of a clip: how many, how large the main one is, and who walks in front of whom.

A body is believed where its head or trunk is seen and where all its sightings together show as many
joints as one whole person has: a detector takes drawn animals for people now and then, for a frame,
but then there are few joints to be found. Faces that belong to no body are people too.

T frames, P people
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from animator.keypoints import BODY, KEYPOINT_NAMES, NUM_KEYPOINTS, VISIBLE
from pipelines.curation.face_scores import link_faces
from pipelines.faces import Face
from pipelines.pose import PoseTrack
from pipelines.schema import Scores

_HEAD_AND_TRUNK = [
    KEYPOINT_NAMES.index(name)
    for name in ("nose", "neck", "right_shoulder", "left_shoulder", "right_hip", "left_hip")
]
# Who is together in fewer frames than this share is not counted together.
_MIN_TOGETHER = 0.1
_MAX_GAP = 5
# Others count from this share of the main person's area; less are passers-by in the background.
_MIN_AREA = 0.15
_COVERED = 0.2
# A face of nobody must be sure, and seen this often.
_FACE_SCORE = 0.6
_FACE_SIGHTINGS = 3
# A standing body is about this many faces wide and high.
_FACES_WIDE, _FACES_HIGH = 3.0, 7.0


@dataclass(frozen=True, kw_only=True)
class _Someone:
    """One believed person: boxes (T, 4), zeros where unseen."""

    boxes: np.ndarray

    @property
    def seen(self) -> np.ndarray:
        return self.boxes[:, 2] > self.boxes[:, 0]

    @property
    def area(self) -> float:
        """Median share of the frame, where seen."""
        return float(np.median(_areas(self.boxes[self.seen])))

    @property
    def weight(self) -> float:
        return float(_areas(self.boxes).sum())


def people_scores(track: PoseTrack, faces: Sequence[Sequence[Face]]) -> Scores:
    """Scores of the people over sampled frames.

    people: how many are in the picture together, in at least a tenth of the frames, without those
        far behind the main one.
    main_height: height of the main person as a share of the frame's, the median; None for nobody.
    main_presence: share of frames with the main person.
    people_crossing: share of frames in which another person covers a fifth of the main one.
    """
    people = sorted(_bodies(track) + _heads(track, faces), key=lambda one: -one.weight)
    if not people:
        return {"people": 0, "main_height": None, "main_presence": 0.0, "people_crossing": 0.0}
    main = people[0]
    people = [one for one in people if one.area >= _MIN_AREA * main.area]
    together = np.sum([_bridged(one.seen) for one in people], axis=0)
    counts = range(1, len(people) + 1)
    number = max((n for n in counts if np.mean(together >= n) >= _MIN_TOGETHER), default=0)
    heights = main.boxes[main.seen, 3] - main.boxes[main.seen, 1]
    covered = [_covered(main.boxes, one.boxes) >= _COVERED for one in people[1:]]
    return {
        "people": int(number),
        "main_height": float(np.median(heights)),
        "main_presence": float(main.seen.mean()),
        "people_crossing": float(np.any(covered, axis=0).mean()) if covered else 0.0,
    }


def _bodies(track: PoseTrack) -> list[_Someone]:
    visible = track.score[..., BODY] >= VISIBLE
    believed = visible[..., _HEAD_AND_TRUNK].any(axis=-1) & (_areas(track.boxes) > 0)
    boxes = np.where(believed[..., None], track.boxes, 0)
    joints = (visible.sum(axis=-1) * believed).sum(axis=0)
    return [
        _Someone(boxes=boxes[:, person])
        for person in range(track.num_people)
        if joints[person] >= NUM_KEYPOINTS
    ]


def _heads(track: PoseTrack, faces: Sequence[Sequence[Face]]) -> list[_Someone]:
    """People of whom only the face was found."""
    lone = [
        _faces_of_nobody([face for face in found if face.score >= _FACE_SCORE], boxes)
        for found, boxes in zip(faces, track.boxes, strict=True)
    ]
    heads = []
    for row in link_faces(lone):
        if len(row) < min(_FACE_SIGHTINGS, len(faces)):
            continue
        boxes = np.zeros((len(faces), 4), np.float32)
        for frame, which in row.items():
            boxes[frame] = _body_below(lone[frame][which].box)
        heads.append(_Someone(boxes=boxes))
    return heads


def _faces_of_nobody(faces: Sequence[Face], boxes: np.ndarray) -> list[Face]:
    """The faces in no body's box; a body has one face, the uppermost."""
    left = sorted(faces, key=lambda face: float(face.box[1]))
    for box in boxes[_areas(boxes) > 0]:
        for number, face in enumerate(left):
            middle = (face.box[:2] + face.box[2:]) / 2
            if (middle >= box[:2]).all() and (middle <= box[2:]).all():
                del left[number]
                break
    return left


def _body_below(face: np.ndarray) -> np.ndarray:
    """Where the body of a face would be, inside the frame."""
    width, height = face[2:] - face[:2]
    middle = (face[0] + face[2]) / 2
    half = _FACES_WIDE * width / 2
    box = [middle - half, face[1], middle + half, face[1] + _FACES_HIGH * height]
    return np.clip(np.array(box, np.float32), 0, 1)


def _bridged(seen: np.ndarray) -> np.ndarray:
    """Seen, or lost for so short that he was there."""
    frames = np.flatnonzero(seen)
    bridged = seen.copy()
    for before, after in pairwise(frames):
        if after - before <= _MAX_GAP:
            bridged[before:after] = True
    return bridged


def _areas(boxes: np.ndarray) -> np.ndarray:
    sides = np.maximum(boxes[..., 2:] - boxes[..., :2], 0)
    return sides[..., 0] * sides[..., 1]


def _covered(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(T,) share of each box that the other one covers."""
    low = np.maximum(boxes[:, :2], others[:, :2])
    high = np.minimum(boxes[:, 2:], others[:, 2:])
    shared = _areas(np.concatenate([low, high], axis=1))
    return shared / np.maximum(_areas(boxes), 1e-9)
