"""From driving poses to poses on the reference: alignment pooled over the clip.

Shapes: T frames, P people, K keypoints (18 or 128), N = 18 of them the body's. Keypoints are 0..1
of their frame; the similarity works in isotropic coordinates (`animator.keypoints`).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from animator.alignment import AlignmentBlock
from animator.keypoints import BODY, from_isotropic, to_isotropic
from animator.similarity import MIN_COMMON, Similarity, apply, fit, identity, rotate

Size = tuple[int, int]  # (height, width)


@dataclass(frozen=True)
class Retargeted:
    """Driving poses moved onto the reference, and what was done to them."""

    keypoints: np.ndarray  # (T, P, K, 2) in 0..1 of the reference's frame
    method: str  # learned | closed_form | none
    scale: float
    degrees: float
    shift: tuple[float, float]  # of the longer side, x and y
    scale_spread: float  # deviation of the frames' ln scale
    degrees_spread: float
    frames_used: int

    def describe(self) -> str:
        """One sentence for people."""
        if self.method == "none":
            return "poses used as they are (no alignment)"
        x, y = (100 * v for v in self.shift)
        return (
            f"poses scaled by {self.scale:.2f}, turned by {self.degrees:+.1f}°, moved by "
            f"{x:+.1f} % and {y:+.1f} % of the longer side ({self.method.replace('_', ' ')}, "
            f"{self.frames_used} frames agree to {100 * self.scale_spread:.0f} % and "
            f"{self.degrees_spread:.1f}°)"
        )

    def record(self) -> dict[str, Any]:
        """For the JSON beside an output."""
        return {
            "method": self.method,
            "scale": round(self.scale, 5),
            "degrees": round(self.degrees, 4),
            "shift": [round(v, 5) for v in self.shift],
            "scale_spread": round(self.scale_spread, 5),
            "degrees_spread": round(self.degrees_spread, 4),
            "frames_used": self.frames_used,
        }


def common_weight(reference: Tensor, driven: Tensor, thresholds: tuple[float, float]) -> Tensor:
    """Confidence that a joint is seen in both poses, 0 where it is not; `(T, N)`."""
    seen = (reference >= thresholds[0]) & (driven >= thresholds[1])
    return torch.minimum(reference, driven) * seen


def pool(transforms: Similarity, centres: Tensor, weight: Tensor) -> Similarity:
    """One similarity for a clip from those of its frames (ours).

    A misalignment is constant over a clip; the person's own motion is not part of it. Scale,
    rotation and the place that each frame's transform gives its own centre are pooled by
    medians, so that frames with a bad pose have no say.

    Args:
        transforms: fields of shape `(T,)` and `(T, 2)`.
        centres: centre of each frame's common joints, `(T, 2)`.
        weight: 0 leaves a frame out, `(T,)`.
    """
    used = weight > 0
    if not used.any():
        return identity((), centres)
    chosen = Similarity(*(field[used] for field in transforms))
    centres = centres[used]
    scale = chosen.scale.log().quantile(0.5).exp()
    mean = torch.atan2(chosen.sin.sum(), chosen.cos.sum())
    turned = torch.atan2(chosen.sin, chosen.cos) - mean
    turned = torch.atan2(turned.sin(), turned.cos())  # to -pi..pi, so that a median makes sense
    angle = mean + turned.quantile(0.5)
    cos, sin = angle.cos(), angle.sin()
    places = apply(chosen, centres[:, None])[:, 0]
    shifts = places - scale * rotate(centres, cos, sin)
    return Similarity(scale, cos, sin, shifts.quantile(0.5, dim=0))


def pool_clip(transforms: Similarity, points: Tensor, weight: Tensor) -> Similarity:
    """One similarity for a clip; frames that no rotation can be found for have no say.

    Args:
        transforms: fields of shape `(T,)` and `(T, 2)`.
        points: the driven poses, `(T, N, 2)`.
        weight: confidence that a joint is seen in both poses, `(T, N)`.
    """
    centres = (points * weight[..., None]).sum(1) / weight.sum(1, keepdim=True).clamp_min(1e-6)
    return pool(transforms, centres, solved(weight))


def solved(weight: Tensor) -> Tensor:
    """How much each frame counts `(T,)`: 0 where too few joints `(T, N)` are common."""
    return ((weight > 0).sum(1) >= MIN_COMMON) * weight.sum(1)


@torch.no_grad()
def retarget(
    block: AlignmentBlock | None,
    reference: tuple[np.ndarray, np.ndarray],
    driving: tuple[np.ndarray, np.ndarray],
    sizes: tuple[Size, Size],
    thresholds: tuple[float, float],
    *,
    per_frame: bool = False,
) -> Retargeted:
    """Align driving poses to the reference pose; the first person's body decides for all.

    Args:
        block: the learned block, or None for the closed form alone.
        reference: keypoints `(K, 2)` and score `(K,)`; K may be another than the driving poses'.
        driving: keypoints `(T, P, K, 2)` and score `(T, P, K)`.
        sizes: of the reference's and of the driving frame.
        thresholds: score from which a joint is seen, in the reference and in the driving clip.
        per_frame: a transform for each frame (the paper's variant) instead of one a clip.
    """
    (ref_h, ref_w), (drv_h, drv_w) = sizes
    keypoints = torch.from_numpy(to_isotropic(driving[0].astype(np.float32), drv_w, drv_h))
    target = torch.from_numpy(to_isotropic(reference[0][BODY].astype(np.float32), ref_w, ref_h))
    ref_score, score = (
        torch.from_numpy(s[..., BODY].astype(np.float32)) for s in (reference[1], driving[1])
    )
    main = keypoints[:, 0, BODY]
    target = target.expand_as(main)
    weight = common_weight(ref_score.expand(len(main), -1), score[:, 0], thresholds)
    per = fit(main, target, weight) if block is None else block(target, main, weight)
    clip = pool_clip(per, main, weight)
    moved = apply(
        Similarity(*(f[:, None] for f in per))
        if per_frame
        else Similarity(*(f[None, None] for f in clip)),
        keypoints,
    )
    used = solved(weight) > 0
    turned = per.degrees[used] - clip.degrees
    return Retargeted(
        keypoints=from_isotropic(moved.numpy(), ref_w, ref_h),
        method="closed_form" if block is None else "learned",
        scale=float(clip.scale),
        degrees=float(clip.degrees),
        shift=(float(clip.shift[0]), float(clip.shift[1])),
        scale_spread=_deviation(per.scale[used].log()),
        degrees_spread=_deviation((turned + 180) % 360 - 180),
        frames_used=int(used.sum()),
    )


def unaligned(driving: np.ndarray, sizes: tuple[Size, Size]) -> Retargeted:
    """Driving poses `(T, P, K, 2)` as they are: the same place in isotropic coordinates."""
    (ref_h, ref_w), (drv_h, drv_w) = sizes
    points = from_isotropic(to_isotropic(driving, drv_w, drv_h), ref_w, ref_h)
    return Retargeted(points, "none", 1.0, 0.0, (0.0, 0.0), 0.0, 0.0, 0)


def _deviation(values: Tensor) -> float:
    return float(values.std()) if len(values) > 1 else 0.0
