"""Small folders in the layouts of the published weights, for the tests of several modules."""

from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import (
    AutoencoderKLTemporalDecoder,
)
from diffusers.models.unets.unet_spatio_temporal_condition import (
    UNetSpatioTemporalConditionModel,
)
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

WIDTH = 64  # of the cross-attention, and of the image encoder's projection
UNET = {
    "block_out_channels": [32, 64, 64, 64],
    "num_attention_heads": [2, 4, 4, 4],
    "cross_attention_dim": WIDTH,
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 96,
    "num_frames": 4,
}


def small_svd(folder: Path, *, variant: str | None = None) -> Path:
    """A folder of Stable Video Diffusion with random weights and every part it is used for."""
    torch.manual_seed(0)
    options = {"variant": variant, "safe_serialization": True}
    dtype = torch.float16 if variant == "fp16" else torch.float32
    UNetSpatioTemporalConditionModel(**UNET).to(dtype).save_pretrained(folder / "unet", **options)
    AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        force_upcast=True,
    ).to(dtype).save_pretrained(folder / "vae", **options)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=224,
        patch_size=32,
    )
    encoder = CLIPVisionModelWithProjection(vision).to(dtype)
    encoder.save_pretrained(folder / "image_encoder", **options)
    return folder


def small_v1(folder: Path, *, embedding_dim: int = 512) -> Path:
    """A folder of v1 checkpoints, plain state dicts with random weights."""
    import json

    from animator.stable_video import sizes_from_unet

    torch.manual_seed(1)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"unet_config": UNET}))
    model = v1_model(sizes_from_unet(UNET, folder), embedding_dim)
    for part in ("unet", "pose_net", "face_encoder"):
        torch.save(getattr(model, part).state_dict(), folder / f"{part}.pth")
    return folder


def v1_model(sizes, embedding_dim: int):
    import dataclasses

    from animator.model import Animator

    model = Animator(dataclasses.replace(sizes, face_embedding_dim=embedding_dim))
    for parameter in model.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.05)
    return model
