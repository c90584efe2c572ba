"""Distribution-aware ID adapter: attention processors of the UNet's cross-attention.

The context of every cross-attention is [one image token, F face tokens]. Spatial blocks use
both, through two branches whose statistics are matched; temporal blocks use the image token
alone (v1). The image branch has one token, so its softmax is 1 and its output is the token's
value at every position: queries and keys are not computed for it.

Shapes: N batch (frames, or pixels for temporal blocks), L positions, F face tokens, C channels.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from einops import rearrange
from torch import Tensor, nn

from animator.config import FaceMerge

EPSILON = 1e-5


def statistics(features: Tensor, repeats: int = 1) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation over positions and channels, in fp32 (v1).

    `(N, L, C)` to two tensors `(N, 1, 1)`. The gradient is zero, not NaN, where the deviation is
    zero, as it is when the image token has been dropped.

    Args:
        repeats: how often each position stands for itself: the statistics are those of
            `features` repeated so many times along L, without the repetition being made.
    """
    features = features.float()
    variance, mean = torch.var_mean(features, dim=(1, 2), keepdim=True, correction=1 / repeats)
    positive = variance > 0
    deviation = torch.where(positive, variance, torch.ones_like(variance)).sqrt()
    return mean, deviation * positive


def align_and_add(face: Tensor, image: Tensor) -> Tensor:
    """Face features with the mean and deviation of the image features, plus these (eq. 14).

    `face` is `(N, L, C)`, `image` the same or `(N, 1, C)` for one value at all positions; the
    result has the shape and type of `face`.
    """
    face_mean, face_deviation = statistics(face)
    image_mean, image_deviation = statistics(image, face.shape[1] // image.shape[1])
    scale = image_deviation / (face_deviation + EPSILON)
    shift = image_mean - face_mean * scale
    return torch.addcmul(image.float() + shift, face.float(), scale).to(face.dtype)


def normalise_and_add(face: Tensor, image: Tensor) -> Tensor:
    """Face features with mean 0 and deviation 1, plus the image features (Table V, Norm)."""
    mean, deviation = statistics(face)
    return (image.float() + (face.float() - mean) / (deviation + EPSILON)).to(face.dtype)


def add(face: Tensor, image: Tensor) -> Tensor:
    """Face features as they are, plus the image features (Table V, Addition)."""
    return face + image


MERGES: dict[FaceMerge, Callable[[Tensor, Tensor], Tensor]] = {
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
    """

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
        """`(N, L, C)` with context `(N, 1 + F, D)` to `(N, L, C)`."""
        image_token = encoder_hidden_states[:, : -self.num_face_tokens]
        face_tokens = encoder_hidden_states[:, -self.num_face_tokens :]
        image: Tensor = attn.to_v(image_token)  # type: ignore[operator]
        query, key, value = (
            rearrange(x, "n l (h d) -> n h l d", h=attn.heads)
            for x in (
                attn.to_q(hidden_states),
                self.id_to_k(face_tokens),
                self.id_to_v(face_tokens),
            )
        )
        face = F.scaled_dot_product_attention(query, key, value)
        face = rearrange(face, "n h l d -> n l (h d)")
        return _finish(attn, _project(attn, self.merge(face, image)), hidden_states)


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
