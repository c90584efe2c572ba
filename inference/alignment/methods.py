"""The same poses by every method of alignment: what each would do to a clip.

Shapes: T frames, P people, K keypoints (18 or 128), N = 18 of them the body's. Distances are of
the longer side of the reference's frame.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from animator.alignment import AlignmentBlock
from animator.clip_transform import MAX_VOTE, outliers
from animator.keypoints import BODY, from_isotropic, to_isotropic
from animator.similarity import Similarity, apply, joint_centres
from inference.affine import fit_affine
from inference.alignment.verdict import PersonAlignment
from inference.clip_alignment import (
    AlignmentSettings,
    FrameAlignment,
    align_frames,
    limit_frames,
)
from inference.perception import Pose
from inference.retarget import Retargeted, retarget, unaligned

NONE, AFFINE, CLOSED_FORM, LEARNED = "none", "affine", "closed_form", "learned"
_MOST = 0.9  # share of the frames that count less than those that count most


class Pair(NamedTuple):
    """One person of the picture and who moves them, in isotropic coordinates."""

    reference: Tensor  # (N, 2)
    driven: Tensor  # (T, N, 2)
    seen: Tensor  # (T, N), confidence of the driving joints, 0 for those not seen
    weight: Tensor  # (T, N), confidence that a joint is seen in both


class OwnTransforms(NamedTuple):
    """What every frame alone says of one person; NaN where a frame says nothing."""

    scale: np.ndarray  # (T,)
    degrees: np.ndarray  # (T,)
    place: np.ndarray  # (T, 2), where it puts the person, from where all frames do
    weight: np.ndarray  # (T, 3), of scale, degrees and place; 1 for the frames that count most
    used: np.ndarray  # (T,), whether the clip's transform listens to it


@dataclass(frozen=True)
class MethodResult:
    """What one method makes of a clip."""

    moved: Retargeted
    outside: float  # share of the seen joints that leave the picture
    jitter: float  # how far joints move where a frame's transform follows that of the frame before
    jitter_per_frame: float | None  # the same, were each frame moved by its own transform
    off: float | None  # mean distance to the reference's joints in the frame most like it


def compare_methods(
    block: AlignmentBlock | None, reference: Pose, driving: Pose, settings: AlignmentSettings
) -> dict[str, MethodResult]:
    """Every method's result by its name; the last one is what animating uses.

    Args:
        block: the learned block; without one the closed form is the last.
        reference: the picture's people `(P, K, 2)`, the main one first.
        driving: `(T, P, K, 2)`.
    """
    sizes = (reference.size, driving.size)
    poses = ((reference.keypoints, reference.score), (driving.keypoints, driving.score))
    thresholds = (reference.threshold, driving.threshold)
    moved = {
        NONE: unaligned(driving.keypoints, sizes),
        CLOSED_FORM: retarget(None, *poses, sizes, thresholds, settings),
    }
    if block is not None:
        moved[LEARNED] = retarget(block, *poses, sizes, thresholds, settings)
    people = [*moved.values()][-1].people
    pairs = [pair_of(reference, driving, person) for person in people]
    moved[AFFINE] = _affine(reference, driving, people, pairs)
    blocks = {CLOSED_FORM: None, LEARNED: block}
    alike = people[0].most_alike
    frame = torch.tensor([reference.size], dtype=torch.float32) / max(reference.size)
    results = {}
    for name in (NONE, AFFINE, CLOSED_FORM, LEARNED):
        if name not in moved:
            continue
        own = None
        if name in blocks:
            own = _mean_jitter(blocks[name], pairs, frame, settings)
        results[name] = MethodResult(
            moved[name],
            _outside(moved[name].keypoints, driving, people),
            own if own is not None and settings.per_frame else 0.0,
            own,
            None if alike is None else _off(moved[name].keypoints, alike, reference, pairs, people),
        )
    return results


def pair_of(reference: Pose, driving: Pose, person: PersonAlignment) -> Pair:
    """The poses that one person's alignment is found from."""
    still, still_seen = _bodies(reference)
    moving, seen = _bodies(driving)
    one, other = still[person.reference], moving[:, person.driving]
    weight = torch.minimum(still_seen[person.reference], seen[:, person.driving])
    return Pair(one, other, seen[:, person.driving], weight)


@torch.no_grad()
def own_transforms(
    block: AlignmentBlock | None, pair: Pair, size: tuple[int, int]
) -> OwnTransforms:
    """Each frame's own transform; `size` is the reference's (height, width)."""
    driven, weight = pair.driven[None], pair.weight[None]
    frame = torch.tensor([size], dtype=torch.float32) / max(size)
    found = align_frames(block, pair.reference[None], driven, weight, frame)
    used = (found.solved & ~outliers(found.transform, driven, weight, found.solved))[0]
    centres = joint_centres(driven, weight)[..., None, :]
    place = apply(found.transform, centres)[0, :, 0]
    votes = found.votes[0].clamp(-MAX_VOTE, MAX_VOTE)
    counts = votes.exp() * used[:, None]
    mean = (counts[:, 2:] * place).sum(0) / counts[:, 2:].sum(0).clamp_min(1e-12)
    # One frame alone may outweigh all others by far.
    most = counts[used].quantile(_MOST, 0) if used.any() else torch.ones(counts.shape[1])
    unknown = ~found.solved[0]
    return OwnTransforms(
        found.transform.scale[0].masked_fill(unknown, torch.nan).numpy(),
        found.transform.degrees[0].masked_fill(unknown, torch.nan).numpy(),
        (place - mean).masked_fill(unknown[:, None], torch.nan).numpy(),
        (counts / most).clamp(max=1).numpy(),
        used.numpy(),
    )


def _bodies(pose: Pose) -> tuple[Tensor, Tensor]:
    """Bodies in isotropic coordinates, and their joints' confidence, 0 for those not seen."""
    height, width = pose.size
    points = to_isotropic(pose.keypoints[..., BODY, :].astype(np.float32), width, height)
    score = np.nan_to_num(pose.score[..., BODY].astype(np.float32))
    seen = score * (score >= pose.threshold) * np.isfinite(points).all(-1)
    return torch.from_numpy(points), torch.from_numpy(seen.astype(np.float32))


def _affine(
    reference: Pose, driving: Pose, people: tuple[PersonAlignment, ...], pairs: list[Pair]
) -> Retargeted:
    """As `retarget`, by the affine transform of earlier systems."""
    height, width = driving.size
    points = torch.from_numpy(to_isotropic(driving.keypoints.astype(np.float32), width, height))
    found = {
        person.driving: fit_affine(pair.driven, pair.reference, pair.weight)
        for person, pair in zip(people, pairs, strict=True)
    }
    main = found[people[0].driving]
    each = [found.get(person, main) for person in range(points.shape[1])]
    moved = torch.stack([apply(t, points[:, i]) for i, t in enumerate(each)], 1)
    height, width = reference.size
    described = tuple(
        PersonAlignment(
            method=AFFINE,
            reference=person.reference,
            driving=person.driving,
            scale=float(found[person.driving].scale),
            shift=(float(found[person.driving].shift[0]), float(found[person.driving].shift[1])),
            frames=person.frames,
        )
        for person in people
    )
    return Retargeted(from_isotropic(moved.numpy(), width, height), described)


def _outside(keypoints: np.ndarray, driving: Pose, people: tuple[PersonAlignment, ...]) -> float:
    """Share of the seen body joints of the aligned people that lie outside of the picture."""
    _, seen = _bodies(driving)
    who = [person.driving for person in people]
    there = seen[:, who].numpy() > 0
    points = keypoints[:, who][..., BODY, :]
    beyond = ((points < 0) | (points > 1)).any(-1)
    return float((beyond & there).sum() / max(there.sum(), 1))


def _mean_jitter(
    block: AlignmentBlock | None, pairs: list[Pair], frame: Tensor, settings: AlignmentSettings
) -> float:
    """Mean over people of the jitter of their frames' own transforms."""
    values = []
    for pair in pairs:
        driven, weight = pair.driven[None], pair.weight[None]
        found: FrameAlignment = align_frames(block, pair.reference[None], driven, weight, frame)
        held = limit_frames(found.transform, driven, weight, settings)
        before, after = (
            Similarity(*(field[0, part] for field in held))
            for part in (slice(None, -1), slice(1, None))
        )
        points = pair.driven[:-1]
        step = (apply(after, points) - apply(before, points)).norm(dim=-1)
        both = (pair.seen[:-1] > 0) & (pair.seen[1:] > 0).any(-1, keepdim=True)
        values.append(float(step[both].mean()) if both.any() else 0.0)
    return float(np.mean(values))


def _off(
    keypoints: np.ndarray,
    index: int,
    reference: Pose,
    pairs: list[Pair],
    people: tuple[PersonAlignment, ...],
) -> float | None:
    """Mean distance of the main person's joints to the reference's, of those seen in both."""
    height, width = reference.size
    moved = to_isotropic(keypoints[index, people[0].driving, BODY], width, height)
    common = pairs[0].weight[index].numpy() > 0
    if not common.any():
        return None
    away = np.linalg.norm(moved - pairs[0].reference.numpy(), axis=-1)
    return float(away[common].mean())
