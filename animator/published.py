"""v1's published checkpoints as a model.

v1 is the predecessor of the method, StableAnimator (CVPR 2025). Its three checkpoints are plain
state dicts; they are read with `weights_only=True`, which refuses anything but tensors.
"""

import dataclasses
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from animator.config import AnimatorConfig, ChannelOrder, svd_xt
from animator.model import Animator
from animator.stable_video import sizes_from_unet
from animator.tensor_files import WeightsError, check_names, check_shapes, read_settings
from animator.weights import ANIMATOR_PARTS

# How v1 is sampled; the names are those of the sampler's settings.
V1_SAMPLING = {"solver": "euler", "steps": 25, "sigma_min": 0.002, "sigma_max": 700.0, "rho": 7.0}
V1_GUIDANCE = 3.0
V1_WINDOWS = {"anchor_first": True}  # sharing a quarter: 4 of 16 frames
V1_FPS = 7.0
V1_FACE_MODEL = "antelopev2"
V1_SIDE = 512  # pixels; v1 was trained at 512 x 512 and 576 x 1024


def animator_from_v1(
    folder: str | Path,
    *,
    channel_order: ChannelOrder = "bgr",
    dtype: torch.dtype | None = None,
) -> Animator:
    """The animator of v1's published checkpoints.

    Looks for `unet.pth`, `pose_net.pth` and `face_encoder.pth` in the folder or in `Animation/`
    below it, and for a `config.json` beside them with the UNet's sizes, under `unet_config` or as
    diffusers writes them (absent in the published folder: then the sizes of Stable Video
    Diffusion XT). Every tensor of the files is used, and every tensor of the model is theirs.

    Args:
        channel_order: order in which the recognition network saw the training faces. v1's code
            hands RGB pictures to a function that expects BGR, so its weights most likely learned
            embeddings of swapped channels.
        dtype: type of the weights; None keeps that of the files.

    Raises:
        WeightsError: for files that are missing, damaged, hold anything but tensors, or do not
            fit; nothing in them is executed.
    """
    folder = _v1_folder(Path(folder))
    states = {part: _read_pickle(folder / f"{part}.pth", dtype) for part in ANIMATOR_PARTS}
    config_path = folder / "config.json"
    if config_path.is_file():
        config = read_settings(config_path)
        unet_config = config.get("unet_config", config)
        if not isinstance(unet_config, dict):
            raise WeightsError(f"{config_path}: unet_config holds no settings.")
        sizes = sizes_from_unet(unet_config, config_path)
    else:
        sizes = dataclasses.replace(svd_xt(), height=V1_SIDE, width=V1_SIDE)
    sizes = dataclasses.replace(
        sizes,
        face_channel_order=channel_order,
        face_model=V1_FACE_MODEL,
        conditioning_fps=V1_FPS,
        **_pose_sizes(states["pose_net"], folder / "pose_net.pth"),
        **_face_sizes(states["face_encoder"], sizes, folder / "face_encoder.pth"),
    )
    with torch.device("meta"):
        model = Animator(sizes)
    for part, state in states.items():
        module: nn.Module = getattr(model, part)
        path, expected = folder / f"{part}.pth", module.state_dict()
        check_names(state, expected, str(path))
        check_shapes({key: tuple(value.shape) for key, value in state.items()}, expected, path)
        module.load_state_dict(state, assign=True)
    return model.eval()


def v1_files(folder: str | Path) -> list[Path]:
    """The three checkpoints of a v1 folder; raises WeightsError where one is missing."""
    found = _v1_folder(Path(folder))
    return [found / f"{part}.pth" for part in ANIMATOR_PARTS]


def _v1_folder(folder: Path) -> Path:
    names = [f"{part}.pth" for part in ANIMATOR_PARTS]
    for place in (folder, folder / "Animation"):
        missing = [name for name in names if not (place / name).is_file()]
        if not missing:
            return place
        if len(missing) < len(names):
            raise WeightsError(f"{place} lacks {', '.join(missing)}: copy the whole folder again.")
    raise WeightsError(
        f"{folder} holds no v1 checkpoints: expected {', '.join(names)} in it or in its folder "
        "Animation (`animator models pull stableanimator-v1` fetches them)."
    )


def _read_pickle(path: Path, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """A plain state dict; tensors stay mapped on disk unless a type is asked for."""
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    whole = zipfile.is_zipfile(path)
    with path.open("rb") as file:
        if file.read(2) == b"PK" and not whole:  # an archive whose end, its directory, is missing
            raise WeightsError(f"{path} is cut off: fetch it again.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on how a refused file was pickled
            state = torch.load(path, mmap=whole, **options)
    except pickle.UnpicklingError:
        # torch's own text advises to load it without the check, which nobody should.
        raise WeightsError(
            f"{path} holds more than tensors, so it was not loaded and nothing in it was executed: "
            "fetch the published file again, and do not load this one by other means."
        ) from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{path} is damaged or cut off ({_first_sentence(error)}): fetch it again."
        ) from None
    if not isinstance(state, Mapping) or not state:
        raise WeightsError(f"{path} holds {type(state).__name__}, expected named tensors.")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise WeightsError(
                f"{path}: {key!r} is a {type(value).__name__}, but a plain state dict holds "
                "tensors only."
            )
        if (
            value.layout != torch.strided
            or value.device.type != "cpu"
            or (not value.is_floating_point())
        ):
            raise WeightsError(
                f"{path}: {key} is a {value.dtype} tensor ({value.layout}, {value.device}), but "
                "weights are dense real numbers."
            )
    if all(key.startswith("module.") for key in state):  # as saved from a distributed wrapper
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return {key: value if dtype is None else value.to(dtype) for key, value in state.items()}


def _first_sentence(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return re.sub(r"\s+", " ", text[0])[:200].rstrip(". ") if text else type(error).__name__


def _shape(state: Mapping[str, Tensor], key: str, rank: int, path: Path) -> tuple[int, ...]:
    if key not in state or state[key].ndim != rank:
        found = f"shape {tuple(state[key].shape)}" if key in state else "nothing"
        raise WeightsError(f"{path}: {key} has {found}, expected a tensor of {rank} dimensions.")
    return tuple(state[key].shape)


def _pose_sizes(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Channels of the PoseNet; its last convolutions' outputs and the first one's input."""
    first = _shape(state, "conv_layers.0.weight", 4, path)[1]
    stages = (_shape(state, f"conv_layers.{i}.weight", 4, path)[0] for i in (2, 6, 10, 14))
    return {"pose_channels": (first, *stages)}


def _face_sizes(state: Mapping[str, Tensor], sizes: AnimatorConfig, path: Path) -> dict[str, Any]:
    """Sizes of the Face Encoder that its tensors give."""
    embedding = _shape(state, "proj.0.weight", 2, path)[1]
    outputs = _shape(state, "proj.2.weight", 2, path)[0]
    tokens, rest = divmod(outputs, sizes.cross_attention_dim)
    if rest or not tokens:
        raise WeightsError(
            f"{path}: proj.2.weight gives {outputs} numbers, expected a multiple of the UNet's "
            f"cross-attention width {sizes.cross_attention_dim}."
        )
    layers = {m[1] for key in state if (m := re.match(r"fusion_model\.layers\.(\d+)\.", key))}
    return {
        "face_embedding_dim": embedding,
        "num_face_tokens": tokens,
        "face_encoder_depth": len(layers),
    }
