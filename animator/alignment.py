"""The learnable pose alignment block (eq. 1 and 9-11).

Tokens are joints. Shapes: B batch (image level: every frame is an example of its own), N joints,
D width. Coordinates are isotropic (`animator.keypoints`).
"""

import torch
from torch import Tensor, nn

from animator.config import AlignmentConfig
from animator.similarity import Similarity, apply, compose, fit, identity, invert

MAX_LOG_SCALE = 1.5  # of the learned correction: a factor of 4.5 either way
MIN_SIZE = 1e-3  # of a person, in units of the frame's longer side


def _feed_forward(config: AlignmentConfig) -> nn.Sequential:
    hidden = config.width * config.feed_forward_ratio
    return nn.Sequential(
        nn.LayerNorm(config.width),
        nn.Linear(config.width, hidden),
        nn.GELU(),
        nn.Linear(hidden, config.width),
    )


class AttentionModule(nn.Module):
    """Attention and feed-forward, both residual; joints that are missing are not attended to."""

    def __init__(self, config: AlignmentConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.norm_context = nn.LayerNorm(config.width)
        self.attention = nn.MultiheadAttention(config.width, config.num_heads, batch_first=True)
        self.feed_forward = _feed_forward(config)

    def forward(self, tokens: Tensor, context: Tensor, missing: Tensor) -> Tensor:
        """`(B, N, D)` attends to `(B, N, D)` where `missing` `(B, N)` is false."""
        keys = self.norm_context(context)
        attended, _ = self.attention(
            self.norm(tokens), keys, keys, key_padding_mask=missing, need_weights=False
        )
        tokens = tokens + attended
        return tokens + self.feed_forward(tokens)


class KeypointEncoder(nn.Module):
    """Joints to features: learned position embeddings and self-attention (eq. 1)."""

    def __init__(self, config: AlignmentConfig, in_channels: int):
        super().__init__()
        self.embed = nn.Linear(in_channels, config.width)
        self.position = nn.Parameter(torch.randn(config.num_keypoints, config.width) * 0.02)
        self.layers = nn.ModuleList(AttentionModule(config) for _ in range(config.encoder_depth))

    def forward(self, joints: Tensor, missing: Tensor) -> Tensor:
        """`(B, N, C)` to `(B, N, D)`."""
        tokens = self.embed(joints) + self.position
        for layer in self.layers:
            tokens = layer(tokens, tokens, missing)
        return tokens


class AlignmentBlock(nn.Module):
    """Reference and driven pose to the similarity that aligns the second to the first.

    The closed form guides the block once (eq. 2-8); its encoding is fused with that of the pair
    by cross-attention (eq. 9), and an MLP gives rotation, scale and translation (eq. 10). Ours:
    the MLP's output is a correction composed with the closed form, which starts at none, so the
    block is never worse than the closed form before training; rotation comes from a normalised
    (cos, sin) pair and the scale is positive by construction.
    """

    def __init__(self, config: AlignmentConfig):
        super().__init__()
        self.config = config
        self.encoder_m = KeypointEncoder(config, in_channels=4)
        self.encoder_similarity = KeypointEncoder(config, in_channels=2)
        self.fusion = nn.ModuleList(AttentionModule(config) for _ in range(config.fusion_depth))
        self.head = nn.Sequential(
            nn.LayerNorm(config.width),
            nn.Linear(config.width, config.width),
            nn.GELU(),
            nn.Linear(config.width, 5),
        )
        last: nn.Linear = self.head[-1]  # type: ignore[assignment]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, reference: Tensor, driven: Tensor, weight: Tensor) -> Similarity:
        """Similarity that aligns the driven pose (eq. 1-10).

        Args:
            reference, driven: `(B, N, 2)`, isotropic.
            weight: confidence that a joint is seen in both poses, `(B, N)`; 0 where it is not.

        Returns:
            fields of shape `(B,)` and `(B, 2)`; `similarity.apply` gives eq. 11.
        """
        seen = weight > 0
        # Attention over nothing is NaN. Where no joint is common the closed form is the identity
        # and the correction is silenced below.
        missing = ~seen & seen.any(1, keepdim=True)
        reference = torch.where(seen[..., None], reference, torch.zeros_like(reference))
        driven = torch.where(seen[..., None], driven, torch.zeros_like(driven))
        closed_form = fit(driven, reference, weight)
        guided = apply(closed_form, driven)
        coordinates = self._coordinates(reference, weight)
        reference, driven, guided = (
            torch.where(seen[..., None], apply(coordinates, points), torch.zeros_like(points))
            for points in (reference, driven, guided)
        )
        pair = self.encoder_m(torch.cat([reference, driven], dim=-1), missing)
        guidance = self.encoder_similarity(guided, missing)
        tokens = guidance
        for layer in self.fusion:
            tokens = layer(tokens, pair, missing)
        kept = seen[..., None].to(tokens.dtype)
        pooled = (tokens * kept).sum(1) / kept.sum(1).clamp_min(1)
        correction = self.head(pooled) * seen.any(1, keepdim=True)
        correction = compose(compose(invert(coordinates), _correction(correction)), coordinates)
        return compose(correction, closed_form)

    def _coordinates(self, reference: Tensor, weight: Tensor) -> Similarity:
        """From the frame's coordinates to those the block computes in (ours)."""
        frame = identity((len(reference),), reference)
        if self.config.coordinates == "frame":
            return frame
        total = weight.sum(1, keepdim=True).clamp_min(1e-6)
        centre = (reference * weight[..., None]).sum(1) / total
        off = (reference - centre[:, None]).square().sum(-1)
        size = ((off * weight).sum(1) / total[:, 0]).clamp_min(MIN_SIZE**2).sqrt()
        return Similarity(1 / size, frame.cos, frame.sin, -centre / size[:, None])


def _correction(output: Tensor) -> Similarity:
    """R', S', t' from five numbers; zeros are the identity (eq. 10)."""
    log_scale, cos, sin, shift = output.split([1, 1, 1, 2], dim=-1)
    direction = torch.cat([1 + cos, sin], dim=-1)
    direction = direction / direction.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    scale = torch.exp(MAX_LOG_SCALE * torch.tanh(log_scale[..., 0] / MAX_LOG_SCALE))
    return Similarity(scale, direction[..., 0], direction[..., 1], shift)
