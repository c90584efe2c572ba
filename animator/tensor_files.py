"""Tensors on disk: one component of a model as one safetensors file, or as shards with an index.

File names and the index follow the Hugging Face convention (`NAME.safetensors`, or
`NAME-00001-of-00002.safetensors` with `NAME.safetensors.index.json`). Neither writing nor reading
holds a second copy of the component in memory.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

MAX_SHARD_SIZE = "5GB"
MAX_INDEX_BYTES = 16 << 20


class WeightsError(ValueError):
    """Weights that cannot be read or do not fit; the message names the file and the mend."""


class MissingTensorsError(WeightsError):
    """Weights without some of the model's tensors."""


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a temporary file in the same folder, flush it to disk, rename it."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    staged = Path(name)
    try:
        write(staged)
        with staged.open("rb") as file:
            os.fsync(file.fileno())
        staged.chmod(0o644)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """A JSON file with sorted keys, complete or not there."""
    text = json.dumps(content, indent=2, sort_keys=True)
    write_atomically(path, lambda staged: _write_text(staged, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)


def write_component(
    folder: Path, name: str, state: Mapping[str, Tensor], max_shard_size: int | str = MAX_SHARD_SIZE
) -> None:
    """Write a component's tensors; files of an earlier, other split are removed at the end."""
    tensors = {key: value.detach() for key, value in state.items()}
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern=f"{name}{{suffix}}.safetensors", max_shard_size=max_shard_size
    )
    written = set(split.filename_to_tensors)
    for filename, keys in split.filename_to_tensors.items():
        # Only what is not already dense in main memory is copied, a shard at a time.
        part = {key: tensors[key].cpu().contiguous() for key in keys}
        write_atomically(
            folder / filename, lambda staged, part=part: save_file(part, staged, {"format": "pt"})
        )
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / _index_name(name), index)
        written.add(_index_name(name))
    for path in component_files(folder, name, existing_only=True):
        if path.name not in written:
            path.unlink()


def _index_name(name: str) -> str:
    return f"{name}.safetensors.index.json"


def component_files(folder: Path, name: str, *, existing_only: bool = False) -> list[Path]:
    """The safetensors files of a component; its index too where `existing_only`.

    Raises:
        WeightsError: for an index that cannot be read or names files outside the folder.
    """
    if existing_only:
        shards = folder.glob(f"{name}-[0-9]*-of-[0-9]*.safetensors")
        whole = (folder / f"{name}.safetensors", folder / _index_name(name))
        return [*shards, *(path for path in whole if path.exists())]
    index = folder / _index_name(name)
    if index.is_file():
        return read_index(index)
    return [folder / f"{name}.safetensors"]


def read_index(index: Path) -> list[Path]:
    """The files that an index names, each once.

    Raises:
        WeightsError: for an index that cannot be read or names files outside its folder.
    """
    try:
        if index.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError(f"{index.stat().st_size} bytes, expected at most {MAX_INDEX_BYTES}")
        weight_map = json.loads(index.read_text())["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} is not a readable index of weights: {error}.") from None
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise WeightsError(
                f"{index} names {name!r}, but expected a safetensors file in the same folder."
            )
    return [index.parent / name for name in names]


def read_settings(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises WeightsError where there is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds no settings, only {type(content).__name__}.")
    return content


def read_tensors(
    paths: Iterable[Path],
    expected: Mapping[str, Tensor],
    what: str,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The tensors of safetensors files, checked against names and shapes before any is read.

    Args:
        expected: tensors of the wanted names and shapes; meta tensors will do.
        what: of which model the sizes are, for messages.
        dtype: type of the floating-point tensors; None keeps the file's.

    Raises:
        WeightsError: for a file that is missing, damaged or does not fit.
    """
    state: dict[str, Tensor] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
                check_shapes({k: s for k, s in shapes.items() if k in expected}, expected, path)
                for key in shapes:
                    # Copied one by one: tensors inside a mapped file are not aligned in memory,
                    # and arithmetic on them differs in the last bit.
                    tensor = file.get_tensor(key)
                    if dtype is not None and tensor.is_floating_point():
                        state[key] = tensor.to(dtype, copy=True)
                    else:
                        state[key] = tensor.clone()
        except FileNotFoundError:
            raise WeightsError(f"{path} is missing: copy the whole model folder again.") from None
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path} is not a readable safetensors file: {error}.") from None
    check_names(state, expected, what)
    for key, value in state.items():
        if value.is_floating_point() != expected[key].is_floating_point():
            raise WeightsError(f"{what}: {key} is of type {value.dtype}, expected real numbers.")
    return state


def check_names(state: Iterable[str], expected: Iterable[str], what: str) -> None:
    """Raises WeightsError unless both name the same tensors; MissingTensorsError for too few."""
    given, wanted = set(state), set(expected)
    missing, extra = sorted(wanted - given), sorted(given - wanted)
    if missing or extra:
        kind = MissingTensorsError if missing else WeightsError
        raise kind(
            f"{what} does not fit: it lacks {_some(missing)} and has {_some(extra)} that "
            f"{'is' if len(extra) == 1 else 'are'} not expected."
        )


def _some(names: list[str], limit: int = 3) -> str:
    if not names:
        return "nothing"
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def check_shapes(
    shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, Tensor], what: object
) -> None:
    """Raises WeightsError naming every tensor of another shape than expected."""
    wrong = [
        f"{key} has shape {shape}, expected {tuple(expected[key].shape)}"
        for key, shape in shapes.items()
        if shape != tuple(expected[key].shape)
    ]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise WeightsError(f"{what}: {'; '.join(wrong[:3])}{more}.")


def load_component(
    module: nn.Module, folder: Path, name: str, dtype: torch.dtype | None = None
) -> None:
    """Put a component's tensors from a model folder into a module, which may be on meta.

    Raises:
        WeightsError: for files that are missing, damaged or do not fit.
    """
    paths = component_files(folder, name)
    what = f"{paths[0] if len(paths) == 1 else folder / name} with the sizes of its config.json"
    module.load_state_dict(read_tensors(paths, module.state_dict(), what, dtype), assign=True)
