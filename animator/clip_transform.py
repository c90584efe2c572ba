"""One similarity for a clip from those of its frames (ours).

A misalignment is constant over a clip; the person's own motion is not part of it. Scale, rotation
and the place each frame's transform gives its own centre are averaged over the frames, each with
the weight the alignment block gives it: frames in which the driven person looks like the
reference say more. The averages are sums over frames, so a clip may come in portions of any
length and none of it is kept.

Shapes: `...` any batch, T frames, N joints. Coordinates are isotropic (`animator.keypoints`).
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from animator.similarity import Similarity, apply, joint_centres, rotate

MAX_VOTE = 8.0  # of a logit: no frame outweighs another by more than e to twice this
OUTLIER = 6.0  # deviations from the median, beyond which a frame of a portion has no say
_DEVIATION = 1.4826  # of a normal distribution, in median absolute deviations
_FLOOR = 0.02  # of ln scale, radians, longer sides: no deviation is taken to be smaller
_TINY = 1e-12


class Spread(NamedTuple):
    """How far the frames of a clip disagree: weighted deviations, `(...)` each."""

    log_scale: Tensor
    degrees: Tensor
    place: Tensor  # of the longer side


class ClipSums(NamedTuple):
    """Sums over frames, all that is kept of the portions seen so far."""

    scale: Tensor  # (..., 3): of weight; of weight times ln scale, and its square
    turn: Tensor  # (..., 3): of weight; of weight times (cos, sin)
    place: Tensor  # (..., 6): of weight; of weight times place, its square, and the centre
    error: Tensor  # (...): of weight of the place times expected error
    joints: Tensor  # (..., 4): of seen joints; of their coordinates, and their square
    frames: Tensor  # (...): frames that counted

    @classmethod
    def of(
        cls,
        transforms: Similarity,
        votes: Tensor,
        error: Tensor,
        driven: Tensor,
        weight: Tensor,
        counted: Tensor,
    ) -> Self:
        """The sums over the frames of one portion.

        Args:
            transforms: fields of shape `(..., T)` and `(..., T, 2)`.
            votes: logits of the weights of scale, rotation and place, `(..., T, 3)`.
            error: expected mean distance after alignment, `(..., T)`.
            driven: the driven poses, `(..., T, N, 2)`.
            weight: confidence that a joint is seen in both poses, `(..., T, N)`.
            counted: False leaves a frame out, `(..., T)`.
        """
        counts = votes.clamp(-MAX_VOTE, MAX_VOTE).exp() * counted[..., None]
        of_scale, of_turn, of_place = (part[..., None] for part in counts.unbind(-1))
        log_scale = transforms.scale.log()[..., None]
        direction = torch.stack([transforms.cos, transforms.sin], -1)
        centres = joint_centres(driven, weight)
        places = apply(transforms, centres[..., None, :])[..., 0, :]
        square = places.square().sum(-1, keepdim=True)
        one = torch.ones_like(square)
        seen = ((weight > 0) & counted[..., None])[..., None]
        points = torch.where(seen, driven, torch.zeros_like(driven))
        return cls(
            (of_scale * torch.cat([one, log_scale, log_scale.square()], -1)).sum(-2),
            (of_turn * torch.cat([one, direction], -1)).sum(-2),
            (of_place * torch.cat([one, places, square, centres], -1)).sum(-2),
            (of_place[..., 0] * error).sum(-1),
            torch.cat([seen.to(points), points, points.square().sum(-1, True)], -1).sum((-3, -2)),
            counted.sum(-1),
        )

    def plus(self, other: "ClipSums") -> "ClipSums":
        """The sums over the frames of both."""
        return ClipSums(*(a + b for a, b in zip(self, other, strict=True)))

    def transform(self) -> Similarity:
        """The clip's transform, fields `(...)` and `(..., 2)`; the identity for nothing."""
        some = self.frames > 0
        one = torch.ones_like(self.error)
        scale = (self.scale[..., 1] / self.scale[..., 0].clamp_min(_TINY)).exp()
        length_squared = self.turn[..., 1:].square().sum(-1)
        turned = some & (length_squared > _TINY**2)
        length = torch.where(turned, length_squared, one).sqrt()
        cos = torch.where(turned, self.turn[..., 1] / length, one)
        sin = torch.where(turned, self.turn[..., 2] / length, torch.zeros_like(one))
        return self.placed(torch.where(some, scale, one), cos, sin)

    def placed(self, scale: Tensor, cos: Tensor, sin: Tensor) -> Similarity:
        """The similarity of this scale and rotation that moves the person to the clip's place."""
        total = self.place[..., :1].clamp_min(_TINY)
        place, centre = self.place[..., 1:3] / total, self.place[..., 4:] / total
        shift = place - scale[..., None] * rotate(centre[..., None, :], cos, sin)[..., 0, :]
        some = (self.frames > 0)[..., None]
        return Similarity(scale, cos, sin, torch.where(some, shift, torch.zeros_like(shift)))

    def spread(self) -> Spread:
        """How far the frames disagree; 0 for one frame."""
        total = self.scale[..., 0].clamp_min(_TINY)
        log_scale = self.scale[..., 2] / total - (self.scale[..., 1] / total).square()
        length = self.turn[..., 1:].norm(dim=-1) / self.turn[..., 0].clamp_min(_TINY)
        # Of a wrapped normal distribution, from the length of the mean direction.
        turned = -2 * length.clamp(_TINY, 1).log()
        total = self.place[..., :1].clamp_min(_TINY)
        place = self.place[..., 3] / total[..., 0] - (self.place[..., 1:3] / total).square().sum(-1)
        some = self.frames > 0
        log_scale, turned, place = (
            torch.where(some, value.clamp_min(0).sqrt(), torch.zeros_like(value))
            for value in (log_scale, turned, place)
        )
        return Spread(log_scale, torch.rad2deg(turned), place)

    def expected_error(self) -> Tensor:
        """Mean of the frames' expected errors, `(...)`."""
        return self.error / self.place[..., 0].clamp_min(_TINY)

    def displacement(self, transform: Similarity) -> Tensor:
        """Root mean square of how far `transform` moves the seen joints, `(...)`."""
        total = self.joints[..., 0].clamp_min(_TINY)
        mean = self.joints[..., 1:3] / total[..., None]
        real, imaginary = transform.scale * transform.cos - 1, transform.scale * transform.sin
        moved = torch.stack(
            [
                real * mean[..., 0] - imaginary * mean[..., 1],
                imaginary * mean[..., 0] + real * mean[..., 1],
            ],
            -1,
        )
        square = (real.square() + imaginary.square()) * self.joints[..., 3] / total
        square = square + 2 * (moved * transform.shift).sum(-1) + transform.shift.square().sum(-1)
        return square.clamp_min(0).sqrt()


@torch.no_grad()
def outliers(transforms: Similarity, driven: Tensor, weight: Tensor, counted: Tensor) -> Tensor:
    """Frames whose transform is far from those of the others, `(..., T)`: those of another person.

    Arguments are those of `ClipSums.of`.
    """
    places = apply(transforms, joint_centres(driven, weight)[..., None, :])[..., 0, :]
    mean = torch.atan2(
        (transforms.sin * counted).sum(-1, keepdim=True),
        (transforms.cos * counted).sum(-1, keepdim=True),
    )
    turned = torch.atan2(transforms.sin, transforms.cos) - mean
    turned = torch.atan2(turned.sin(), turned.cos())
    values = torch.stack([transforms.scale.log(), turned, places[..., 0], places[..., 1]], -1)
    values = torch.where(counted[..., None], values, torch.full_like(values, torch.nan))
    off = (values - values.nanmedian(-2, keepdim=True).values).abs()
    deviation = _DEVIATION * off.nanmedian(-2, keepdim=True).values
    return (off > OUTLIER * deviation.clamp_min(_FLOOR)).any(-1)
