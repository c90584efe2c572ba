"""Distribution-aware ID adapter: attention processors of the UNet's cross-attention.

The context of every cross-attention is [one image token, F face tokens]. Spatial blocks use
both, through two branches whose statistics are matched; temporal blocks use the image token
alone (v1). The image branch has one token, so its softmax is 1 and its output is the token's
value at every position: queries and keys are not computed for it.

Shapes: N batch (frames, or pixels for temporal blocks), L positions, F face tokens, C channels.
"""

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from einops import rearrange
from torch import Tensor, nn

EPSILON = 1e-5


def statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation over positions and channels, in fp32 (v1).

    `(N, L, C)` to two tensors `(N, 1, 1)`. The gradient is zero, not NaN, where the deviation is
    zero, as it is when the image token has been dropped.
    """
    features = features.float()
    mean = features.mean(dim=(1, 2), keepdim=True)
    variance = features.var(dim=(1, 2), keepdim=True, unbiased=True)
    positive = variance > 0
    deviation = torch.where(positive, variance, torch.ones_like(variance)).sqrt()
    return mean, deviation * positive


def align_distribution(face: Tensor, image: Tensor) -> Tensor:
    """Face features with the mean and deviation of the image features (eq. 13).

    Both `(N, L, C)`; the result has the shape and type of `face`.
    """
    face_mean, face_deviation = statistics(face)
    image_mean, image_deviation = statistics(image)
    aligned = (face.float() - face_mean) / (face_deviation + EPSILON)
    return (aligned * image_deviation + image_mean).to(face.dtype)


def _value(attention: Attention, context: Tensor, length: int) -> Tensor:
    """The one token's value at every position, `(N, L, C)`."""
    to_v: nn.Linear = attention.to_v  # type: ignore[assignment]
    return to_v(context).expand(-1, length, -1)


def _output(attention: Attention, hidden: Tensor, residual: Tensor) -> Tensor:
    to_out: nn.ModuleList = attention.to_out  # type: ignore[assignment]
    hidden = to_out[1](to_out[0](hidden))
    if attention.residual_connection:
        hidden = hidden + residual
    return hidden / attention.rescale_output_factor


class IDAdapter(nn.Module):
    """Spatial cross-attention with an image and a face branch (eq. 13-14).

    One query is shared. `id_to_k` and `id_to_v` are the only new weights; they start as copies
    of the block's own.
    """

    def __init__(self, context_dim: int, channels: int, num_face_tokens: int = 4):
        super().__init__()
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
        image = _value(attn, image_token, hidden_states.shape[1])
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
        return _output(attn, image + align_distribution(face, image), hidden_states)


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
        image = _value(attn, encoder_hidden_states[:, :1], hidden_states.shape[1])
        return _output(attn, image, hidden_states)
