"""How a model is used: settings of every part of an animation, together.

A model folder brings its own; presets and `--set` change them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from inference.clip_alignment import AlignmentSettings
from inference.faces.config import FaceOptimizationConfig
from inference.guidance import GuidanceConfig
from inference.presets import Preset
from inference.provenance import ProvenanceConfig
from inference.sampler import SamplerConfig
from inference.speed import SpeedConfig
from inference.windows import WindowConfig
from pipelines.overrides import apply_overrides, from_dict


@dataclass(frozen=True, kw_only=True)
class AnimationSettings:
    """How a model is sampled and poses are aligned; a model folder brings its own."""

    sampling: SamplerConfig = field(default_factory=SamplerConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    windows: WindowConfig = field(default_factory=WindowConfig)
    alignment: AlignmentSettings = field(default_factory=AlignmentSettings)
    face: FaceOptimizationConfig = field(default_factory=FaceOptimizationConfig)
    provenance: ProvenanceConfig = field(default_factory=ProvenanceConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    devices: tuple[str, ...] = ()  # that share the windows of a long clip; none: where the model is

    def with_choices(
        self, *, steps: int | None = None, guidance: float | None = None
    ) -> "AnimationSettings":
        """These settings with another number of steps, or guidance of one strength throughout."""
        settings = self
        if steps is not None:
            settings = replace(settings, sampling=replace(settings.sampling, steps=steps))
        if guidance is not None:
            scale = replace(settings.guidance, min=guidance, max=guidance)
            settings = replace(settings, guidance=scale)
        return settings


def settings_of(about: dict[str, Any]) -> AnimationSettings:
    """How a model is sampled, from its folder's `config.json`; guidance may be one number."""
    guidance = about.get("guidance", 1.0)
    return AnimationSettings(
        sampling=from_dict(SamplerConfig, about.get("sampling", {})),
        guidance=from_dict(GuidanceConfig, guidance)
        if isinstance(guidance, dict)
        else GuidanceConfig.constant(float(guidance)),
        windows=from_dict(WindowConfig, about.get("windows", {})),
        speed=from_dict(SpeedConfig, about.get("speed", {})),
        provenance=from_dict(ProvenanceConfig, about.get("provenance", {})),
        alignment=from_dict(AlignmentSettings, about.get("alignment_settings", {})),
        face=from_dict(FaceOptimizationConfig, about.get("face_optimization", {})),
    )


def chosen_settings(
    own: AnimationSettings, device: str, preset: Preset | None, changes: Sequence[str]
) -> tuple[AnimationSettings, AnimationSettings]:
    """What a preset makes of a model's own settings, and that with the changes made to it.

    Args:
        device: the kind of device the model is on: cpu or cuda.
        preset: None leaves the model's own.
        changes: as "sampling.churn=40".

    Raises:
        ValueError: for a change of what there is not, or to what cannot be.
    """
    base = own if preset is None else preset.settings(own, device)
    return base, apply_overrides(base, changes)
