"""Who in the driving clip moves whom in the reference.

Shapes: P people, T frames, N = 18 joints. Coordinates are isotropic (`animator.keypoints`).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from animator.keypoints import KEYPOINT_NAMES
from animator.similarity import joint_centres
from pipelines.faces import Face
from pipelines.pose import box_overlap

HEAD = [
    KEYPOINT_NAMES.index(name)
    for name in ("nose", "right_eye", "left_eye", "right_ear", "left_ear")
]
SAME_FACE = 0.5  # overlap from which two boxes are one face
SEEN_FOR = 0.2  # share of the frames of who is seen most, from which somebody counts


def match_people(
    reference: Tensor,
    reference_seen: Tensor,
    driving: Tensor,
    driving_seen: Tensor,
    order: Sequence[int] = (),
) -> list[tuple[int, int]]:
    """Pairs (reference person, driving person), the pair of the driving clip's main person first.

    People are matched from left to right, which no misalignment of less than a quarter turn
    changes. Where one side has more people, its first ones count; both sides have the main person
    first. Somebody who is seen in few of the frames, or never, is nobody.

    Args:
        reference: `(P, N, 2)`.
        reference_seen: confidence, 0 for joints that are not seen, `(P, N)`.
        driving: `(T, P, N, 2)`.
        driving_seen: as for the reference, `(T, P, N)`.
        order: which person of the reference each person of the driving clip becomes, both from left
            to right, the reference's counted from 1; none is the same order.

    Raises:
        ValueError: for an order that names other people, or one of them twice.
    """
    there = _present(reference_seen[None])
    moving = _present(driving_seen)
    count = max(min(len(there), len(moving)), 1)
    there, moving = (there or [0])[:count], (moving or [0])[:count]
    place = across(reference[None], reference_seen[None])
    moving_place = across(driving, driving_seen)
    there = sorted(there, key=lambda person: float(place[person]))
    if order:
        if sorted(order) != list(range(1, count + 1)):
            raise ValueError(
                f"Got alignment.people {','.join(map(str, order))}, but expected the numbers 1 to "
                f"{count} in some order: {len(_present(reference_seen[None]))} in the picture and "
                f"{len(_present(driving_seen))} in the clip can be matched."
            )
        there = [there[number - 1] for number in order]
    pairs = zip(there, sorted(moving, key=lambda person: float(moving_place[person])), strict=True)
    return sorted(pairs, key=lambda pair: pair[1])


def _present(seen: Tensor) -> list[int]:
    frames = (seen > 0).any(-1).sum(0)
    least = max(SEEN_FOR * float(frames.max()), 1.0) if len(frames) else 1.0
    return [person for person, count in enumerate(frames.tolist()) if count >= least]


def across(points: Tensor, seen: Tensor) -> Tensor:
    """Median place of each person from left to right, `(P,)`."""
    centres = joint_centres(points, seen)[..., 0]
    centres = torch.where((seen > 0).any(-1), centres, torch.full_like(centres, torch.nan))
    return centres.nanmedian(0).values


def faces_of_people(
    keypoints: np.ndarray,
    score: np.ndarray,
    faces: Sequence[Face],
    main: Face | None,
    threshold: float,
) -> dict[int, Face]:
    """Faces of a picture by the person whose head is nearest, a face to one person alone.

    Args:
        keypoints: `(P, K, 2)` in 0..1 of the picture, the main person first.
        score: `(P, K)`.
        threshold: score from which a joint is seen.
        faces: largest first; one far from every head is nobody's.
        main: the main person's, whatever else is near.
    """
    owners = {} if main is None else {0: main}
    for face in faces:
        if main is not None and box_overlap(face.box, main.box) > SAME_FACE:
            continue
        centre = (face.box[:2] + face.box[2:]) / 2
        away = np.linalg.norm(keypoints[:, HEAD] - centre, axis=-1)
        away = np.where(score[:, HEAD] >= threshold, away, np.inf).min(1)
        person = int(away.argmin())
        if away[person] <= float((face.box[2:] - face.box[:2]).max()):
            owners.setdefault(person, face)
    return owners
