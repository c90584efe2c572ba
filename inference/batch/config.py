"""What a batch is asked to do, and the settings that decide what comes out of it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from inference.engine_factory import (
    DEFAULT_FACTORY,
    absolute_alignment,
    absolute_changes,
    alignment_fingerprint,
    model_fingerprint,
)
from inference.presets import preset, steps_of
from pipelines.framing import MODES
from pipelines.models import face_packs, locate_pose_models

DEFAULT_STEPS = 25  # of a model whose folder does not say


class BatchError(ValueError):
    """A batch that cannot be started as asked; the message says what to change."""


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """What to run, on how many engines, each of how many CPUs.

    engines: None is one on this machine alone; on a cluster, as many as fit, growing with it.
    cpus_per_engine: None shares out this machine's CPUs, and is 1 on a cluster.
    preset: of `inference.presets`, which `changes` are made to; None: the model's own settings.
    changes: of the model's own settings, as "sampling.churn=40".
    size, framing: of items that do not say; the model's own size and `pad`.
    """

    manifest: Path
    out: Path
    model_dir: Path
    engines: int | None = None
    cpus_per_engine: int | None = None
    face: str = "auto"
    pose: str = "auto"
    alignment: str = "auto"
    align: bool = True
    dtype: str = "auto"
    preset: str | None = None
    changes: tuple[str, ...] = ()
    size: tuple[int, int] | None = None
    framing: str = "pad"
    engine_factory: str = DEFAULT_FACTORY

    def __post_init__(self) -> None:
        for name in ("engines", "cpus_per_engine"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BatchError(f"{name} is {value}, expected 1 or more")
        if self.preset is not None:
            preset(self.preset)
        if self.framing not in MODES:
            raise BatchError(f"framing is {self.framing!r}, expected {' or '.join(MODES)}")

    def absolute(self) -> dict[str, Any]:
        """The fields, with paths that mean the same in a process with another working folder."""
        paths = {"out": self.out.absolute(), "model_dir": self.model_dir.absolute()}
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return (
            values
            | paths
            | {
                "alignment": absolute_alignment(self.alignment),
                "changes": absolute_changes(self.changes),
            }
        )

    def engine_options(self) -> dict[str, Any]:
        """How the engine is opened."""
        options = {"dtype": self.dtype, "preset": self.preset, "changes": self.changes}
        return {
            "face": self.face,
            "pose": self.pose,
            "alignment": self.alignment,
            **{name: value for name, value in options.items() if value not in ("auto", (), None)},
        }


def read_settings(config: BatchConfig) -> dict[str, Any]:
    """Whatever decides an output besides its own line of the manifest, for the record.

    The networks that perception finds on this machine count: they are what `auto` stands for.

    Raises:
        FactoryError: there is no model in the folder.
    """
    return {
        "model": model_fingerprint(config.model_dir),
        "alignment": alignment_fingerprint(config.alignment),
        "align": config.align,
        "face": config.face,
        "pose": config.pose,
        "networks": found_networks(config),
        "dtype": config.dtype,
        # Without one there is no key, so that what was made before there were presets stays done.
        **({} if config.preset is None else {"preset": config.preset}),
        "changes": _pairs(config.changes),
        "size": None if config.size is None else list(config.size),
        "framing": config.framing,
    }


def found_networks(config: BatchConfig) -> dict[str, list[str]]:
    """The networks for faces and poses that this machine has, by name, the best first."""
    poses = None if config.pose == "file" else locate_pose_models()
    return {
        "faces": [pack.name for pack in face_packs()],
        "poses": [poses.detector.name, poses.pose.name] if poses else [],
    }


def chosen_networks(
    config: BatchConfig, found: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """Those of the found networks that an engine sees by; the others change no video.

    Args:
        found: as `found_networks` has them.
    """
    faces = list(found["faces"])
    kind, _, pack = config.face.partition(":")
    # A model that learned faces from one pack takes that one where it is there.
    animator = _object(_read_object(config.model_dir / "config.json").get("animator"))
    learned = animator.get("face_model")
    if kind == "auto" and animator.get("face_embedding") == "insightface" and learned in faces:
        pack = learned
    if kind == "cascade":
        faces = []
    else:
        faces = [name for name in faces if name == pack] if pack else faces[:1]
    return {"faces": faces, "poses": list(found["poses"])}


def model_defaults(config: BatchConfig) -> tuple[tuple[int, int], int]:
    """(height, width) and sampling steps of items that do not say, as far as the folder tells."""
    about = _read_object(config.model_dir / "config.json")
    animator, sampling = (_object(about.get(name)) for name in ("animator", "sampling"))
    size = config.size or (_whole(animator.get("height"), 1), _whole(animator.get("width"), 1))
    steps = _pairs(config.changes).get("sampling.steps", "")
    if steps.isdecimal():
        return size, max(1, int(steps))
    own = _whole(sampling.get("steps"), DEFAULT_STEPS)
    return size, steps_of(config.preset, own)


def _pairs(changes: Sequence[str]) -> dict[str, str]:
    parts = (text.partition("=") for text in changes)
    return {key.strip(): value.strip() for key, _, value in parts}


def _read_object(path: Path) -> Mapping[str, Any]:
    try:
        return _object(json.loads(path.read_bytes()))
    except (OSError, ValueError):
        return {}


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _whole(value: Any, otherwise: int) -> int:
    return value if isinstance(value, int) and value > 0 else otherwise
