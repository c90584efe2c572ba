"""Model folders: `config.json` and one safetensors file a component.

A folder may hold the animator (`unet`, `pose_net`, `face_encoder`), the alignment block
(`alignment`), or both. Nothing in it can run code.
"""

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from animator.alignment import AlignmentBlock
from animator.config import AlignmentConfig, AnimatorConfig
from animator.model import Animator

FORMAT = 1
ANIMATOR_PARTS = ("unet", "pose_net", "face_encoder")
Config = TypeVar("Config", AlignmentConfig, AnimatorConfig)


class WeightsError(ValueError):
    """A model folder that cannot be read; the message names the file and the mend."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write under a temporary name in the same folder, flush to disk, rename."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _write_component(folder: Path, name: str, state: Mapping[str, Tensor]) -> None:
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    write_atomically(folder / f"{name}.safetensors", save(tensors))


def save_model(
    folder: Path,
    *,
    animator: tuple[AnimatorConfig, Mapping[str, Tensor]] | None = None,
    alignment: tuple[AlignmentConfig, Mapping[str, Tensor]] | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write a model folder; `config.json` comes last, so a folder with one is complete.

    Args:
        animator: configuration and state of an `Animator`.
        alignment: configuration and state of an `AlignmentBlock`.
        about: what else to record: data, licences, how it is sampled.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {"format": FORMAT, **(about or {})}
    if animator is not None:
        sizes, state = animator
        config["animator"] = dataclasses.asdict(sizes)
        for part in ANIMATOR_PARTS:
            prefix = f"{part}."
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            _write_component(folder, part, own)
    if alignment is not None:
        widths, state = alignment
        config["alignment"] = dataclasses.asdict(widths)
        _write_component(folder, "alignment", state)
    write_atomically(folder / "config.json", json.dumps(config, indent=2, sort_keys=True).encode())


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's `config.json`.

    Raises:
        WeightsError: where it is missing, unreadable or of another format.
    """
    path = folder / "config.json"
    if not folder.is_dir() or not path.is_file():
        raise WeightsError(
            f"{folder} is not a model folder: expected a config.json and safetensors files in it. "
            "`animator train animator` writes one, as `model` in its output folder."
        )
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise WeightsError(f"{path} is not of format {FORMAT}; this version reads no other.")
    return config


def _sizes(kind: type[Config], stored: Any, path: Path) -> Config:
    if not isinstance(stored, dict):
        raise WeightsError(f"{path} holds no sizes for {kind.__name__}.")
    known = {f.name for f in dataclasses.fields(kind)}
    if unknown := sorted(set(stored) - known):
        raise WeightsError(f"{path} has sizes that this version does not know: {unknown}.")
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()
    }
    return kind(**values)


def _load_component(module: nn.Module, path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            # Cloned one by one: tensors inside a mapped file are not aligned in memory, and
            # arithmetic on them differs in the last bit.
            state = {key: file.get_tensor(key).clone() for key in file.keys()}
    except FileNotFoundError:
        raise WeightsError(f"{path} is missing: copy the whole model folder again.") from None
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is not a readable safetensors file: {error}.") from None
    expected = module.state_dict()
    missing, extra = sorted(expected.keys() - state), sorted(state.keys() - expected)
    if missing or extra:
        raise WeightsError(
            f"{path} does not fit its config.json: it lacks {missing[:3]} and has {extra[:3]} "
            f"({len(missing)} missing, {len(extra)} unknown)."
        )
    for key, value in state.items():
        if value.shape != expected[key].shape:
            raise WeightsError(
                f"{path}: {key} has shape {tuple(value.shape)}, but config.json asks for "
                f"{tuple(expected[key].shape)}."
            )
    module.load_state_dict(state, assign=True)


def load_animator(folder: Path) -> Animator:
    """The animator of a model folder, in evaluation mode.

    Raises:
        WeightsError: for a folder without one, and for files that do not fit.
    """
    config = read_config(folder)
    if "animator" not in config:
        raise WeightsError(
            f"{folder} holds no animator, only {sorted(config.keys() - {'format'})}: give the "
            "folder that `animator train animator` wrote."
        )
    sizes = _sizes(AnimatorConfig, config["animator"], folder / "config.json")
    with torch.device("meta"):
        model = Animator(sizes)
    for part in ANIMATOR_PARTS:
        _load_component(getattr(model, part), folder / f"{part}.safetensors")
    return model.eval()


def load_alignment(folder: Path) -> AlignmentBlock | None:
    """The alignment block of a model folder in evaluation mode, or None where it has none."""
    config = read_config(folder)
    if "alignment" not in config:
        return None
    block = AlignmentBlock(_sizes(AlignmentConfig, config["alignment"], folder / "config.json"))
    _load_component(block, folder / "alignment.safetensors")
    return block.eval()
