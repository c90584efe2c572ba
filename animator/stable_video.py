"""Stable Video Diffusion as a start: sizes and weights from a folder in diffusers' layout."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from animator.config import AnimatorConfig, svd_xt
from animator.id_adapter import IDAdapter
from animator.model import Animator, conditioning_networks
from animator.tensor_files import WeightsError, read_index, read_settings, read_tensors

DEFAULT_SIDE = 512  # pixels
# Settings of diffusers' UNet that say what it is built of, not how large it is.
_UNET_SIZES = (
    "block_out_channels",
    "layers_per_block",
    "num_attention_heads",
    "cross_attention_dim",
    "addition_time_embed_dim",
    "num_frames",
)


def sizes_from_unet(config: Mapping[str, Any], what: object) -> AnimatorConfig:
    """The `svd_xt` preset with the sizes of a diffusers UNet configuration.

    Raises:
        WeightsError: for a UNet of another structure than Stable Video Diffusion's, and for
            settings that are no sizes.
    """
    try:
        return _sizes_from_unet(config, what)
    except WeightsError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:
        raise WeightsError(f"{what} has sizes that do not go together: {error}") from None


def _sizes_from_unet(config: Mapping[str, Any], what: object) -> AnimatorConfig:
    preset = svd_xt()
    values: dict[str, Any] = {}
    depth = len(config.get("block_out_channels", preset.block_out_channels))
    for name in _UNET_SIZES:
        value = config.get(name, getattr(preset, name))
        if isinstance(value, list | tuple):
            value = tuple(value)
            # One number a block, where the method knows one number for all.
            if name in ("layers_per_block", "cross_attention_dim") and len(set(value)) == 1:
                value = value[0]
        elif name == "num_attention_heads":
            value = (value,) * depth
        values[name] = value
    latents = config.get("out_channels", preset.latent_channels)
    structure = {
        "in_channels": 2 * latents,
        "transformer_layers_per_block": 1,
        "projection_class_embeddings_input_dim": 3 * values["addition_time_embed_dim"],
        "down_block_types": ["CrossAttnDownBlockSpatioTemporal"] * (depth - 1)
        + ["DownBlockSpatioTemporal"],
        "up_block_types": ["UpBlockSpatioTemporal"]
        + ["CrossAttnUpBlockSpatioTemporal"] * (depth - 1),
    }
    for name, wanted in structure.items():
        given = config.get(name, wanted)
        if not isinstance(wanted, list) and isinstance(given, list) and len(set(given)) == 1:
            given = given[0]
        if given != wanted and given != tuple(wanted if isinstance(wanted, list) else ()):
            raise WeightsError(f"{what}: {name} is {given}, but the method is built on {wanted}.")
    multiple = preset.spatial_factor * 2 ** (depth - 1)
    side = max(1, DEFAULT_SIDE // multiple) * multiple
    return dataclasses.replace(preset, latent_channels=latents, height=side, width=side, **values)


def diffusers_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files of a component folder in diffusers' layout.

    Args:
        variant: "fp16" asks for half precision; None takes full precision where it is there.

    Raises:
        WeightsError: where there are none.
    """
    name = "diffusion_pytorch_model"
    for suffix in [f".{variant}"] if variant else ["", ".fp16"]:
        for index in (
            f"{name}.safetensors.index{suffix}.json",
            f"{name}{suffix}.safetensors.index.json",
        ):
            if (folder / index).is_file():
                return read_index(folder / index)
        if (path := folder / f"{name}{suffix}.safetensors").is_file():
            return [path]
    wanted = f"{name}.{variant}.safetensors" if variant else f"{name}[.fp16].safetensors"
    raise WeightsError(
        f"{folder} has no {wanted}: expected a folder of Stable Video Diffusion in diffusers' "
        "layout with safetensors weights (`animator models pull svd-xt`)."
    )


def animator_from_svd(
    folder: str | Path,
    *,
    sizes: AnimatorConfig | None = None,
    variant: str | None = None,
    dtype: torch.dtype | None = None,
) -> Animator:
    """An animator that starts where the paper does, from Stable Video Diffusion's UNet.

    The adapters' keys and values start as copies of their block's own; PoseNet and Face Encoder
    from scratch (from torch's global random numbers), their output projections at zero.

    Args:
        folder: of Stable Video Diffusion in diffusers' layout, or its `unet` folder.
        sizes: configuration to train; its UNet must be of the folder's size. None takes the
            folder's own sizes.
        variant: "fp16" reads the half-precision files.
        dtype: type of the weights; None keeps that of the files.

    Raises:
        WeightsError: for files that are missing, damaged or of another size.
    """
    folder = Path(folder)
    unet_folder = folder / "unet" if (folder / "unet").is_dir() else folder
    if not (unet_folder / "config.json").is_file():
        raise WeightsError(
            f"{folder} is no folder of Stable Video Diffusion: expected unet/config.json in it, as "
            "`animator models pull svd-xt` fetches it."
        )
    found = sizes_from_unet(read_settings(unet_folder / "config.json"), unet_folder / "config.json")
    if sizes is not None:
        for name in (*_UNET_SIZES[:-1], "latent_channels"):  # num_frames is free: no weight has it
            if getattr(sizes, name) != getattr(found, name):
                raise WeightsError(
                    f"{unet_folder}: {name} is {getattr(found, name)}, but the model to be "
                    f"trained asks for {getattr(sizes, name)}."
                )
        found = sizes
    with torch.device("meta"):
        model = Animator(found)
    expected = {k: v for k, v in model.unet.state_dict().items() if ".processor." not in k}
    state = read_tensors(diffusers_files(unet_folder, variant), expected, str(unet_folder), dtype)
    for name, module in model.unet.named_modules():
        if isinstance(module, IDAdapter):
            own = name.removesuffix(".processor")
            for part in ("k", "v"):
                state[f"{name}.id_to_{part}.weight"] = state[f"{own}.to_{part}.weight"].clone()
    model.unet.load_state_dict(state, assign=True)
    pose_net, face_encoder = conditioning_networks(found)
    model.pose_net, model.face_encoder = pose_net.to(model.dtype), face_encoder.to(model.dtype)
    return model.eval()
