"""Model folders: `config.json` and the safetensors of each component.

A folder may hold the animator (`unet`, `pose_net`, `face_encoder`), the alignment block
(`alignment`), or both, and beside them the frozen encoders in diffusers' layout (`vae/`,
`image_encoder/`). Nothing in it can run code.
"""

import dataclasses
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from animator.alignment import AlignmentBlock
from animator.config import AlignmentConfig, AnimatorConfig
from animator.tensor_files import (
    MAX_SHARD_SIZE,
    MissingTensorsError,
    WeightsError,
    load_component,
    read_settings,
    write_component,
    write_json,
)

FORMAT = 1
ANIMATOR_PARTS = ("unet", "pose_net", "face_encoder")
# Frozen encoders that come with Stable Video Diffusion: folder and stem of the weights' file.
ENCODERS = {"vae": "diffusion_pytorch_model", "image_encoder": "model"}
Config = TypeVar("Config", AlignmentConfig, AnimatorConfig)


def save_model(
    folder: Path,
    *,
    animator: tuple[AnimatorConfig, Mapping[str, Tensor]] | None = None,
    alignment: tuple[AlignmentConfig, Mapping[str, Tensor]] | None = None,
    about: Mapping[str, Any] | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Write a model folder; `config.json` comes last, so a folder with one is complete.

    Args:
        animator: configuration and state of an `Animator`.
        alignment: configuration and state of an `AlignmentBlock`.
        about: what else to record: data, licences, how it is sampled.
        max_shard_size: a larger component is split into several files (bytes, or "5GB").
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    config: dict[str, Any] = {"format": FORMAT, **(about or {})}
    if animator is not None:
        sizes, state = animator
        config["animator"] = dataclasses.asdict(sizes)
        for part in ANIMATOR_PARTS:
            prefix = f"{part}."
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            write_component(folder, part, own, max_shard_size)
    if alignment is not None:
        widths, state = alignment
        config["alignment"] = dataclasses.asdict(widths)
        write_component(folder, "alignment", state, max_shard_size)
    write_json(folder / "config.json", config)


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's `config.json`.

    Raises:
        WeightsError: where it is missing, unreadable or of another format.
    """
    path = folder / "config.json"
    if not folder.is_dir() or not path.is_file():
        raise WeightsError(
            f"{folder} is not a model folder: expected a config.json and safetensors files in it. "
            "`animator train animator` writes one, as `model` in its output folder, and "
            "`animator weights import-v1` makes one of published weights."
        )
    config = read_settings(path)
    if config.get("format") != FORMAT:
        raise WeightsError(f"{path} is not of format {FORMAT}; this version reads no other.")
    return config


def read_sizes(kind: type[Config], stored: Any, path: Path) -> Config:
    """A configuration from its JSON form.

    Raises:
        WeightsError: for sizes that are unknown, of a wrong type or do not go together.
    """
    if not isinstance(stored, dict):
        raise WeightsError(f"{path} holds no sizes for {kind.__name__}.")
    known = {f.name for f in dataclasses.fields(kind)}
    if unknown := sorted(set(stored) - known):
        raise WeightsError(f"{path} has sizes that this version does not know: {unknown}.")
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()
    }
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{path} has sizes that do not go together: {error}") from None


def encoder_files(source: Path) -> dict[str, list[Path]]:
    """Settings and weights of each frozen encoder in a folder of Stable Video Diffusion.

    Full precision is taken where the folder has both.

    Raises:
        WeightsError: where the folder lacks one of them.
    """
    found: dict[str, list[Path]] = {}
    for name, stem in ENCODERS.items():
        config = source / name / "config.json"
        choices = (source / name / f"{stem}{suffix}.safetensors" for suffix in ("", ".fp16"))
        weights = [path for path in choices if path.is_file()][:1]
        if not weights or not config.is_file():
            raise WeightsError(
                f"{source / name} has no config.json with {stem}[.fp16].safetensors: expected a "
                "folder of Stable Video Diffusion in diffusers' layout."
            )
        found[name] = [config, *weights]
    return found


def add_encoders(folder: Path, source: Path) -> list[str]:
    """Copy the frozen encoders of Stable Video Diffusion into a model folder.

    Each encoder is there completely or not.

    Args:
        source: a folder in diffusers' layout, with `vae/` and `image_encoder/`.

    Returns:
        The copied files, relative to `folder`.

    Raises:
        WeightsError: where the source lacks one of them.
    """
    copied: list[str] = []
    for name, files in encoder_files(source).items():
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}.") as scratch:
            staged = Path(scratch) / name
            staged.mkdir()
            for path in files:
                shutil.copyfile(path, staged / path.name)
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)
            staged.replace(folder / name)
        copied += [f"{name}/{path.name}" for path in files]
    return copied


def animator_sizes(folder: Path) -> AnimatorConfig:
    """Sizes of the animator in a model folder.

    Raises:
        WeightsError: for a folder without one.
    """
    config = read_config(folder)
    if "animator" not in config:
        raise WeightsError(
            f"{folder} holds no animator, only {sorted(config.keys() - {'format'})}: give the "
            "folder that `animator train animator` wrote."
        )
    return read_sizes(AnimatorConfig, config["animator"], folder / "config.json")


def load_alignment(folder: Path) -> AlignmentBlock | None:
    """The alignment block of a model folder in evaluation mode, or None where it has none.

    Raises:
        WeightsError: for a block that is damaged, does not fit or is of an earlier version.
    """
    config = read_config(folder)
    if "alignment" not in config:
        return None
    sizes = read_sizes(AlignmentConfig, config["alignment"], folder / "config.json")
    with torch.device("meta"):
        block = AlignmentBlock(sizes)
    try:
        load_component(block, folder, "alignment")
    except MissingTensorsError as error:
        raise WeightsError(
            f"{folder} holds an alignment block that was trained by an earlier version, with fewer "
            "parts than this one has: train it again with `animator train alignment`."
        ) from error
    return block.eval()
