"""The backbone: diffusers' spatio-temporal UNet with pose features and ID adapters.

The class of diffusers is used as it is. What the method adds enters through its own seams:
attention processors, and a first convolution that adds the pose features to its output.
Shapes: B batch, T frames, C latent channels, h w latent size, D context width, P people.
"""

import contextlib
from collections.abc import Iterator

from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_spatio_temporal_condition import (
    UNetSpatioTemporalConditionModel,
)
from torch import Tensor, nn

from animator.config import AnimatorConfig
from animator.id_adapter import IDAdapter, ImageTokenAttention


class PoseConditionedConv(nn.Conv2d):
    """The UNet's first convolution; adds the pose features of the current call, if any.

    A subclass rather than a wrapper, so that the names in a state dict stay diffusers' own.
    """

    pose_features: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        return output if self.pose_features is None else output + self.pose_features


def build_unet(config: AnimatorConfig) -> UNetSpatioTemporalConditionModel:
    """Backbone of the configured size with the method's processors in place."""
    depth = len(config.block_out_channels)
    unet = UNetSpatioTemporalConditionModel(
        in_channels=2 * config.latent_channels,
        out_channels=config.latent_channels,
        down_block_types=("CrossAttnDownBlockSpatioTemporal",) * (depth - 1)
        + ("DownBlockSpatioTemporal",),
        up_block_types=("UpBlockSpatioTemporal",)
        + ("CrossAttnUpBlockSpatioTemporal",) * (depth - 1),
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        num_attention_heads=config.num_attention_heads,
        cross_attention_dim=config.cross_attention_dim,
        addition_time_embed_dim=config.addition_time_embed_dim,
        projection_class_embeddings_input_dim=3 * config.addition_time_embed_dim,
        num_frames=config.num_frames,
    )
    add_pose_input(unet)
    add_id_adapters(unet, config)
    return unet


def add_pose_input(unet: UNetSpatioTemporalConditionModel) -> None:
    """Let the first convolution take pose features; its weights are untouched."""
    unet.conv_in.__class__ = PoseConditionedConv


def add_id_adapters(unet: UNetSpatioTemporalConditionModel, config: AnimatorConfig) -> None:
    """Put an ID adapter into every spatial cross-attention, the image token into temporal ones."""
    for name, module in unet.named_modules():
        if not isinstance(module, Attention) or not name.endswith("attn2"):
            continue
        if "temporal_transformer_blocks" in name:
            module.set_processor(ImageTokenAttention())  # type: ignore[arg-type]
            continue
        weight: Tensor = module.to_k.weight  # type: ignore[union-attr, assignment]
        adapter = IDAdapter(
            weight.shape[1], weight.shape[0], config.num_face_tokens, config.id_adapter
        )
        adapter.to(device=weight.device, dtype=weight.dtype)
        if not weight.is_meta:
            adapter.initialise_from(module)
        module.set_processor(adapter)  # type: ignore[arg-type]


def idle_parameters(unet: UNetSpatioTemporalConditionModel) -> set[str]:
    """Names of weights that decide nothing: queries and keys of attention over one token.

    They belong to the published layout, so they stay; no gradient ever reaches them.
    """
    idle = set()
    for name, _ in unet.named_parameters():
        temporal = "temporal_transformer_blocks" in name
        parts = (".attn2.to_k.", ".attn2.to_q.", ".norm2.") if temporal else (".attn2.to_k.",)
        if "attentions" in name and any(part in name for part in parts):
            idle.add(name)
    return idle


@contextlib.contextmanager
def pose_features(
    unet: UNetSpatioTemporalConditionModel, features: Tensor | None
) -> Iterator[None]:
    """For the calls inside, add `features` `(B·T, C0, h, w)` after the first convolution."""
    conv_in: PoseConditionedConv = unet.conv_in  # type: ignore[assignment]
    conv_in.pose_features = features
    try:
        yield
    finally:
        conv_in.pose_features = None


@contextlib.contextmanager
def face_regions(unet: UNetSpatioTemporalConditionModel, regions: Tensor | None) -> Iterator[None]:
    """For the calls inside, each latent cell sees the face tokens of one person.

    Args:
        regions: number of that person, from 0, `(B·T, h, w)`; None is one person everywhere.
    """
    adapters = [module for module in unet.modules() if isinstance(module, IDAdapter)]
    for adapter in adapters:
        adapter.regions = regions
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.regions = None
