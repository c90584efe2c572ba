"""Where models lie, and which is taken where several do.

Nothing is downloaded here. Files are looked for in the folders of ANIMATOR_MODELS, then in the
cache, under `face/PACK/*.onnx` and `pose/*.onnx` or in the folder itself; models of many files in
a folder of their name.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from pipelines.model_catalogue import (
    CATALOGUE,
    UNKNOWN_LICENCE,
    KnownModel,
    ModelError,
    known,
)

__all__ = [
    "CATALOGUE",
    "UNKNOWN_LICENCE",
    "KnownModel",
    "ModelError",
    "known",
]

ENVIRONMENT = "ANIMATOR_MODELS"
# Best first: a detector and a pose network that are used together where both lie there.
FACE_PACKS = ("antelopev2", "buffalo_l", "buffalo_m", "buffalo_s", "buffalo_sc")
DETECTORS = ("yolox_l", "yolox_nano")
POSE_NETWORKS = ("dwpose", "tinypose")


@dataclass(frozen=True, kw_only=True)
class PoseModels:
    """The two files of a top-down pose backend."""

    detector: Path
    pose: Path
    licence: str
    non_commercial: bool


def cache_folder() -> Path:
    """Where pulled and imported models are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "animator" / "models"


def model_folders() -> list[Path]:
    """Existing folders to look in, first wins: those of ANIMATOR_MODELS, then the cache."""
    given = [p for p in os.environ.get(ENVIRONMENT, "").split(os.pathsep) if p.strip()]
    folders = [*(Path(p).expanduser() for p in given), cache_folder()]
    return [folder for folder in folders if folder.is_dir()]


def find(name: str) -> Path | None:
    """The file or folder of a known model, or of a face pack of any name; None if absent."""
    entries = [model for model in CATALOGUE if model.name == name]
    places = entries[0].places if entries else (f"face/{name}", name)
    for folder in model_folders():
        for place in places:
            if is_model(entries[0] if entries else None, folder / place):
                return folder / place
    return None


def locate_folder(name: str) -> Path | None:
    """The folder of a known model of many files (`svd-xt`, `stableanimator-v1`); None if absent.

    Raises:
        ModelError: for a name that the catalogue does not know as such a model.
    """
    if not known(name).marks:
        raise ModelError(f"{name} is no model of many files in a folder")
    return find(name)


def is_model(entry: KnownModel | None, path: Path) -> bool:
    """Whether `path` holds the entry's model; of a face pack where the catalogue has no entry."""
    if entry is not None and entry.marks:
        return path.is_dir() and all(any(path.glob(mark)) for mark in entry.marks)
    return path.is_file() or is_face_pack(path)


def is_face_pack(folder: Path) -> bool:
    """Whether the folder holds networks: a detector and a recogniser, whatever their names."""
    return folder.is_dir() and len(list(folder.glob("*.onnx"))) >= 2


def face_packs() -> list[Path]:
    """Every pack present: known ones best first, then the others by name."""
    found: dict[str, Path] = {}
    for folder in model_folders():
        places = [*folder.glob("face/*"), *folder.glob("models/*"), *folder.glob("*")]
        for path in sorted(places):
            if path.name not in ("face", "pose", "models") and is_face_pack(path):
                found.setdefault(path.name, path)
    order = {name: rank for rank, name in enumerate(FACE_PACKS)}
    return [found[name] for name in sorted(found, key=lambda n: (order.get(n, len(order)), n))]


def locate_face_pack(name: str | None = None) -> Path | None:
    """The folder of the named InsightFace pack, or of the best one present."""
    packs = face_packs()
    if name is None:
        return packs[0] if packs else None
    return next((pack for pack in packs if pack.name == name), None)


def locate_pose_models(pose: str | None = None) -> PoseModels | None:
    """The best detector and pose network present (or the named pose network); None if one lacks."""
    names = POSE_NETWORKS if pose is None else (known(pose).name,)
    detector = next(((n, p) for n in DETECTORS if (p := find(n))), None)
    network = next(((n, p) for n in names if (p := find(n))), None)
    if detector is None or network is None:
        return None
    entries = known(detector[0]), known(network[0])
    return PoseModels(
        detector=detector[1],
        pose=network[1],
        licence=", ".join(sorted({entry.licence for entry in entries})),
        non_commercial=any(entry.non_commercial for entry in entries),
    )


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def sha256(path: Path) -> str:
    """Hex digest of a file, or of the sorted names and digests of a pack's networks."""
    if path.is_dir():
        lines = [f"{sha256(file)}  {file.name}\n" for file in sorted(path.glob("*.onnx"))]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
