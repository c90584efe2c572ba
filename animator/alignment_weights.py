"""Which alignment block is used: a model folder's own, the shipped one, another folder's, none."""

import hashlib
from pathlib import Path

from animator import licences
from animator.alignment import AlignmentBlock
from animator.tensor_files import WeightsError, component_files
from animator.weights import load_alignment, read_config

AUTO, SHIPPED, CLOSED_FORM = "auto", "shipped", "closed-form"
CHOICES = (AUTO, SHIPPED, CLOSED_FORM)
_DIGITS = 12  # of a digest, enough to tell weights apart


def shipped_alignment() -> Path:
    """The model folder of the alignment block that is installed with this package.

    Raises:
        WeightsError: where the installation lacks it.
    """
    folder = Path(__file__).parent / "pretrained" / "alignment"
    if not (folder / "config.json").is_file():
        raise WeightsError(
            f"{folder} is missing: install this package again, or choose {CLOSED_FORM}, which "
            "needs no weights."
        )
    return folder


def open_alignment(
    choice: str = AUTO, folder: Path | None = None
) -> tuple[AlignmentBlock | None, dict[str, str | None]]:
    """The chosen alignment block in evaluation mode, and what to record of it.

    Args:
        choice: `auto` for the block of the model in `folder` or, where that has none, the
            shipped one; `shipped`; `closed-form` for no block; or a model folder with one.
        folder: the model that is animated with.

    Returns:
        None for the closed form; and name, licence and the weights' SHA-256 (the first 12
        digits), the latter two None for the closed form.

    Raises:
        WeightsError: for a folder that is no model folder or holds no block, and for weights
            that are damaged, do not fit or are of an earlier version.
    """
    if choice == CLOSED_FORM:
        return None, {"name": "closed form", "licence": None, "sha256": None}
    if choice == AUTO and folder is not None and (block := load_alignment(folder)) is not None:
        return block, _about(folder, folder.resolve().name)
    if choice in (AUTO, SHIPPED):
        given, name = shipped_alignment(), SHIPPED
    else:
        given = Path(choice)
        name = given.resolve().name
        if not given.is_dir():
            raise WeightsError(
                f"Got alignment {choice!r}, but expected {', '.join(CHOICES)} or a model folder."
            )
    block = load_alignment(given)
    if block is None:
        raise WeightsError(
            f"{given} holds no alignment block: give the folder that `animator train alignment` "
            f"wrote, or choose {SHIPPED} or {CLOSED_FORM}."
        )
    return block, _about(given, name)


def _about(folder: Path, name: str) -> dict[str, str | None]:
    digest = hashlib.sha256()
    for path in component_files(folder, "alignment"):
        digest.update(path.read_bytes())
    licence = licences.of_alignment(read_config(folder))
    return {"name": name, "licence": licence, "sha256": digest.hexdigest()[:_DIGITS]}
