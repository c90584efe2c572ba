"""What to tell people about an alignment: its figures, how far to trust it, and why not.

Shapes: T frames, N = 18 joints.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor

from animator.keypoints import SimilarityRange
from animator.similarity import Similarity, apply, solvable
from inference.clip_alignment import AlignmentSettings, ClipAlignment

Method = Literal["learned", "closed_form", "kept", "translation", "none"]
Confidence = Literal["high", "medium", "low", "unknown"]

# Of the expected error, in sizes of the reference person (root mean square of its joints).
HIGH, MEDIUM = 0.4, 0.65
FEW_JOINTS = 6.0  # in common, in the mean
FEW_FRAMES = 0.1  # share of the clip
OUTSIDE = 0.2  # share of the joints that leave the frame
DISAGREE_SCALE, DISAGREE_DEGREES = 0.5, 20.0  # deviations over frames
TRAINED = SimilarityRange()  # what the block was trained to undo
_MARGIN = 1.1

NOTES = {
    "few": "no frame shares six joints with the reference: aligned in closed form",
    "kept": "the poses already fit the reference: left where they are",
    "translation": "no frame shares three joints with the reference: moved by the mean shift of "
    "the joints they share, neither scaled nor turned",
    "none": "no joint is seen in both the reference and the driving clip: left where they are",
}


class Found(NamedTuple):
    """One person's alignment, before it is judged."""

    method: str
    fallen_back: bool  # whether the closed form stands in for the block
    transform: Similarity  # fields (1,) or, a frame each, (T,)
    clip: ClipAlignment  # of one clip
    reference: Tensor  # (N, 2)
    driven: Tensor  # (T, N, 2)
    weight: Tensor  # (T, N)
    settings: AlignmentSettings


@dataclass(frozen=True, kw_only=True)
class PersonAlignment:
    """How one person's poses were moved; the transform is the clip's also where frames have
    their own."""

    method: str
    reference: int = 0  # number of the reference person
    driving: int = 0  # number of the driving person
    scale: float = 1.0
    degrees: float = 0.0
    shift: tuple[float, float] = (0.0, 0.0)  # of the longer side, x and y
    scale_spread: float = 0.0  # deviation of the frames' ln scale
    degrees_spread: float = 0.0
    place_spread: float = 0.0  # of the longer side
    frames_used: int = 0
    frames: int = 0
    joints: float = 0.0  # in common, in the mean over frames
    expected_error: float | None = None  # mean distance of the joints, of the longer side
    confidence: Confidence = "unknown"
    most_alike: int | None = None  # frame whose pose is most like the reference's
    outside: float = 0.0  # share of the seen joints that leave the reference's frame
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = field(default=())

    def describe(self) -> str:
        """One sentence for people."""
        if self.method == "none":
            return self.notes[0] if self.notes else "poses used as they are (no alignment)"
        if self.method == "kept":
            return self.notes[0]
        x, y = (100 * v for v in self.shift)
        moved = f"moved by {x:+.1f} % and {y:+.1f} % of the longer side"
        if self.method == "translation":
            return f"poses {moved} (too few joints in common for scale and rotation)"
        sure = "" if self.confidence == "unknown" else f", confidence {self.confidence}"
        return (
            f"poses scaled by {self.scale:.2f}, turned by {self.degrees:+.1f}°, {moved} "
            f"({self.method.replace('_', ' ')}, {self.frames_used} frames agree to "
            f"{100 * self.scale_spread:.0f} % and {self.degrees_spread:.1f}°{sure})"
        )

    def record(self) -> dict[str, Any]:
        """For the JSON beside an output."""
        rounded = {
            "scale": round(self.scale, 5),
            "degrees": round(self.degrees, 4),
            "shift": [round(v, 5) for v in self.shift],
            "scale_spread": round(self.scale_spread, 5),
            "degrees_spread": round(self.degrees_spread, 4),
            "place_spread": round(self.place_spread, 5),
            "joints": round(self.joints, 2),
            "outside": round(self.outside, 4),
            "expected_error": None
            if self.expected_error is None
            else round(self.expected_error, 5),
        }
        return {**vars(self), **rounded, "notes": [*self.notes], "warnings": [*self.warnings]}


def judge(
    found: Found, pair: tuple[int, int], driven_seen: Tensor, half: Tensor
) -> PersonAlignment:
    """The figures of an alignment and whether they can be trusted.

    Args:
        pair: numbers of the reference person and the driving person.
        driven_seen: confidence of the driving joints, 0 where one is not seen, `(T, N)`.
        half: half height and half width of the reference's frame, `(2,)`.
    """
    clip, weight = found.clip, found.weight
    joints = float((weight > 0).sum(-1).float().mean())
    moved = apply(found.transform, found.driven)
    outside = (moved.abs() > half.flip(0)).any(-1) & (driven_seen > 0)
    share = float(outside.sum() / (driven_seen > 0).sum().clamp_min(1))
    # Of the transform that was found, before a note says that it is not used.
    transform = clip.transform if found.method != "translation" else found.transform
    aligned = found.method in ("learned", "closed_form", "kept")
    error = float(clip.error) if aligned and math.isfinite(float(clip.error)) else None
    figures = PersonAlignment(
        method=found.method,
        reference=pair[0],
        driving=pair[1],
        scale=float(transform.scale),
        degrees=float(transform.degrees),
        shift=(float(transform.shift[0, 0]), float(transform.shift[0, 1])),
        scale_spread=float(clip.spread.log_scale) if aligned else 0.0,
        degrees_spread=float(clip.spread.degrees) if aligned else 0.0,
        place_spread=float(clip.spread.place) if aligned else 0.0,
        frames_used=int(clip.frames),
        frames=len(found.driven),
        joints=joints,
        expected_error=error,
        confidence=_confidence(error, found.reference, weight),
        most_alike=_most_alike(moved, found) if aligned else None,
        outside=share,
        notes=_notes(found),
    )
    warnings = _warnings(figures, limited=bool(clip.limited), settings=found.settings)
    return PersonAlignment(**{**vars(figures), "warnings": tuple(warnings)})


def _notes(found: Found) -> tuple[str, ...]:
    if found.method in NOTES:
        return (NOTES[found.method],)
    return (NOTES["few"],) if found.fallen_back else ()


def _confidence(error: float | None, reference: Tensor, weight: Tensor) -> Confidence:
    seen = (weight > 0).any(0)
    if error is None or not seen.any():
        return "unknown"
    points = reference[seen]
    size = float((points - points.mean(0)).square().sum(-1).mean().sqrt())
    relative = error / max(size, 1e-6)
    return "high" if relative < HIGH else "medium" if relative < MEDIUM else "low"


def _most_alike(moved: Tensor, found: Found) -> int:
    """The frame whose aligned pose lies nearest to the reference's, of those with most in common.

    A joint that is missing counts as one that is as far off as the reference is large.
    """
    weight, reference = found.weight, found.reference
    solved = solvable(found.driven, reference.expand_as(found.driven), weight)
    off = (moved - reference).norm(dim=-1).nan_to_num(0)
    most = (weight > 0).any(0)
    size = (reference[most] - reference[most].mean(0)).norm(dim=-1).mean()
    cost = (off * (weight > 0) + size * ((weight <= 0) & most)).sum(-1)
    cost = cost.masked_fill(~solved, math.inf)
    return int(cost.argmin())


def _warnings(found: PersonAlignment, *, limited: bool, settings: AlignmentSettings) -> list[str]:
    texts = []
    if found.method == "translation" or found.method == "none":
        return [found.notes[0]] if found.notes else []
    if limited:
        texts.append(
            f"the transform found was beyond the limits (scale {settings.max_scale:g}, "
            f"{settings.max_rotation:g}°) and held there"
        )
    if not 1 / (_MARGIN * TRAINED.scale) <= found.scale <= _MARGIN * TRAINED.scale:
        texts.append(
            f"the scale of {found.scale:.2f} is extreme: alignment is tested for factors up to "
            f"{TRAINED.scale:g}"
        )
    if abs(found.degrees) > _MARGIN * TRAINED.rotation:
        texts.append(
            f"the rotation of {found.degrees:+.0f}° is extreme: alignment is tested for up to "
            f"{TRAINED.rotation:g}°"
        )
    if found.joints < FEW_JOINTS:
        texts.append(
            f"only {found.joints:.1f} joints are seen in both poses in the mean: choose a picture "
            "that shows what the clip shows"
        )
    if found.frames_used < FEW_FRAMES * found.frames:
        texts.append(
            f"only {found.frames_used} of {found.frames} frames could be used to align the clip"
        )
    if found.scale_spread > DISAGREE_SCALE or found.degrees_spread > DISAGREE_DEGREES:
        texts.append(
            f"the frames disagree (scale to {100 * found.scale_spread:.0f} %, rotation to "
            f"{found.degrees_spread:.0f}°)"
        )
    if found.outside > OUTSIDE:
        texts.append(
            f"{100 * found.outside:.0f} % of the moving joints leave the picture: choose a "
            "picture with more room around the person"
        )
    if found.confidence == "low":
        texts.append("the alignment is unsure: look at it before computing a video")
    return texts
