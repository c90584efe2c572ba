"""Who in the driving clip moves whom in the reference.

Shapes: P people, T frames, N = 18 joints. Coordinates are isotropic (`animator.keypoints`).
"""

import torch
from torch import Tensor

from animator.similarity import joint_centres

SEEN_FOR = 0.2  # share of the frames of who is seen most, from which somebody counts


def match_people(
    reference: Tensor, reference_seen: Tensor, driving: Tensor, driving_seen: Tensor
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
    """
    there = _present(reference_seen[None])
    moving = _present(driving_seen)
    count = max(min(len(there), len(moving)), 1)
    there, moving = (there or [0])[:count], (moving or [0])[:count]
    place = _across(reference[None], reference_seen[None])
    moving_place = _across(driving, driving_seen)
    pairs = zip(
        sorted(there, key=lambda person: float(place[person])),
        sorted(moving, key=lambda person: float(moving_place[person])),
        strict=True,
    )
    return sorted(pairs, key=lambda pair: pair[1])


def _present(seen: Tensor) -> list[int]:
    frames = (seen > 0).any(-1).sum(0)
    least = max(SEEN_FOR * float(frames.max()), 1.0) if len(frames) else 1.0
    return [person for person, count in enumerate(frames.tolist()) if count >= least]


def _across(points: Tensor, seen: Tensor) -> Tensor:
    """Median place of each person from left to right, `(P,)`."""
    centres = joint_centres(points, seen)[..., 0]
    centres = torch.where((seen > 0).any(-1), centres, torch.full_like(centres, torch.nan))
    return centres.nanmedian(0).values
