"""Where each person's face is in each frame of the video being made: known before it is made.

Faces follow the aligned poses. A whole-body pose has the face's own points; of a pose of 18
keypoints the reference's five landmarks are carried from the reference's head to the driven head.
Faces found in what has been decoded so far correct the places.

Shapes: T frames, P people of the driving clip, K keypoints (18 or 128), H W pixels. Landmarks are
eyes, nose and mouth corners, left to right in the picture of somebody who faces the camera.
Everything is in 0..1 of the frame that is made, xyxy for boxes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from animator import similarity
from animator.face_embedding import TEMPLATE
from animator.keypoints import BODY, FACE, KEYPOINT_NAMES, WHOLE_BODY
from pipelines.faces import Face, FaceBackend
from pipelines.pose import box_overlap

_HEAD_NAMES = ("right_eye", "left_eye", "nose", "right_ear", "left_ear")
_HEAD = [KEYPOINT_NAMES.index(name) for name in _HEAD_NAMES]
# Ears wander over the head as it turns.
_TRUST = np.array([1, 1, 1, 0.5, 0.5], np.float32)
_EYES_NOSE = slice(0, 3)
# Where detectors draw the box of a face that lies in the template.
_TEMPLATE_BOX = ((14.0, 2.0), (98.0, 2.0), (98.0, 114.0), (14.0, 114.0))
# Eyes this near to each other, against their distance from the nose: a profile.
MIN_EYES = 0.6
MIN_INSIDE = 0.5  # share of a face's box that lies in the frame
# A detection is of this face if it overlaps its place, and is about as large and as upright.
MIN_OVERLAP, MAX_GROWTH, MAX_TURN = 0.3, 1.6, 30.0


@dataclass(frozen=True, kw_only=True)
class ReferenceFace:
    """A face of the reference picture, in the frame that is made, and its person's head."""

    landmarks: np.ndarray  # (5, 2); NaN where the detector gives none
    box: np.ndarray  # (4,)
    head: np.ndarray  # (5, 2): eyes, nose, ears of the pose, right before left
    head_score: np.ndarray  # (5,)

    @classmethod
    def of(
        cls, landmarks: np.ndarray, box: np.ndarray, keypoints: np.ndarray, score: np.ndarray
    ) -> "ReferenceFace":
        """From the person's keypoints `(K, 2)` and their score `(K,)`."""
        return cls(landmarks=landmarks, box=box, head=keypoints[_HEAD], head_score=score[_HEAD])


@dataclass(kw_only=True)
class FacePlaces:
    """Faces over a clip; `correct` moves them."""

    visible: np.ndarray  # (T, P) bool
    landmarks: np.ndarray  # (T, P, 5, 2); NaN where not visible
    boxes: np.ndarray  # (T, P, 4); zeros where not visible
    size: tuple[int, int]  # H, W

    @property
    def num_people(self) -> int:
        return self.visible.shape[1]

    def correct(self, frames: np.ndarray, numbers: Sequence[int], detector: FaceBackend) -> int:
        """Move the faces of these frames to where a detector sees them.

        A face is taken for the one whose place it overlaps most; one that is much larger,
        smaller or otherwise turned than what the pose says is none of ours.

        Args:
            frames: uint8 RGB `(t, H, W, 3)` of the frames with these numbers in the clip.

        Returns:
            how many faces were moved.
        """
        moved = 0
        for frame, number in zip(frames, numbers, strict=True):
            people = np.flatnonzero(self.visible[number]).tolist()
            found = detector.detect(frame) if len(people) else []
            pairs = sorted(
                (
                    (box_overlap(self.boxes[number, person], face.box), person, index)
                    for person in people
                    for index, face in enumerate(found)
                ),
                reverse=True,
            )
            taken_people, taken_faces = set[int](), set[int]()
            for overlap, person, index in pairs:
                if overlap < MIN_OVERLAP or person in taken_people or index in taken_faces:
                    continue
                taken_people.add(person)
                taken_faces.add(index)
                moved += self._move(number, person, found[index])
        return moved

    def _move(self, frame: int, person: int, face: Face) -> bool:
        points = torch.from_numpy(
            np.stack([self.landmarks[frame, person], face.landmarks]).astype(np.float32)
        )
        if not bool(points.isfinite().all()):
            return False
        points = points * torch.tensor(self.size[::-1])
        change = similarity.fit(points[0], points[1], torch.ones(len(TEMPLATE)))
        growth = float(change.scale)
        if not 1 / MAX_GROWTH <= growth <= MAX_GROWTH or abs(float(change.degrees)) > MAX_TURN:
            return False
        self.landmarks[frame, person] = face.landmarks
        self.boxes[frame, person] = face.box
        return True


def places_of_faces(
    keypoints: np.ndarray,
    score: np.ndarray,
    threshold: float,
    references: Mapping[int, ReferenceFace],
    size: tuple[int, int],
    min_face: float = 24.0,
) -> FacePlaces:
    """Faces of the people who have one in the reference.

    A face is not visible where an eye or the nose is not seen, where the head is turned away or
    in profile, where it is smaller than `min_face` pixels or mostly outside of the frame.

    Args:
        keypoints: aligned driving poses in 0..1 of the frame, `(T, P, K, 2)`.
        score: `(T, P, K)`.
        threshold: score from which a joint is seen.
        references: faces of the reference by the number of the driving person they belong to.
        size: (height, width) of the frame in pixels.
        min_face: pixels of the longer side of the box.
    """
    frames, people = score.shape[:2]
    places = FacePlaces(
        visible=np.zeros((frames, people), bool),
        landmarks=np.full((frames, people, 5, 2), np.nan, np.float32),
        boxes=np.zeros((frames, people, 4), np.float32),
        size=size,
    )
    for person, reference in references.items():
        points, seen = keypoints[:, person], score[:, person] >= threshold
        seen = seen & np.isfinite(points).all(-1)
        points = np.nan_to_num(points.astype(np.float32))
        landmarks, boxes = _follow_head(points, seen, reference, size, threshold)
        if keypoints.shape[2] == WHOLE_BODY:
            own, there = _of_face_points(points[:, FACE], seen[:, FACE])
            landmarks = np.where(there[:, None, None], own, landmarks)
        seen_head = seen[:, BODY][:, _HEAD[_EYES_NOSE]].all(1)
        visible = seen_head & _faces_camera(points[:, _HEAD], size)
        visible &= _large_inside(boxes, size, min_face)
        places.visible[:, person] = visible
        places.landmarks[visible, person] = landmarks[visible]
        places.boxes[visible, person] = boxes[visible]
    return places


def _of_face_points(points: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Landmarks `(T, 5, 2)` of 68 points of a face, and where they are all seen `(T,)`."""
    parts = (slice(36, 42), slice(42, 48), slice(30, 31), slice(48, 49), slice(54, 55))
    landmarks = np.stack([points[:, part].mean(1) for part in parts], axis=1)
    there = [seen[:, part].all(1) for part in parts]
    return landmarks, np.logical_and.reduce(there)


def _follow_head(
    points: np.ndarray,
    seen: np.ndarray,
    reference: ReferenceFace,
    size: tuple[int, int],
    threshold: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Landmarks `(T, 5, 2)` and boxes `(T, 4)` from where the joints of the head went.

    Where reference and driven head share too few joints, or the reference's landmarks are not
    known, those of a usual face are put on eyes and nose.
    """
    extent = torch.tensor(size[::-1], dtype=torch.float32)
    head = torch.from_numpy(points[:, _HEAD]) * extent
    weight = torch.from_numpy(seen[:, _HEAD] * _TRUST)
    usual = torch.tensor(TEMPLATE)
    on_head = similarity.fit(
        usual[:3].expand(len(head), -1, -1), head[:, _EYES_NOSE], weight[:, _EYES_NOSE]
    )
    corners = torch.tensor(_TEMPLATE_BOX).expand(len(head), -1, -1)
    landmarks = similarity.apply(on_head, usual.expand(len(head), -1, -1))
    boxes = _bounds(similarity.apply(on_head, corners))

    own = torch.from_numpy(np.asarray(reference.head, np.float32)) * extent
    own_seen = torch.from_numpy((reference.head_score >= threshold).astype(np.float32))
    common = weight * own_seen
    carried = similarity.fit(own.expand_as(head), head, common)
    known = torch.from_numpy(np.asarray(reference.landmarks, np.float32)) * extent
    follows = ((common > 0).sum(-1) >= similarity.MIN_COMMON) & bool(known.isfinite().all())
    moved = similarity.apply(carried, known.expand(len(head), -1, -1))
    box = torch.from_numpy(np.asarray(reference.box, np.float32)).reshape(2, 2) * extent
    middle = similarity.apply(carried, box.mean(0, keepdim=True).expand(len(head), -1, -1))
    half = carried.scale[:, None] * (box[1] - box[0]) / 2
    moved_boxes = torch.cat([middle[:, 0] - half, middle[:, 0] + half], dim=1)
    landmarks = torch.where(follows[:, None, None], moved, landmarks)
    boxes = torch.where(follows[:, None], moved_boxes, boxes)
    return (landmarks / extent).numpy(), (boxes / extent.repeat(2)).numpy()


def _bounds(points: torch.Tensor) -> torch.Tensor:
    """Boxes `(..., 4)` around points `(..., N, 2)`."""
    return torch.cat([points.amin(-2), points.amax(-2)], dim=-1)


def _faces_camera(head: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Whether a head `(T, 5, 2)` shows its face: the right eye left of the other, nose below."""
    right, left, nose = (head[:, i] * np.array(size[::-1], np.float32) for i in range(3))
    eyes, drop = left - right, nose - (left + right) / 2
    across = np.linalg.norm(eyes, axis=1)
    cross = eyes[:, 0] * drop[:, 1] - eyes[:, 1] * drop[:, 0]
    return (cross > 0) & (across >= MIN_EYES * np.linalg.norm(drop, axis=1))


def _large_inside(boxes: np.ndarray, size: tuple[int, int], min_face: float) -> np.ndarray:
    """Whether boxes `(T, 4)` are large enough and show in the frame."""
    pixels = boxes * np.tile(np.array(size[::-1], np.float32), 2)
    sides = pixels[:, 2:] - pixels[:, :2]
    inside = boxes.clip(0, 1)
    shown = (inside[:, 2:] - inside[:, :2]).prod(1)
    share = shown / np.maximum((boxes[:, 2:] - boxes[:, :2]).prod(1), 1e-9)
    return (sides.max(1) >= min_face) & (share >= MIN_INSIDE)
