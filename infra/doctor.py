"""What this machine has and what would run where: the facts behind `animator doctor`."""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "diffusers",
    "deepspeed",
    "ray",
    "mlflow",
    "av",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "insightface",
    "opencv-python",
    "scikit-image",
)
# What the product writes and what users bring.
ENCODERS = ("libx264", "aac")
DECODERS = ("h264", "hevc", "vp9", "av1", "aac")
LOW_DISK_GB = 5


def examine() -> dict[str, Any]:
    """Everything at once, ready for JSON. A probe that fails reports its error as a problem."""
    report: dict[str, Any] = {}
    problems: list[str] = []
    probes: dict[str, Callable[[], Any]] = {
        "system": _system,
        "packages": _packages,
        "devices": _devices,
        "codecs": _codecs,
        "backends": _backends,
        "models": known_models,
        "licences": _licences,
    }
    for name, probe in probes.items():
        try:
            report[name] = probe()
        except Exception as error:  # a doctor reports what is broken, whatever it is
            report[name] = None
            problems.append(f"{name}: {type(error).__name__}: {error}")
    report["problems"] = problems + _problems(report)
    return report


def lines(report: dict[str, Any]) -> Iterable[str]:
    """The report as text."""
    if (system := report["system"]) is not None:
        yield f"System     {system['platform']}, Python {system['python']}"
        yield (
            f"           {system['cores']} cores, {system['memory_gb']} GB memory, "
            f"{system['disk_free_gb']} GB free in {system['folder']}"
        )
    if (packages := report["packages"]) is not None:
        present = [f"{name} {version}" for name, version in packages.items() if version]
        for start in range(0, len(present), 4):
            yield f"{'' if start else 'Packages':10} {', '.join(present[start : start + 4])}"
    if (devices := report["devices"]) is not None:
        yield f"Devices    training and sampling on {devices['torch']}"
        yield f"           perception on {', '.join(devices['onnxruntime'])}"
    if (codecs := report["codecs"]) is not None:
        yield f"Video      writes {_names(codecs['encode'])}; reads {_names(codecs['decode'])}"
    for kind, backend in (report["backends"] or {}).items():
        yield f"{kind.capitalize():10} {backend['name']}: {backend['reason']}"
    for model in report["models"] or []:
        yield f"Model      {model['name']}: {model['path'] or 'not here'} ({model['licence']})"
    for text in report["licences"] or []:
        yield f"Licence    {text}"
    for text in report["problems"]:
        yield f"Problem    {text}"
    yield "Problems: none." if not report["problems"] else f"Problems: {len(report['problems'])}."


def known_models() -> list[dict[str, Any]]:
    """Every model of the catalogue, and face packs beside it: name, kind, path or None, licence.

    `size` is in bytes: of what is here, else of what would be fetched (None where only the source
    knows); `non_commercial` says whether a licence forbids commercial use (None: not known).
    """
    from pipelines import models

    listed: list[dict[str, Any]] = [
        {
            "name": entry.name,
            "kind": entry.kind,
            "purpose": entry.purpose,
            "path": str(found) if (found := models.find(entry.name)) else None,
            "size": models.size_of(found) if found else entry.size,
            "licence": entry.licence,
            "non_commercial": entry.non_commercial,
            "source": entry.source,
        }
        for entry in models.CATALOGUE
    ]
    names = {entry["name"] for entry in listed}
    return listed + [
        {
            "name": pack.name,
            "kind": "face",
            "purpose": "a face pack of your own",
            "path": str(pack),
            "size": models.size_of(pack),
            "licence": models.UNKNOWN_LICENCE,
            "non_commercial": None,
            "source": str(pack),
        }
        for pack in models.face_packs()
        if pack.name not in names
    ]


def _names(found: dict[str, bool]) -> str:
    return ", ".join(name for name, present in found.items() if present) or "nothing"


def _system() -> dict[str, Any]:
    import psutil

    folder = Path.cwd()
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "disk_free_gb": round(shutil.disk_usage(folder).free / 1e9, 1),
        "folder": str(folder),
    }


def _packages() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _devices() -> dict[str, Any]:
    import onnxruntime
    import torch

    gpus = [
        {
            "name": torch.cuda.get_device_name(index),
            "memory_gb": round(torch.cuda.get_device_properties(index).total_memory / 1e9, 1),
        }
        for index in range(torch.cuda.device_count())
    ]
    return {
        "torch": f"cuda ({gpus[0]['name']})" if gpus else "cpu",
        "gpus": gpus,
        "threads": torch.get_num_threads(),
        "onnxruntime": [
            name.removesuffix("ExecutionProvider")
            for name in onnxruntime.get_available_providers()
            if name.startswith(("CUDA", "CPU"))
        ],
    }


def _codecs() -> dict[str, dict[str, bool]]:
    import av

    def present(name: str, mode: str) -> bool:
        try:
            av.Codec(name, mode)  # type: ignore[arg-type]
        except (ValueError, av.FFmpegError):
            return False
        return True

    return {
        "encode": {name: present(name, "w") for name in ENCODERS},
        "decode": {name: present(name, "r") for name in DECODERS},
    }


def _backends() -> dict[str, dict[str, str]]:
    """Which perception backends `auto` takes here, and why."""
    from pipelines.faces import open_face_backend
    from pipelines.pose_backends import open_pose_backend

    opened = {"face": open_face_backend("auto"), "pose": open_pose_backend("auto")}
    return {
        kind: {"name": backend.name, "reason": backend.reason, "licence": backend.licence}
        for kind, backend in opened.items()
    }


def _licences() -> list[str]:
    from animator.alignment_weights import shipped_alignment
    from animator.licences import of_alignment
    from animator.weights import read_config

    present = [model for model in known_models() if model["path"] and model["non_commercial"]]
    shipped = of_alignment(read_config(shipped_alignment()))
    return ["this project: Apache-2.0", f"its alignment weights: {shipped}"] + [
        f"{model['name']}: {model['licence']}, not for commercial use" for model in present
    ]


def _problems(report: dict[str, Any]) -> list[str]:
    found = []
    codecs, packages, devices = report["codecs"], report["packages"], report["devices"]
    if codecs and not all(codecs["encode"].values()):
        missing = [name for name, present in codecs["encode"].items() if not present]
        found.append(f"PyAV lacks {', '.join(missing)}: reinstall it from its wheel (`make setup`)")
    if packages and packages["onnxruntime"] and packages["onnxruntime-gpu"]:
        found.append("onnxruntime and onnxruntime-gpu exclude each other: uninstall the first")
    if devices and devices["gpus"] and "CUDA" not in devices["onnxruntime"]:
        found.append(
            "perception runs on the CPU although there is a GPU: "
            "pip uninstall onnxruntime, then pip install onnxruntime-gpu"
        )
    if report["system"] and report["system"]["disk_free_gb"] < LOW_DISK_GB:
        found.append(f"less than {LOW_DISK_GB} GB free: curation and checkpoints need room")
    return found
