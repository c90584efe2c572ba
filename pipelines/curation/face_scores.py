"""What the faces of a clip are like, and which of them is the main one.

The main face is followed through the clip, so that a passer-by who is larger for a moment is not
taken for it. Whoever appears only where it does not, at about its size, continues it: if that is
somebody else, the identities say so.

T frames, D embedding size
"""

from collections.abc import Sequence

import cv2
import numpy as np

from pipelines.curation.filters import Series
from pipelines.faces import Face
from pipelines.schema import Scores

_SIDE = 48
# Grey levels (0..255) up to which a pixel is drowned in black, and from which it is burnt out.
DROWNED, BURNT_OUT = 10, 250
# A face may move by its own size between samples, and grow or shrink by this factor.
_REACH = 1.0
_GROWTH = 2.0
_MAX_GAP = 10
# Embeddings on either side of a moment at which the person may change.
_MIN_SIDE, _SIDE_SHARE = 4, 0.2
_LEFT_EYE, _RIGHT_EYE, _NOSE = 0, 1, 2

FaceRow = dict[int, int]
"""A face over the clip: which of a frame's faces it is, by frame."""


def link_faces(faces: Sequence[Sequence[Face]]) -> list[FaceRow]:
    """Faces of each frame as rows, one a person as far as they can be followed."""
    rows: list[FaceRow] = []
    for index, found in enumerate(faces):
        pairs = []
        for number, row in enumerate(rows):
            last = max(row)
            if index - last > _MAX_GAP:
                continue
            for which, face in enumerate(found):
                far = _strangeness(faces[last][row[last]].box, face.box)
                if far <= 1:
                    pairs.append((far, number, which))
        taken: set[int] = set()
        continued: set[int] = set()
        for _, number, which in sorted(pairs):
            if number not in continued and which not in taken:
                rows[number][index] = which
                continued.add(number)
                taken.add(which)
        rows += [{index: which} for which in range(len(found)) if which not in taken]
    return rows


def _strangeness(one: np.ndarray, other: np.ndarray) -> float:
    """How unlike two boxes are for one face a sample apart: up to 1 it may be the same."""
    sides, others = one[2:] - one[:2], other[2:] - other[:2]
    largest = np.maximum(np.maximum(sides, others), 1e-6)
    moved = np.abs(one[:2] + one[2:] - other[:2] - other[2:]) / 2 / largest
    grown = np.abs(np.log(np.maximum(sides, 1e-6) / np.maximum(others, 1e-6))).mean()
    return float(max(moved.max() / _REACH, grown / np.log(_GROWTH)))


def main_faces(faces: Sequence[Sequence[Face]]) -> list[int | None]:
    """For each frame, which of its faces is the main one: the index in it, or None."""
    rows = link_faces(faces)
    rows.sort(key=lambda row: -sum(_weight(faces[frame][which]) for frame, which in row.items()))
    main: FaceRow = {}
    for row in rows:
        # Whoever is seen beside the main face is somebody else, also where he is seen alone.
        if not main or (not main.keys() & row.keys() and _like(faces, main, row)):
            main |= row
    return [main.get(frame) for frame in range(len(faces))]


def _weight(face: Face) -> float:
    return face.score * float(np.sqrt(face.area))


def _like(faces: Sequence[Sequence[Face]], main: FaceRow, row: FaceRow) -> bool:
    """Whether two rows of faces are of about the same size."""
    sizes = [np.median([np.sqrt(faces[f][w].area) for f, w in r.items()]) for r in (main, row)]
    return max(sizes) <= _GROWTH * max(min(sizes), 1e-6)


def face_scores(
    frames: Sequence[np.ndarray],
    faces: Sequence[Sequence[Face]],
    embeddings: Sequence[np.ndarray | None],
) -> tuple[Scores, Series]:
    """Scores of the main face of a clip, and the series `face_score` of the best face a frame.

    face_detected: share of frames with any detection at all.
    face_score, face_size, face_sharpness, face_frontality, face_exposure: means over the frames
        with the main face, as `FaceConfig` describes them; None without one.
    face_identity: where the embeddings of the main face before and after a moment agree least, the
        cosine of the means of both; None where fewer than 8 are known.
    face_identity_agreement, face_identity_spread: mean and standard deviation of the cosine of
        the embeddings with their mean; None where fewer than two are known.

    Args:
        frames: T sampled uint8 RGB frames (H, W, 3).
        faces: the faces found in each.
        embeddings: (D,) of the face that `main_faces` names, a frame; None where there is none or
            the face model knows no identity.
    """
    main = main_faces(faces)
    found = [
        (frame, people[which])
        for frame, people, which in zip(frames, faces, main, strict=True)
        if which is not None
    ]
    best = [max((face.score for face in people), default=0.0) for people in faces]
    vectors = _directions([vector for vector in embeddings if vector is not None])
    crops = [_grey_crop(frame, face.box) for frame, face in found]
    scores: Scores = {
        "face_detected": float(np.mean([score > 0 for score in best])) if best else 0.0,
        "face_score": _mean([face.score for _, face in found]),
        "face_size": _mean([_size(frame, face.box) for frame, face in found]),
        "face_sharpness": _mean([_sharpness(crop) for crop in crops]),
        "face_frontality": _mean([_frontality(frame, face.landmarks) for frame, face in found]),
        "face_exposure": _mean([_exposure(crop) for crop in crops]),
        "face_identity": _least_agreement(vectors),
        **_agreement(vectors),
    }
    return scores, {"face_score": [float(score) for score in best]}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _size(frame: np.ndarray, box: np.ndarray) -> float:
    height, width = frame.shape[:2]
    return float((box[3] - box[1]) * height / max(height, width))


def _grey_crop(frame: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The face in grey; empty where the box holds less than two pixels either way."""
    height, width = frame.shape[:2]
    left, top, right, bottom = np.clip(box, 0, 1) * (width, height, width, height)
    crop = frame[int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))]
    if min(crop.shape[:2], default=0) < 2:
        return np.zeros((0, 0), np.uint8)
    return cv2.cvtColor(np.ascontiguousarray(crop), cv2.COLOR_RGB2GRAY)


def _sharpness(crop: np.ndarray) -> float:
    """Variance of the Laplacian of the face at 48 x 48, grey levels 0..255.

    A small common size, so that it measures focus and not how near the camera is.
    """
    if not crop.size:
        return 0.0
    quality = cv2.INTER_AREA if min(crop.shape) > _SIDE else cv2.INTER_CUBIC
    scaled = cv2.resize(crop, (_SIDE, _SIDE), interpolation=quality)
    return float(cv2.Laplacian(scaled, cv2.CV_64F).var())


def _exposure(crop: np.ndarray) -> float:
    """Share of the face's pixels that are neither burnt out nor drowned in black."""
    return float(((crop > DROWNED) & (crop < BURNT_OUT)).mean()) if crop.size else 0.0


def _frontality(frame: np.ndarray, landmarks: np.ndarray) -> float | None:
    """1 where the nose is midway between the eyes, 0 where it is at or beyond one of them."""
    if not np.isfinite(landmarks).all():
        return None
    points = landmarks * np.array(frame.shape[1::-1], np.float64)
    line = points[_RIGHT_EYE] - points[_LEFT_EYE]
    length = float(line @ line)
    if length == 0:
        return 0.0
    along = float((points[_NOSE] - points[_LEFT_EYE]) @ line) / length
    return float(np.clip(1 - 2 * abs(along - 0.5), 0, 1))


def _directions(embeddings: Sequence[np.ndarray]) -> np.ndarray:
    """(N, D) unit vectors."""
    if not embeddings:
        return np.zeros((0, 0))
    vectors = np.stack(embeddings).astype(np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _agreement(vectors: np.ndarray) -> Scores:
    if len(vectors) < 2:
        return {"face_identity_agreement": None, "face_identity_spread": None}
    mean = vectors.mean(axis=0)
    cosine = vectors @ (mean / max(float(np.linalg.norm(mean)), 1e-12))
    return {
        "face_identity_agreement": float(cosine.mean()),
        "face_identity_spread": float(cosine.std()),
    }


def _least_agreement(vectors: np.ndarray) -> float | None:
    """Least cosine of the mean of (N, D) up to a row with the mean of the rows after it.

    Means forgive a head that turns away for a moment, of which the agreement with the mean of all
    makes as much as of another person; each has a fifth of the rows or more for the same reason.
    """
    count = len(vectors)
    least = max(_MIN_SIDE, int(np.ceil(_SIDE_SHARE * count)))
    if count < 2 * least:
        return None
    before = np.cumsum(vectors, axis=0)[:-1]
    after = vectors.sum(axis=0) - before
    lengths = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
    cosine = (before * after).sum(axis=1) / np.maximum(lengths, 1e-12)
    return float(cosine[least - 1 : count - least].min())
