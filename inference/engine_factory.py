"""Open an engine by name: the seam where another engine can be put behind batch and serve.

A factory is written "module:function" and called as `function(model_dir, face=…, pose=…,
alignment=…)`, with those of `AnimationEngine`'s other arguments that were chosen, in the process
that will run the engine, so nothing heavy is imported by whoever only names it.
"""

import hashlib
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from inference.requests import AnimationRequest
from pipelines.shards import sha256_file

DEFAULT_FACTORY = "inference.engine:AnimationEngine"
# Those of `animator.alignment_weights`, which loads torch; any other choice is a folder.
ALIGNMENT_WORDS = ("auto", "shipped", "closed-form")
PATH_SETTINGS = ("provenance.certificate", "provenance.key")  # of the changes of settings

Progress = Callable[[float, str], None]


class Engine(Protocol):
    """What batch and serve ask of an engine."""

    def run(
        self, request: AnimationRequest, progress: Progress | None = None, **shape: Any
    ) -> dict[str, Any]:
        """Write `request.output` and return its record.

        `progress(share 0..1, stage)` is called between steps; what it raises ends the run. A
        ValueError says in one sentence what the user can mend.

        Args:
            shape: `size`, `framing`, `align` and `work` (see `AnimationEngine.run`), where they are
                not the defaults.
        """
        ...


class FactoryError(ValueError):
    """An engine or model that cannot be opened; the message says what to give instead."""


def open_engine(
    factory: str,
    model_dir: Path,
    *,
    face: str = "auto",
    pose: str = "auto",
    alignment: str = "auto",
    **options: Any,
) -> Engine:
    """Call the factory "module:function"; raises FactoryError where there is none of that name.

    Args:
        options: further ones of the factory's own.
    """
    module_name, colon, function_name = factory.partition(":")
    if not (module_name and colon and function_name):
        raise FactoryError(f"engine factory {factory!r}, expected 'module:function'")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise FactoryError(
            f"engine factory {factory!r}: {error}; install it or put its folder on PYTHONPATH"
        ) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise FactoryError(f"engine factory {factory!r}: {module_name} has no {function_name}")
    given = {"face": face, "pose": pose, "alignment": alignment, **options}
    return cast(Engine, function(Path(model_dir), **given))


def model_fingerprint(model_dir: Path) -> str:
    """SHA-256 over the names and bytes of a model folder's files; raises FactoryError if empty."""
    model_dir = Path(model_dir)
    files = sorted(path for path in model_dir.rglob("*") if path.is_file())
    if not files:
        raise FactoryError(f"{model_dir}: no model here; give a folder that holds config.json")
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(model_dir).as_posix()}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def absolute_alignment(choice: str) -> str:
    """The choice of an alignment, for a process that may have another working folder."""
    return choice if choice in ALIGNMENT_WORDS else str(Path(choice).absolute())


def absolute_changes(changes: Sequence[str]) -> tuple[str, ...]:
    """Changes of settings as "a.b=c", for a process that may have another working folder."""
    return tuple(_absolute_change(change) for change in changes)


def names_a_path(change: str) -> bool:
    """Whether a change of a setting gives the path of a file."""
    return change.partition("=")[0].strip() in PATH_SETTINGS


def _absolute_change(change: str) -> str:
    name, equals, value = change.partition("=")
    if names_a_path(change) and value.strip():
        return f"{name}{equals}{Path(value.strip()).absolute()}"
    return change


def alignment_fingerprint(choice: str) -> str:
    """What tells one alignment from another; raises FactoryError where its folder is empty."""
    return choice if choice in ALIGNMENT_WORDS else model_fingerprint(Path(choice))
