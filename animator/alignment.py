"""The learnable pose alignment block (eq. 1 and 9-11).

Tokens are joints. Shapes: B batch (image level: every frame is an example of its own), N joints,
D width. Coordinates are isotropic (`animator.keypoints`).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from animator.config import AlignmentConfig
from animator.similarity import (
    Similarity,
    apply,
    common_joints,
    compose,
    fit,
    identity,
    invert,
    solvable,
)

NUM_VOTES = 3  # scale, rotation, place
MAX_LOG_SCALE = 1.5  # of the learned correction: a factor of 4.5 either way
MIN_SIZE = 1e-3  # of a person, in units of the frame's longer side
_CONTEXT_FEATURES = 9
_TYPICAL_SIZE, _TYPICAL_SIDE, _SPREAD = 0.22, 0.8, 4.0  # to numbers of about 1


class Estimate(NamedTuple):
    """What the block says of each pair of poses."""

    transform: Similarity  # that aligns the driven pose, fields (B,) and (B, 2)
    votes: Tensor  # (B, 3), logits: what its scale, rotation and place count for in a clip (ours)
    error: Tensor  # (B,), expected mean distance after alignment, of the frame's longer side (ours)


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

    def forward(self, joints: Tensor, missing: Tensor, context: Tensor | None = None) -> Tensor:
        """`(B, N, C)` to `(B, N, D)`; `context` `(B, 1, D)` is added to every token."""
        tokens = self.embed(joints) + self.position
        if context is not None:
            tokens = tokens + context
        for layer in self.layers:
            tokens = layer(tokens, tokens, missing)
        return tokens


class AlignmentBlock(nn.Module):
    """Reference and driven pose to the similarity that aligns the second to the first.

    The closed form guides the block once (eq. 2-8); its encoding is fused with that of the pair
    by cross-attention (eq. 9), and an MLP gives rotation, scale and translation (eq. 10).

    Ours: the MLP's output is a correction composed with the closed form, which starts at none, so
    the block is never worse than the closed form before training; rotation comes from a
    normalised (cos, sin) pair and the scale is positive by construction. Joints are encoded in
    the reference person's coordinates; where the person is in the frame, the frame's shape and
    the misalignment that the closed form sees are added to every token: they say where a person
    is likely to go, and which misalignments are likely. The same features give how much a frame's
    transform counts in a clip, and the error to expect of it.
    """

    def __init__(self, config: AlignmentConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.encoder_m = KeypointEncoder(config, in_channels=4)
        self.encoder_similarity = KeypointEncoder(config, in_channels=2)
        in_person = config.coordinates == "person"
        self.embed_context = nn.Linear(_CONTEXT_FEATURES, width) if in_person else None
        self.fusion = nn.ModuleList(AttentionModule(config) for _ in range(config.fusion_depth))
        self.head = _head(width, 5)
        self.vote_head = _head(width, NUM_VOTES)
        self.error_head = _head(width, 1)
        # An eighth of the person's size, so that an untrained block holds nothing to be aligned.
        nn.init.constant_(self.error_head[-1].bias, -2.0)  # type: ignore[arg-type]

    def forward(self, reference: Tensor, driven: Tensor, weight: Tensor, frame: Tensor) -> Estimate:
        """Similarity that aligns the driven pose (eq. 1-10).

        Joints that are not finite count as missing. With fewer than three joints in common, or
        all of them in one point, the transform is the closed form's fallback (`similarity.fit`).

        Args:
            reference, driven: `(B, N, 2)`, isotropic.
            weight: confidence that a joint is seen in both poses, `(B, N)`; 0 where it is not.
            frame: height and width of the reference's frame, of the longer one, `(B, 2)`.

        Returns:
            `similarity.apply` of its transform gives eq. 11.
        """
        weight = common_joints(driven, reference, weight)
        seen = weight > 0
        # Attention over nothing is NaN. Where no joint is common the closed form is the identity
        # and the correction is silenced below.
        missing = ~seen & seen.any(1, keepdim=True)
        reference, driven = (_where(seen, points) for points in (reference, driven))
        closed_form = fit(driven, reference, weight)
        guided = apply(closed_form, driven)
        coordinates = self._coordinates(reference, weight)
        joints = torch.cat([_where(seen, apply(coordinates, p)) for p in (reference, driven)], -1)
        context = None
        if self.embed_context is not None:
            features = _context_features(coordinates, frame, invert(closed_form))
            context = self.embed_context(features)[:, None]
        pair = self.encoder_m(joints, missing, context)
        tokens = self.encoder_similarity(_where(seen, apply(coordinates, guided)), missing)
        for layer in self.fusion:
            tokens = layer(tokens, pair, missing)
        kept = seen[..., None].to(tokens.dtype)
        pooled = (tokens * kept).sum(1) / kept.sum(1).clamp_min(1)
        solved = solvable(driven, reference, weight)
        correction = _correction(self.head(pooled) * solved[:, None])
        correction = compose(compose(invert(coordinates), correction), coordinates)
        # What the error will be is learned beside the transform, not instead of it.
        size = 1 / coordinates.scale
        error = size * self.error_head(pooled.detach())[:, 0].clamp(-10, 10).exp()
        return Estimate(compose(correction, closed_form), self.vote_head(pooled), error)

    def _coordinates(self, reference: Tensor, weight: Tensor) -> Similarity:
        """From the frame's coordinates to those the block computes in (ours)."""
        frame = identity(reference.shape[:1], reference)
        if self.config.coordinates == "frame":
            return frame
        total = weight.sum(1, keepdim=True).clamp_min(1e-6)
        centre = (reference * weight[..., None]).sum(1) / total
        off = (reference - centre[:, None]).square().sum(-1)
        size = ((off * weight).sum(1) / total[:, 0]).clamp_min(MIN_SIZE**2).sqrt()
        return Similarity(1 / size, frame.cos, frame.sin, -centre / size[:, None])


def _head(width: int, out_channels: int) -> nn.Sequential:
    """Pooled features to numbers that are all 0 before training."""
    last = nn.Linear(width, out_channels)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), last)


def _where(seen: Tensor, points: Tensor) -> Tensor:
    return torch.where(seen[..., None], points, torch.zeros_like(points))


def _context_features(coordinates: Similarity, frame: Tensor, misalign: Similarity) -> Tensor:
    """Where the person is in the frame, how large, the frame's shape; the misalignment `(B, 9)`."""
    size = 1 / coordinates.scale[:, None]
    centre = -coordinates.shift * size
    return torch.cat(
        [
            _SPREAD * centre,
            (size / _TYPICAL_SIZE).log(),
            _SPREAD * (frame - _TYPICAL_SIDE),
            2 * misalign.scale.log()[:, None],
            _SPREAD * misalign.sin[:, None],
            _SPREAD * misalign.shift,
        ],
        dim=-1,
    )


def _correction(output: Tensor) -> Similarity:
    """R', S', t' from five numbers; zeros are the identity (eq. 10)."""
    log_scale, cos, sin, shift = output.split([1, 1, 1, 2], dim=-1)
    direction = torch.cat([1 + cos, sin], dim=-1)
    direction = direction / direction.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    scale = torch.exp(MAX_LOG_SCALE * torch.tanh(log_scale[..., 0] / MAX_LOG_SCALE))
    return Similarity(scale, direction[..., 0], direction[..., 1], shift)
