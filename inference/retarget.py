"""From driving poses to poses on the reference, person by person.

Shapes: T frames, P people, K keypoints (18 or 128), N = 18 of them the body's. Keypoints are 0..1
of their frame; transforms are in isotropic coordinates (`animator.keypoints`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from animator.alignment import AlignmentBlock
from animator.clip_transform import ClipSums
from animator.keypoints import BODY, from_isotropic, to_isotropic
from animator.similarity import Similarity, apply, identity
from inference.alignment.verdict import Found, PersonAlignment, judge
from inference.clip_alignment import (
    AlignmentSettings,
    FrameAlignment,
    align_clip,
    align_frames,
    learnable,
    limit_frames,
    sum_frames,
)
from inference.people import match_people

Size = tuple[int, int]  # (height, width)
Poses = tuple[np.ndarray, np.ndarray]  # keypoints and their score
_PORTION = 512  # frames aligned at once; sums over them are all that is kept of a long clip


@dataclass(frozen=True)
class Retargeted:
    """Driving poses moved onto the reference, and what was done to them."""

    keypoints: np.ndarray  # (T, P, K, 2) in 0..1 of the reference's frame
    people: tuple[PersonAlignment, ...]  # one a matched pair, the main person's first
    per_frame: bool = False

    @property
    def main(self) -> PersonAlignment:
        """The alignment of the driving clip's main person."""
        return self.people[0]

    def drawn(self, score: np.ndarray, threshold: float, *, others: bool) -> np.ndarray:
        """Score `(T, P, K)` of the driving poses that are drawn.

        People of the clip who move nobody of the picture are left out, but for frames that show
        none of those who do: there the first one is drawn, most likely the same person, who was
        lost on the way.

        Args:
            threshold: score from which a joint is seen.
            others: draw all of them.
        """
        if others:
            return score
        matched = np.isin(np.arange(score.shape[1]), [person.driving for person in self.people])
        seen: np.ndarray = np.any(score >= threshold, axis=-1)  # (T, P)
        alone: np.ndarray = ~np.any(seen[:, matched], axis=1)
        main = np.where(np.any(seen, axis=1), seen.argmax(axis=1), -1)
        first = np.arange(score.shape[1]) == main[:, None]
        kept = matched | (alone[:, None] & first)
        return np.where(kept[..., None], score, np.zeros_like(score))

    @property
    def warnings(self) -> list[str]:
        """Reasons not to trust the alignment, of all people."""
        several = len(self.people) > 1
        return [
            f"person {number}: {text}" if several else text
            for number, person in enumerate(self.people, 1)
            for text in person.warnings
        ]

    def describe(self) -> str:
        """One sentence for people."""
        text = self.main.describe()
        if self.per_frame and self.main.method in ("learned", "closed_form"):
            text += ", each frame by its own transform"
        if len(self.people) > 1:
            text += f"; {len(self.people)} people matched from left to right"
        return text

    def record(self) -> dict[str, Any]:
        """For the JSON beside an output."""
        record = {"per_frame": self.per_frame, **self.main.record()}
        if len(self.people) > 1:
            record["people"] = [person.record() for person in self.people]
        return record


@torch.no_grad()
def retarget(
    block: AlignmentBlock | None,
    reference: Poses,
    driving: Poses,
    sizes: tuple[Size, Size],
    thresholds: tuple[float, float],
    settings: AlignmentSettings | None = None,
) -> Retargeted:
    """Align driving poses to the reference.

    Where both show several people they are matched from left to right and aligned one by one;
    driving people without a partner go along with the main one, if they are drawn at all (see
    `Retargeted.drawn`). The body alone decides; hands and face follow it.

    What is used falls back in this order, and the result says which it was: the learned block,
    where a frame shares six joints with the reference; the closed form, where one shares three;
    the shift between the joints they share, over all frames; nothing.

    Args:
        block: the learned block, or None for the closed form alone.
        reference: keypoints `(P, K, 2)` or `(K, 2)` and score `(P, K)` or `(K,)`, the main person
            first; K may be another than the driving poses'.
        driving: keypoints `(T, P, K, 2)` and score `(T, P, K)`.
        sizes: of the reference's and of the driving frame.
        thresholds: score from which a joint is seen, in the reference and in the driving clip.
        settings: of the alignment; one transform a clip by default.
    """
    settings = settings or AlignmentSettings()
    ref_h, ref_w = sizes[0]
    still, still_seen, moving, moving_seen = _seen_people(reference, driving, sizes, thresholds)
    frame = torch.tensor([[ref_h, ref_w]], dtype=torch.float32) / max(ref_h, ref_w)
    pairs = match_people(still, still_seen, moving[:, :, BODY], moving_seen, settings.people)

    people, transforms = [], {}
    for of_reference, of_driving in pairs:
        weight = torch.minimum(still_seen[of_reference], moving_seen[:, of_driving])
        pose = moving[:, of_driving, BODY]
        found = _align(block, still[of_reference], pose, weight, frame, settings)
        transforms[of_driving] = found.transform
        people.append(
            judge(found, (of_reference, of_driving), moving_seen[:, of_driving], frame[0] / 2)
        )
    main = transforms[pairs[0][1]]
    each = [transforms.get(person, main) for person in range(moving.shape[1])]
    moved = torch.stack([apply(t, moving[:, i]) for i, t in enumerate(each)], 1)
    keypoints = from_isotropic(moved.numpy(), ref_w, ref_h)
    return Retargeted(keypoints, tuple(people), settings.per_frame)


def unaligned(
    driving: np.ndarray,
    sizes: tuple[Size, Size],
    pairs: Sequence[tuple[int, int]] = ((0, 0),),
) -> Retargeted:
    """Driving poses `(T, P, K, 2)` as they are: the same place in isotropic coordinates.

    Args:
        pairs: (reference person, driving person), the main pair first.
    """
    (ref_h, ref_w), (drv_h, drv_w) = sizes
    points = from_isotropic(to_isotropic(driving, drv_w, drv_h), ref_w, ref_h)
    people = (
        PersonAlignment(method="none", reference=still, driving=moving, frames=len(driving))
        for still, moving in pairs
    )
    return Retargeted(points, tuple(people))


def matched(
    reference: Poses,
    driving: Poses,
    sizes: tuple[Size, Size],
    thresholds: tuple[float, float],
    order: Sequence[int] = (),
) -> list[tuple[int, int]]:
    """Who moves whom, as in `retarget`: (reference person, driving person), the main pair first."""
    still, still_seen, moving, moving_seen = _seen_people(reference, driving, sizes, thresholds)
    return match_people(still, still_seen, moving[:, :, BODY], moving_seen, order)


def _seen_people(
    reference: Poses, driving: Poses, sizes: tuple[Size, Size], thresholds: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bodies of the reference `(P, N, 2)` and what is seen of them `(P, N)`; all points of the
    driving people `(T, P, K, 2)` and what is seen of their bodies `(T, P, N)`."""
    (ref_h, ref_w), (drv_h, drv_w) = sizes
    moving = torch.from_numpy(to_isotropic(driving[0].astype(np.float32), drv_w, drv_h))
    still = _people(reference[0].astype(np.float32)[..., BODY, :], 3)
    still = torch.from_numpy(to_isotropic(still, ref_w, ref_h))
    still_seen = _seen(_people(reference[1][..., BODY], 2), still, thresholds[0])
    moving_seen = _seen(driving[1][..., BODY], moving[:, :, BODY], thresholds[1])
    return still, still_seen, moving, moving_seen


def _align(
    block: AlignmentBlock | None,
    reference: Tensor,
    driven: Tensor,
    weight: Tensor,
    frame: Tensor,
    settings: AlignmentSettings,
) -> Found:
    """One person: reference `(N, 2)`, driven `(T, N, 2)`, weight `(T, N)`."""
    fallen_back = False
    if block is not None and not learnable(driven, reference.expand_as(driven), weight).any():
        block, fallen_back = None, True
    sums: ClipSums | None = None
    by_frame: list[Similarity] = []
    for start in range(0, len(driven), _PORTION):
        part = slice(start, start + _PORTION)
        poses, seen = driven[None, part], weight[None, part]
        frames = align_frames(block, reference[None], poses, seen, frame, whole=False)
        portion = sum_frames(frames, poses, seen)
        sums = portion if sums is None else sums.plus(portion)
        if settings.per_frame:
            by_frame.append(_of_frames(frames, poses, seen, settings))
    assert sums is not None, "a driving clip has at least one frame"
    clip = align_clip(sums, settings)
    method = "closed_form" if block is None else "learned"
    transform = clip.transform
    if not clip.frames.item():
        transform, method = _translation(reference, driven, weight)
    elif clip.aligned.item():
        method = "kept"
    elif settings.per_frame:
        transform = Similarity(*(torch.cat(field) for field in zip(*by_frame, strict=True)))
    return Found(method, fallen_back, transform, clip, reference, driven, weight, settings)


def _of_frames(
    frames: FrameAlignment, driven: Tensor, weight: Tensor, settings: AlignmentSettings
) -> Similarity:
    held = limit_frames(frames.transform, driven, weight, settings)
    return Similarity(*(field[0] for field in held))


def _translation(reference: Tensor, driven: Tensor, weight: Tensor) -> tuple[Similarity, str]:
    """The shift between the joints in common, over all frames."""
    transform = identity((1,), driven)
    total = weight.sum()
    if not total > 0:
        return transform, "none"
    off = torch.where((weight > 0)[..., None], reference - driven, torch.zeros_like(driven))
    shift = (off * weight[..., None]).sum((0, 1)) / total
    return transform._replace(shift=shift[None]), "translation"


def _people(values: np.ndarray, dims: int) -> np.ndarray:
    """With an axis for people where there was none."""
    return values if values.ndim == dims else values[None]


def _seen(score: np.ndarray, points: Tensor, threshold: float) -> Tensor:
    """Confidence of joints that are seen, 0 for the others and for places that are none."""
    confidence = torch.from_numpy(np.nan_to_num(score.astype(np.float32)))
    return confidence * (confidence >= threshold) * points.isfinite().all(-1)
