"""Catalogue of perception models: what they are called, where they come from, where they lie.

Nothing is downloaded here. Files are looked for in the folders of ANIMATOR_MODELS, then in the
cache, under `face/PACK/*.onnx` and `pose/*.onnx` or in the folder itself.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENT = "ANIMATOR_MODELS"
INSIGHTFACE_RELEASES = "https://github.com/deepinsight/insightface/releases/download/v0.7"
INSIGHTFACE_LICENCE = "InsightFace model licence: non-commercial research only"
DWPOSE = "https://huggingface.co/yzd-v/DWPose/resolve/main"


class ModelError(ValueError):
    """A model that is missing or damaged; the message says which, and how to mend it."""


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """One entry of the catalogue; `files` are the places below a models folder that it may have."""

    name: str
    kind: str  # face, detector, pose
    files: tuple[str, ...]
    source: str
    licence: str
    non_commercial: bool
    sha256: str | None = None


CATALOGUE: tuple[KnownModel, ...] = (
    *(
        KnownModel(
            name=pack,
            kind="face",
            files=(f"face/{pack}", f"models/{pack}", pack),
            source=f"{INSIGHTFACE_RELEASES}/{pack}.zip",
            licence=INSIGHTFACE_LICENCE,
            non_commercial=True,
        )
        for pack in ("antelopev2", "buffalo_l", "buffalo_m", "buffalo_s", "buffalo_sc")
    ),
    KnownModel(
        name="yolox_l",
        kind="detector",
        files=("pose/yolox_l.onnx", "yolox_l.onnx"),
        source=f"{DWPOSE}/yolox_l.onnx",
        licence="Apache-2.0",
        non_commercial=False,
    ),
    KnownModel(
        name="yolox_nano",
        kind="detector",
        files=("pose/yolox_nano.onnx", "yolox_nano.onnx"),
        source="https://github.com/Megvii-BaseDetection/YOLOX/releases/download/0.1.1rc0/yolox_nano.onnx",
        licence="Apache-2.0",
        non_commercial=False,
    ),
    KnownModel(
        name="dwpose",
        kind="pose",
        files=("pose/dw-ll_ucoco_384.onnx", "dw-ll_ucoco_384.onnx"),
        source=f"{DWPOSE}/dw-ll_ucoco_384.onnx",
        licence="Apache-2.0",
        non_commercial=False,
    ),
    KnownModel(
        name="tinypose",
        kind="pose",
        files=("pose/tinypose_256x192.onnx", "tinypose_256x192.onnx"),
        source="https://github.com/PaddlePaddle/PaddleDetection (configs/keypoint/tiny_pose)",
        licence="Apache-2.0",
        non_commercial=False,
    ),
)
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


def known(name: str) -> KnownModel:
    """The catalogue entry called `name`; ModelError names the entries there are."""
    for model in CATALOGUE:
        if model.name == name:
            return model
    names = ", ".join(model.name for model in CATALOGUE)
    raise ModelError(f"no model is called {name!r}; expected one of {names}")


def find(name: str) -> Path | None:
    """The file (or pack folder) of a known model, or of a face pack of any name; None if absent."""
    entries = [model for model in CATALOGUE if model.name == name]
    places = entries[0].files if entries else (f"face/{name}", name)
    for folder in model_folders():
        for place in places:
            path = folder / place
            if path.is_file() or is_face_pack(path):
                return path
    return None


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


def sha256(path: Path) -> str:
    """Hex digest of a file, or of the sorted names and digests of a pack's networks."""
    if path.is_dir():
        lines = [f"{sha256(file)}  {file.name}\n" for file in sorted(path.glob("*.onnx"))]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
