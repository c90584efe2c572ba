"""Clips of poses to transforms: one a frame (the paper's), and one a clip (ours).

Shapes: B clips, T frames, N = 18 joints; transforms of frames have fields `(B, T)` and
`(B, T, 2)`, of clips `(B,)` and `(B, 2)`. Coordinates are isotropic (`animator.keypoints`).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from animator.alignment import NUM_VOTES, AlignmentBlock
from animator.clip_transform import ClipSums, Spread, outliers
from animator.similarity import (
    Similarity,
    apply,
    common_joints,
    fit,
    identity,
    joint_centres,
    solvable,
)

_BLOCK_FRAMES = 128  # frames that go through the block at once; more fall out of the cache
MIN_LEARNED = 6  # joints in common; with fewer, such as a head alone, the closed form is better
# A transform that moves the person less than this many expected errors is taken to be none, but
# never one that moves it further than this, of the longer side: to be unsure is no reason.
ALREADY_ALIGNED, FURTHEST_ALIGNED = 2.0, 0.08


@dataclass(frozen=True, kw_only=True)
class AlignmentSettings:
    """How poses are moved onto a reference; a similarity beyond the limits is held at them."""

    per_frame: bool = False  # a transform for each frame (the paper's) instead of one a clip
    max_scale: float = 4.0  # factor either way
    max_rotation: float = 60.0  # degrees either way
    keep_aligned: bool = True  # leave poses that need no alignment as they are
    # Of several: which person of the picture each person of the clip becomes, both from left to
    # right, the picture's counted from 1. None: in the same order.
    people: tuple[int, ...] = ()
    others: bool = False  # draw people of the clip who become nobody of the picture, too

    def __post_init__(self) -> None:
        if not 1 <= self.max_scale <= 100:
            raise ValueError(
                f"alignment.max_scale is {self.max_scale}, expected a factor of 1 (no scaling) to "
                "100."
            )
        if not 0 <= self.max_rotation <= 180:
            raise ValueError(
                f"alignment.max_rotation is {self.max_rotation}, expected degrees in 0..180."
            )


class FrameAlignment(NamedTuple):
    """What is known of each frame."""

    transform: Similarity
    votes: Tensor  # (B, T, 3)
    error: Tensor  # (B, T), of the longer side; NaN for the closed form
    solved: Tensor  # (B, T), whether the frame counts: rotation and scale could be found


class ClipAlignment(NamedTuple):
    """One transform for each clip."""

    transform: Similarity
    spread: Spread
    error: Tensor  # (B,), expected distance of a frame, of the longer side; NaN: not known
    displacement: Tensor  # (B,), how far the transform found moves the joints, of the longer side
    frames: Tensor  # (B,), frames that counted
    limited: Tensor  # (B,), whether it was held at a limit
    aligned: Tensor  # (B,), whether the poses were found to need no alignment


@torch.no_grad()
def align_frames(
    block: AlignmentBlock | None,
    reference: Tensor,
    driven: Tensor,
    weight: Tensor,
    frame: Tensor,
    *,
    whole: bool = True,
) -> FrameAlignment:
    """Each frame's own transform, by the block, or in closed form without one.

    Frames with few joints in common get the closed form's, and count only in clips that have no
    others.

    Args:
        reference: `(B, N, 2)`.
        driven: `(B, T, N, 2)`.
        weight: confidence that a joint is seen in both poses, `(B, T, N)`.
        frame: height and width of the reference's frame, of the longer one, `(B, 2)`.
        whole: False for portions of clips that have frames with enough joints.
    """
    shape = weight.shape[:2]
    references = reference[:, None].expand_as(driven)
    solved = solvable(driven, references, weight)
    nothing = driven.new_zeros((*shape, NUM_VOTES))
    closed = FrameAlignment(
        fit(driven, references, weight), nothing, driven.new_full(shape, torch.nan), solved
    )
    if block is None:
        return closed
    frames = frame[:, None].expand(*shape, 2)
    flat = [part.flatten(0, 1) for part in (references, driven, weight, frames)]
    portions = zip(*(part.split(_BLOCK_FRAMES) for part in flat), strict=True)
    found = [block(*portion) for portion in portions]
    transform = Similarity(
        *(
            torch.cat(field).unflatten(0, shape)
            for field in zip(*(estimate.transform for estimate in found), strict=True)
        )
    )
    votes, error = (
        torch.cat(part).unflatten(0, shape)
        for part in zip(*(estimate[1:] for estimate in found), strict=True)
    )
    enough = learnable(driven, references, weight)
    chosen = Similarity(
        *(choose(enough, *fields) for fields in zip(transform, closed.transform, strict=True))
    )
    few = ~enough.any(1, keepdim=True) & whole
    return FrameAlignment(
        chosen,
        choose(few, nothing, votes),
        choose(few, closed.error, error),
        torch.where(few, solved, solved & enough),
    )


def learnable(driven: Tensor, reference: Tensor, weight: Tensor) -> Tensor:
    """Whether a frame has the joints in common that the learned block needs, `(...)`."""
    return (common_joints(driven, reference, weight) > 0).sum(-1) >= MIN_LEARNED


def choose(choice: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """`torch.where` for fields with one axis more than the choice, or none."""
    return torch.where(choice[..., None] if yes.ndim > choice.ndim else choice, yes, no)


def sum_frames(frames: FrameAlignment, driven: Tensor, weight: Tensor) -> ClipSums:
    """What frames say of their clip; portions of a long clip are added with `ClipSums.plus`."""
    counted = frames.solved & ~outliers(frames.transform, driven, weight, frames.solved)
    return ClipSums.of(frames.transform, frames.votes, frames.error, driven, weight, counted)


def align_clip(sums: ClipSums, settings: AlignmentSettings) -> ClipAlignment:
    """The clip's transform from the sums over its frames, within the limits.

    A person that would hardly be moved, by the measure of the error to expect, is left alone:
    among all misalignments none at all is a likely one, and a small one is not.
    """
    found = sums.transform()
    transform, limited = limit(found, settings)
    transform = sums.placed(transform.scale, transform.cos, transform.sin)
    error, displacement = sums.expected_error(), sums.displacement(found)
    # Never where the error is not known.
    aligned = displacement < (ALREADY_ALIGNED * error).clamp_max(FURTHEST_ALIGNED)
    aligned = aligned & settings.keep_aligned & (sums.frames > 0)
    nothing = identity(aligned.shape, error)
    transform = Similarity(
        *(choose(aligned, *fields) for fields in zip(nothing, transform, strict=True))
    )
    return ClipAlignment(
        transform, sums.spread(), error, displacement, sums.frames, limited & ~aligned, aligned
    )


def limit(transform: Similarity, settings: AlignmentSettings) -> tuple[Similarity, Tensor]:
    """Scale and rotation within the limits, and whether they were not; the shift stays as it is."""
    most = math.log(settings.max_scale)
    log_scale, angle = transform.scale.log(), torch.atan2(transform.sin, transform.cos)
    widest = math.radians(settings.max_rotation)
    beyond = (log_scale.abs() > most) | (angle.abs() > widest)
    held = angle.clamp(-widest, widest)
    scale = log_scale.clamp(-most, most).exp()
    kept = Similarity(scale, held.cos(), held.sin(), transform.shift)
    fields = zip(kept, transform, strict=True)
    return Similarity(*(choose(beyond, *field) for field in fields)), beyond


def limit_frames(
    transform: Similarity, driven: Tensor, weight: Tensor, settings: AlignmentSettings
) -> Similarity:
    """Transforms of frames within the limits; each frame's centre stays where it was moved."""
    held, _ = limit(transform, settings)
    centre = joint_centres(driven, weight)
    return moved_to(held, centre, transform)


def moved_to(transform: Similarity, centre: Tensor, like: Similarity) -> Similarity:
    """`transform` with the shift that moves `centre` `(..., 2)` to where `like` moves it."""
    place, now = (apply(t, centre[..., None, :])[..., 0, :] for t in (like, transform))
    return transform._replace(shift=transform.shift + place - now)
