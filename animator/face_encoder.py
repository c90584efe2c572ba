"""Global content-aware Face Encoder: one face embedding to face tokens that know the image.

Shapes: B batch, E face embedding, D cross-attention width, F face tokens, S image tokens.
Module names follow the published v1 checkpoint, so that its weights load as they are.
"""

import torch
from einops import rearrange
from torch import Tensor, nn


class PerceiverAttention(nn.Module):
    """Latents attend to [image tokens, latents], all projections free of bias (v1)."""

    def __init__(self, dim: int, head_dim: int):
        super().__init__()
        # As many whole heads as fit; a width that is no multiple is projected down (v1).
        self.num_heads = dim // head_dim
        inner = self.num_heads * head_dim
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, image_tokens: Tensor, latents: Tensor) -> Tensor:
        """`(B, S, D)` and `(B, F, D)` to `(B, F, D)`."""
        image_tokens = self.norm1(image_tokens)
        latents = self.norm2(latents)
        query = self.to_q(latents)
        key, value = self.to_kv(torch.cat([image_tokens, latents], dim=1)).chunk(2, dim=-1)
        query, key, value = (
            rearrange(x, "b l (h d) -> b h l d", h=self.num_heads) for x in (query, key, value)
        )
        # The scale is split over both factors and the softmax kept in fp32: half precision
        # overflows on the product otherwise.
        scale = query.shape[-1] ** -0.25
        weight = (query * scale) @ (key * scale).transpose(-2, -1)
        weight = weight.float().softmax(dim=-1).to(value.dtype)
        return self.to_out(rearrange(weight @ value, "b h l d -> b l (h d)"))


def feed_forward(dim: int, ratio: int = 4) -> nn.Sequential:
    """LayerNorm, expand, GELU, contract; without bias (v1)."""
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, dim * ratio, bias=False),
        nn.GELU(),
        nn.Linear(dim * ratio, dim, bias=False),
    )


class FacePerceiver(nn.Module):
    """Perceiver layers that refine the face tokens against the image (v1's FacePerceiver)."""

    def __init__(self, dim: int, depth: int, head_dim: int):
        super().__init__()
        self.proj_in = nn.Linear(dim, dim)
        self.proj_out = nn.Linear(dim, dim)
        self.norm_out = nn.LayerNorm(dim)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(dim, head_dim), feed_forward(dim)])
            for _ in range(depth)
        )
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, face_tokens: Tensor, image_tokens: Tensor) -> Tensor:
        """`(B, F, D)` and `(B, S, D)` to `(B, F, D)`."""
        image_tokens = self.proj_in(image_tokens)
        for layer in self.layers:
            attention, mlp = layer  # type: ignore[misc]
            face_tokens = attention(image_tokens, face_tokens) + face_tokens
            face_tokens = mlp(face_tokens) + face_tokens
        return self.norm_out(self.proj_out(face_tokens))


class FaceProjection(nn.Module):
    """Face embedding to face tokens that know nothing of the image (Table II, w/o Face Encoder).

    The first stage of the Face Encoder alone, with its names.
    """

    def __init__(self, dim: int, embedding_dim: int = 512, num_tokens: int = 4):
        super().__init__()
        self.num_tokens = num_tokens
        self.proj = nn.Sequential(
            nn.Linear(embedding_dim, 2 * embedding_dim),
            nn.GELU(),
            nn.Linear(2 * embedding_dim, num_tokens * dim),
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, face_embedding: Tensor, image_token: Tensor) -> Tensor:
        """`(B, E)` to `(B, F, D)`; the image token is not looked at."""
        tokens = rearrange(self.proj(face_embedding), "b (f d) -> b f d", f=self.num_tokens)
        return self.norm(tokens)


class FaceEncoder(FaceProjection):
    """Face embedding and image token to face tokens (paper III-B; structure of v1).

    Args:
        dim: cross-attention width of the UNet.
        embedding_dim: size of the face embedding (ArcFace: 512).
        num_tokens: face tokens a person.
        depth: Perceiver layers.
        head_dim: width of an attention head; lowered to `dim` where `dim` is smaller.
    """

    def __init__(
        self,
        dim: int,
        embedding_dim: int = 512,
        num_tokens: int = 4,
        depth: int = 4,
        head_dim: int = 64,
    ):
        super().__init__(dim, embedding_dim, num_tokens)
        self.fusion_model = FacePerceiver(dim, depth, min(head_dim, dim))

    def forward(self, face_embedding: Tensor, image_token: Tensor) -> Tensor:
        """`(B, E)` and `(B, S, D)` to `(B, F, D)`."""
        return self.fusion_model(super().forward(face_embedding, image_token), image_token)
