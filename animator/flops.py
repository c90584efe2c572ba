"""Floating-point operations of the animator, from its sizes alone.

Counted as torch's counter does: two for each multiplication with its addition, in matrix products,
convolutions and attention; norms, activations and sums are left out. They are model operations:
what recomputation adds on the way back is not in them.

Shapes: B batch, T frames, C channels, H W pixels, h w latent size, D context width, F face tokens.
"""

import itertools
from collections import Counter
from typing import Literal

from animator.config import AnimatorConfig
from animator.trainable import Trainable

Kind = Literal["linear", "conv", "attention"]
# Whose weights: trained in every set, of the ID adapters, of the UNet's attention, of its rest.
Owner = Literal["conditioning", "adapters", "attentions", "backbone"]
# Of which owners the weights are trained.
_TRAINED: dict[Trainable, tuple[Owner, ...]] = {
    "all": ("conditioning", "adapters", "attentions", "backbone"),
    "attentions": ("conditioning", "adapters", "attentions"),
    "adapters": ("conditioning", "adapters"),
    "lora": ("conditioning", "adapters"),
}


def forward_flops(
    config: AnimatorConfig, height: int, width: int, frames: int, batch: int = 1
) -> dict[str, int]:
    """Operations of one `Animator.forward` with all conditions, by kind.

    Args:
        height, width: of the frames, in pixels.

    Returns:
        `linear`, `conv`, `attention` (its products without projections) and their `total`.
    """
    counts = _count(config, height, width, frames, batch)
    kinds: dict[str, int] = dict.fromkeys(("linear", "conv", "attention"), 0)
    for (kind, _), flops in counts.items():
        kinds[kind] += flops
    return {**kinds, "total": sum(kinds.values())}


def training_flops(
    config: AnimatorConfig,
    height: int,
    width: int,
    frames: int,
    batch: int = 1,
    trainable: Trainable = "all",
) -> int:
    """Operations of forward and backward pass: three times the forward's where all is trained.

    The gradient passes through every layer, since PoseNet at its start is always trained; frozen
    weights save the product that would give their own gradient. The small products of low-rank
    updates are left out.
    """
    counts = _count(config, height, width, frames, batch)
    total = 0
    for (kind, owner), flops in counts.items():
        trained = kind == "attention" or owner in _TRAINED[trainable]
        total += flops * (3 if trained else 2)
    return total


class _Tally:
    """Operations by kind and by whose weights they use."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[Kind, Owner]] = Counter()

    def linear(self, owner: Owner, rows: int, *widths: int) -> None:
        """Layers one after the other, from the first width to the last."""
        for given, made in itertools.pairwise(widths):
            self.counts["linear", owner] += 2 * rows * given * made

    def conv(self, owner: Owner, positions: int, given: int, made: int, taps: int) -> None:
        """One convolution; positions are those of its output."""
        self.counts["conv", owner] += 2 * positions * given * made * taps

    def attention(self, owner: Owner, queries: int, keys: int, channels: int) -> None:
        """Both products of all heads; queries of the whole batch, keys that each one sees."""
        self.counts["attention", owner] += 4 * queries * keys * channels


def _count(
    config: AnimatorConfig, height: int, width: int, frames: int, batch: int
) -> Counter[tuple[Kind, Owner]]:
    tally = _Tally()
    _pose_net(tally, config, batch * frames, height, width)
    _face_encoder(tally, config, batch)
    _UNet(tally, config, batch, frames).count(
        height // config.spatial_factor, width // config.spatial_factor
    )
    return tally.counts


def _pose_net(tally: _Tally, config: AnimatorConfig, images: int, height: int, width: int) -> None:
    c0, c1, c2, c3, c4 = config.pose_channels
    positions = images * height * width
    tally.conv("conditioning", positions, c0, c0, 9)
    for given, made, after in ((c0, c1, c1), (c1, c2, c2), (c2, c3, c3)):
        positions //= 4
        tally.conv("conditioning", positions, given, made, 16)
        tally.conv("conditioning", positions, made, after, 9)
    tally.conv("conditioning", positions, c3, c4, 9)
    tally.conv("conditioning", positions, c4, config.block_out_channels[0], 1)


def _face_encoder(tally: _Tally, config: AnimatorConfig, batch: int) -> None:
    embedding, dim, tokens = (
        config.face_embedding_dim,
        config.cross_attention_dim,
        config.num_face_tokens,
    )
    tally.linear("conditioning", batch, embedding, 2 * embedding, tokens * dim)
    if config.face_encoder == "projection":
        return
    head = min(config.face_head_dim, dim)
    inner = dim // head * head
    tally.linear("conditioning", batch, dim, dim)  # of the one image token
    rows, seen = batch * tokens, 1 + tokens
    for _ in range(config.face_encoder_depth):
        tally.linear("conditioning", rows, dim, inner)
        tally.linear("conditioning", batch * seen, dim, 2 * inner)
        tally.attention("conditioning", rows, seen, inner)
        tally.linear("conditioning", rows, inner, dim, 4 * dim, dim)
    tally.linear("conditioning", rows, dim, dim)


class _UNet:
    """Walks the levels of the UNet as diffusers builds them."""

    def __init__(self, tally: _Tally, config: AnimatorConfig, batch: int, frames: int) -> None:
        self.tally, self.config = tally, config
        self.batch, self.frames = batch, frames
        self.embedding = 4 * config.block_out_channels[0]

    def count(self, height: int, width: int) -> None:
        config, tally, images = self.config, self.tally, self.batch * self.frames
        channels, layers = config.block_out_channels, config.layers_per_block
        first, times = channels[0], 3 * config.addition_time_embed_dim
        cells = [height * width // 4**level for level in range(len(channels))]
        tally.linear("backbone", self.batch, first, self.embedding, self.embedding)
        tally.linear("backbone", self.batch, times, self.embedding, self.embedding)
        tally.conv("backbone", images * cells[0], 2 * config.latent_channels, first, 9)
        tally.conv("backbone", images * cells[0], first, config.latent_channels, 9)
        last = len(channels) - 1
        skips = [first]  # channels of what the way up gets from the way down
        given = first
        for level, made in enumerate(channels):
            for _ in range(layers):
                self._res_block(given, made, cells[level])
                if level < last:
                    self._transformer(made, cells[level])
                given = made
                skips.append(made)
            if level < last:
                tally.conv("backbone", images * cells[level + 1], made, made, 9)
                skips.append(made)
        self._res_block(given, given, cells[last])
        self._transformer(given, cells[last])
        self._res_block(given, given, cells[last])
        for level in reversed(range(len(channels))):
            made = channels[level]
            for _ in range(layers + 1):
                self._res_block(given + skips.pop(), made, cells[level])
                if level < last:
                    self._transformer(made, cells[level])
                given = made
            if level > 0:
                tally.conv("backbone", images * cells[level - 1], made, made, 9)

    def _res_block(self, given: int, made: int, cells: int) -> None:
        """A spatial residual block (3 x 3) and a temporal one (3 frames)."""
        tally, images = self.tally, self.batch * self.frames
        for channels, width, taps in ((given, made, 9), (made, made, 3)):
            tally.conv("backbone", images * cells, channels, width, taps)
            tally.conv("backbone", images * cells, width, width, taps)
            tally.linear("backbone", images, self.embedding, width)
        if given != made:
            tally.conv("backbone", images * cells, given, made, 1)

    def _transformer(self, channels: int, cells: int) -> None:
        """A spatial and a temporal transformer block; the image token's values are broadcast."""
        tally, config, frames = self.tally, self.config, self.frames
        images = self.batch * frames
        rows, context = images * cells, config.cross_attention_dim
        tally.linear("attentions", rows, channels, channels, channels)  # in and out
        tally.linear("attentions", images, channels, 4 * channels, channels)  # frame numbers
        # Spatial: self-attention, cross-attention with the ID adapter, feed-forward.
        tally.linear("attentions", rows, *[channels] * 5)
        tally.attention("attentions", rows, cells, channels)
        tally.linear("attentions", rows, channels, channels, channels)
        tally.linear("attentions", images, context, channels)
        for _ in ("key", "value"):
            tally.linear("adapters", images * config.num_face_tokens, context, channels)
        tally.attention("adapters", rows, config.num_face_tokens, channels)
        self._feed_forward(rows, channels)
        # Temporal: feed-forward, self-attention, the image token at every position, feed-forward.
        self._feed_forward(rows, channels)
        tally.linear("attentions", rows, *[channels] * 5)
        tally.attention("attentions", rows, frames, channels)
        tally.linear("attentions", self.batch * cells, context, channels, channels)
        self._feed_forward(rows, channels)

    def _feed_forward(self, rows: int, channels: int) -> None:
        """Gated: twice the inner width is made, one half gates the other."""
        self.tally.linear("attentions", rows, channels, 8 * channels)
        self.tally.linear("attentions", rows, 4 * channels, channels)
