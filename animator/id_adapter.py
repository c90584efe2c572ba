"""Distribution-aware ID adapter: attention processors of the UNet's cross-attention.

The context of every cross-attention is [one image token, F face tokens]. Spatial blocks use
both, through two branches whose statistics are matched; temporal blocks use the image token
alone (v1). The image branch has one token, so its softmax is 1 and its output is the token's
value at every position: queries and keys are not computed for it.

Where a picture shows several people, each has face tokens of its own, and a map of regions says
whose place a position is: it attends to that person's tokens alone, and is normalised by that
person's statistics alone, so that no face reaches into another's region.

Shapes: N batch (frames, or pixels for temporal blocks), L positions, F face tokens a person,
P people, C channels, h w latent size.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from einops import rearrange
from torch import Tensor, nn

from animator.config import FaceMerge

EPSILON = 1e-5


def statistics(
    features: Tensor, repeats: int = 1, owners: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation over positions and channels, in fp32 (v1).

    `(N, L, C)` to two tensors `(N, 1, 1)`, or `(N, L, 1)` where each position has the statistics
    of its owner's positions. The gradient is zero, not NaN, where the deviation is zero, as it is
    when the image token has been dropped.

    Args:
        repeats: how often each position stands for itself: the statistics are those of
            `features` repeated so many times along L, without the repetition being made.
        owners: whose place each position is, 1 for that person and 0 for others, `(N, L, P)`.
    """
    features = features.float()
    if owners is None:
        variance, mean = torch.var_mean(features, dim=(1, 2), keepdim=True, correction=1 / repeats)
    else:
        owners = owners.float()
        positions = owners.sum(1, keepdim=True).transpose(1, 2)  # (N, P, 1)
        count = features.shape[2] * positions
        to_people = owners.transpose(1, 2) / positions.clamp(min=1)
        mean = owners @ (to_people @ features.mean(2, keepdim=True))
        spread = to_people @ (features - mean).square().mean(2, keepdim=True)
        variance = owners @ (spread * count / (count - 1).clamp(min=1))
    positive = variance > 0
    deviation = torch.where(positive, variance, torch.ones_like(variance)).sqrt()
    return mean, deviation * positive


def align_and_add(face: Tensor, image: Tensor, owners: Tensor | None = None) -> Tensor:
    """Face features with the mean and deviation of the image features, plus these (eq. 14).

    `face` is `(N, L, C)`, `image` the same or `(N, 1, C)` for one value at all positions; the
    result has the shape and type of `face`. With `owners` (see `statistics`) the face features of
    each person are aligned on their own.
    """
    face_mean, face_deviation = statistics(face, owners=owners)
    image_mean, image_deviation = statistics(image, face.shape[1] // image.shape[1])
    scale = image_deviation / (face_deviation + EPSILON)
    shift = image_mean - face_mean * scale
    return torch.addcmul(image.float() + shift, face.float(), scale).to(face.dtype)


def normalise_and_add(face: Tensor, image: Tensor, owners: Tensor | None = None) -> Tensor:
    """Face features with mean 0 and deviation 1, plus the image features (Table V, Norm)."""
    mean, deviation = statistics(face, owners=owners)
    return (image.float() + (face.float() - mean) / (deviation + EPSILON)).to(face.dtype)


def add(face: Tensor, image: Tensor, owners: Tensor | None = None) -> Tensor:
    """Face features as they are, plus the image features (Table V, Addition)."""
    return face + image


MERGES: dict[FaceMerge, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "distribution": align_and_add,
    "norm": normalise_and_add,
    "addition": add,
}


def _project(attention: Attention, hidden: Tensor) -> Tensor:
    """The block's output projection."""
    to_out: nn.ModuleList = attention.to_out  # type: ignore[assignment]
    return to_out[1](to_out[0](hidden))


def _finish(attention: Attention, hidden: Tensor, residual: Tensor) -> Tensor:
    if attention.residual_connection:
        hidden = hidden + residual
    return hidden / attention.rescale_output_factor


class IDAdapter(nn.Module):
    """Spatial cross-attention with an image and a face branch (eq. 13-14).

    One query is shared. `id_to_k` and `id_to_v` are the only new weights; they start as copies
    of the block's own. `merge` is how the branches come together; the method's is
    `distribution`, the others are what Table V compares it with.

    `regions` `(N, h, w)` is set for calls on several people: the number of the person, from 0,
    whose place each latent cell is. The context then has F face tokens for each of them.
    """

    regions: Tensor | None = None

    def __init__(
        self,
        context_dim: int,
        channels: int,
        num_face_tokens: int = 4,
        merge: FaceMerge = "distribution",
    ):
        super().__init__()
        self.merge = MERGES[merge]
        self.num_face_tokens = num_face_tokens
        self.id_to_k = nn.Linear(context_dim, channels, bias=False)
        self.id_to_v = nn.Linear(context_dim, channels, bias=False)

    def initialise_from(self, attention: Attention) -> None:
        """Copy the block's own key and value weights."""
        self.id_to_k.load_state_dict({"weight": attention.to_k.weight})  # type: ignore[union-attr]
        self.id_to_v.load_state_dict({"weight": attention.to_v.weight})  # type: ignore[union-attr]

    def forward(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """`(N, L, C)` with context `(N, 1 + P·F, D)` to `(N, L, C)`; P is 1 without regions."""
        image_token, face_tokens = encoder_hidden_states[:, :1], encoder_hidden_states[:, 1:]
        owners = visible = None
        if self.regions is not None:
            people = face_tokens.shape[1] // self.num_face_tokens
            owners = owners_at(self.regions, hidden_states.shape[1], people)
            visible = owners.repeat_interleave(self.num_face_tokens, dim=2)[:, None]
        image: Tensor = attn.to_v(image_token)  # type: ignore[operator]
        query, key, value = (
            rearrange(x, "n l (h d) -> n h l d", h=attn.heads)
            for x in (
                attn.to_q(hidden_states),
                self.id_to_k(face_tokens),
                self.id_to_v(face_tokens),
            )
        )
        face = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        face = rearrange(face, "n h l d -> n l (h d)")
        return _finish(attn, _project(attn, self.merge(face, image, owners)), hidden_states)


def owners_at(regions: Tensor, num_positions: int, people: int) -> Tensor:
    """Whose place each position of a level of the UNet is, `(N, L, P)`, true for that person.

    Of a map of regions `(N, h, w)` the middle cell of each block counts.

    Raises:
        ValueError: where the map is no whole number of times as large as the level.
    """
    height, width = regions.shape[1:]
    factor = math.isqrt(height * width // num_positions)
    if factor < 1 or (height // factor) * (width // factor) != num_positions:
        raise ValueError(
            f"Got a map of regions of {height} x {width} for {num_positions} positions, but "
            "expected the size of the latents."
        )
    middle = factor // 2
    level = regions[:, middle::factor, middle::factor].flatten(1)
    return level[..., None] == torch.arange(people, device=level.device)


class ImageTokenAttention:
    """Temporal cross-attention: the value of the image token at every position (v1)."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """`(N, L, C)` with context `(N, 1 + F, D)` to `(N, L, C)`."""
        image: Tensor = attn.to_v(encoder_hidden_states[:, :1])  # type: ignore[operator]
        # Projected before it is spread over the positions: the rows are all the same.
        spread = _project(attn, image).expand(-1, hidden_states.shape[1], -1)
        return _finish(attn, spread, hidden_states)
