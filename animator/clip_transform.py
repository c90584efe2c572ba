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

from animator.similarity import Similarity, apply, rotate

MAX_VOTE = 8.0  # of a logit: no frame outweighs another by more than e to twice this
OUTLIER = 6.0  # deviations from the median, beyond which a frame of a portion has no say
_DEVIATION = 1.4826  # of a normal distribution, in median absolute deviations
_FLOOR = 0.02  # of ln scale, radians, longer sides: closer to the median is never an outlier
_TINY = 1e-12


class ClipSums(NamedTuple):
    """Sums over frames, all that is known of the portions seen so far."""

    scale: Tensor  # (..., 2): of weight, and of weight times ln scale
    turn: Tensor  # (..., 2): of weight times (cos, sin)
    place: Tensor  # (..., 5): of weight, of weight times place, of weight times centre
    frames: Tensor  # (...), frames that counted

    @classmethod
    def of(cls, transforms: Similarity, votes: Tensor, centres: Tensor, counted: Tensor) -> Self:
        """The sums over the frames of one portion.

        Args:
            transforms: fields of shape `(..., T)` and `(..., T, 2)`.
            votes: logits of the weights of scale, rotation and place, `(..., T, 3)`.
            centres: centre of each frame's common joints in the driving clip, `(..., T, 2)`.
            counted: False leaves a frame out, `(..., T)`.
        """
        weight = votes.clamp(-MAX_VOTE, MAX_VOTE).exp() * counted[..., None]
        of_scale, of_turn, of_place = weight.unbind(-1)
        places = apply(transforms, centres[..., None, :])[..., 0, :]
        direction = torch.stack([transforms.cos, transforms.sin], -1)
        with_place = torch.cat([torch.ones_like(places[..., :1]), places, centres], -1)
        return cls(
            torch.stack([of_scale, of_scale * transforms.scale.log()], -1).sum(-2),
            (of_turn[..., None] * direction).sum(-2),
            (of_place[..., None] * with_place).sum(-2),
            counted.sum(-1),
        )

    def plus(self, other: "ClipSums") -> "ClipSums":
        """The sums over the frames of both."""
        return ClipSums(*(a + b for a, b in zip(self, other, strict=True)))

    def transform(self) -> Similarity:
        """The clip's transform, fields `(...)` and `(..., 2)`; the identity for nothing."""
        some = self.frames > 0
        one = torch.ones_like(self.scale[..., 0])
        scale = (self.scale[..., 1] / self.scale[..., 0].clamp_min(_TINY)).exp()
        length_squared = self.turn.square().sum(-1)
        turned = some & (length_squared > _TINY**2)
        length = torch.where(turned, length_squared, one).sqrt()
        cos = torch.where(turned, self.turn[..., 0] / length, one)
        sin = torch.where(turned, self.turn[..., 1] / length, torch.zeros_like(one))
        place, centre = self.places()
        scale = torch.where(some, scale, one)
        shift = place - scale[..., None] * rotate(centre[..., None, :], cos, sin)[..., 0, :]
        return Similarity(scale, cos, sin, torch.where(some[..., None], shift, 0 * shift))

    def places(self) -> tuple[Tensor, Tensor]:
        """Where the person's centre is moved to, and from, on average; `(..., 2)` each."""
        total = self.place[..., :1].clamp_min(_TINY)
        return self.place[..., 1:3] / total, self.place[..., 3:] / total


def pool_frames(
    transforms: Similarity, votes: Tensor, centres: Tensor, counted: Tensor
) -> ClipSums:
    """The sums of one portion without its outliers, such as frames of another person.

    Arguments are those of `ClipSums.of`.
    """
    ordinary = ~_outliers(transforms, centres, counted)
    return ClipSums.of(transforms, votes, centres, counted & ordinary)


@torch.no_grad()
def _outliers(transforms: Similarity, centres: Tensor, counted: Tensor) -> Tensor:
    places = apply(transforms, centres[..., None, :])[..., 0, :]
    mean = torch.atan2(
        (transforms.sin * counted).sum(-1, keepdim=True),
        (transforms.cos * counted).sum(-1, keepdim=True),
    )
    turned = torch.atan2(transforms.sin, transforms.cos) - mean
    values = torch.stack(
        [
            transforms.scale.log(),
            torch.atan2(turned.sin(), turned.cos()),
            places[..., 0],
            places[..., 1],
        ],
        -1,
    )
    values = torch.where(counted[..., None], values, torch.full_like(values, torch.nan))
    off = (values - values.nanmedian(-2, keepdim=True).values).abs()
    limit = OUTLIER * (_DEVIATION * off.nanmedian(-2, keepdim=True).values).clamp_min(_FLOOR)
    return (off > limit).any(-1)
