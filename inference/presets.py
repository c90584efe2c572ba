"""Presets: named settings of speed against quality, each with limits it must keep.

A preset is made from the model's own settings, so that a model with few steps or no guidance is
never made slower. Its limits are against `quality` with the same model, inputs and seed;
`inference.preset_benchmark` measures them on any model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a batch names presets in processes that must not load torch
    from inference.guidance import GuidanceConfig
    from inference.settings import AnimationSettings

FEW_STEPS = 10  # what the noise levels of Align Your Steps were optimised for
# Nobody has measured the presets on published weights yet; a record says so.
STATED_FOR = "the small model on a CPU"


class UnknownPresetError(ValueError):
    """A preset of a name that there is none of; the message has those that there are."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How far a preset may be from `quality`."""

    psnr: float  # least dB between the frames of both
    identity_lost: float  # most of the similarity to the reference's face

    def broken(self, psnr: float, identity_lost: float | None) -> list[str]:
        """A sentence for each limit that does not hold.

        Args:
            psnr: in dB, of the preset's frames against those of `quality`.
            identity_lost: cosine similarity of `quality` less that of the preset; None where no
                face could be compared.
        """
        found = []
        if not psnr >= self.psnr:
            found.append(f"{psnr:.1f} dB against quality, but at least {self.psnr:g} are stated")
        if identity_lost is not None and not identity_lost <= self.identity_lost:
            found.append(
                f"{identity_lost:.3f} of identity similarity lost, but at most "
                f"{self.identity_lost:g} is stated"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings of one name: what they are for, what they promise, and how they are made."""

    name: str
    purpose: str
    limits: Limits
    change: Callable[["AnimationSettings", str], "AnimationSettings"]

    def settings(self, own: "AnimationSettings", device: str) -> "AnimationSettings":
        """The preset for a model.

        Args:
            own: the model's own settings.
            device: the kind of device it is on: cpu or cuda.
        """
        return self.change(own, device)

    def record(self) -> dict[str, Any]:
        """Name and limits, for the record of an output."""
        return {
            "name": self.name,
            "limits_against_quality": {
                "psnr_least": self.limits.psnr,
                "identity_lost_most": self.limits.identity_lost,
                "stated_for": STATED_FOR,
            },
        }


def preset(name: str) -> Preset:
    """The preset of a name.

    Raises:
        UnknownPresetError: names those that there are.
    """
    if name not in PRESETS:
        raise UnknownPresetError(f"Got preset {name!r}, but expected one of {', '.join(PRESETS)}.")
    return PRESETS[name]


def steps_of(name: str | None, own: int) -> int:
    """Sampling steps that a preset takes where a model's own settings, or none, take `own`."""
    return min(own, FEW_STEPS) if name == "fast" else own


def _quality(own: "AnimationSettings", device: str) -> "AnimationSettings":
    """The model's own, without what trades quality for time: exact but for the face crop."""
    return replace(own, speed=replace(own.speed, cache_every=1, linears="full"))


def _balanced(own: "AnimationSettings", device: str) -> "AnimationSettings":
    return replace(
        own,
        guidance=_up_to(own.guidance, 50.0),
        face=replace(
            own.face,
            key_frames=min(own.face.key_frames, 0.5),
            refresh=max(own.face.refresh, 2),
        ),
        speed=replace(own.speed, cache_every=max(own.speed.cache_every, 2)),
    )


def _fast(own: "AnimationSettings", device: str) -> "AnimationSettings":
    return replace(
        own,
        sampling=replace(
            own.sampling,
            solver="euler",
            schedule="ays",
            steps=steps_of("fast", own.sampling.steps),
        ),
        guidance=_up_to(own.guidance, 20.0),
        face=replace(
            own.face,
            steps=min(own.face.steps, 4),
            iterations=min(own.face.iterations, 5),
            key_frames=min(own.face.key_frames, 0.5),
            refresh=max(own.face.refresh, 2),
        ),
        speed=replace(own.speed, cache_every=max(own.speed.cache_every, 2)),
    )


def _low_memory(own: "AnimationSettings", device: str) -> "AnimationSettings":
    offload = device == "cuda"
    return replace(
        own,
        guidance=replace(own.guidance, batched=False),
        windows=replace(own.windows, batch=1),
        face=replace(own.face, chunk=1, portion=min(own.face.portion, 4)),
        speed=replace(
            own.speed,
            cache_every=1,
            linears="full",
            offload=offload,
            compile=own.speed.compile and not offload,
        ),
    )


def _up_to(own: "GuidanceConfig", high: float) -> "GuidanceConfig":
    """Guidance up to this noise level, and at no more levels than the model has it.

    At low noise it stays: where the network predicts the sample, the last prediction is the
    picture itself, and without guidance it is another one.
    """
    if own.sigma_min > high:  # the model has guidance above it alone
        return own
    return replace(own, sigma_max=high if own.sigma_max is None else min(own.sigma_max, high))


PRESETS: Mapping[str, Preset] = {
    each.name: each
    for each in (
        Preset(
            name="quality",
            purpose="the model's own settings, exact but for the crop of face optimisation",
            limits=Limits(psnr=100.0, identity_lost=0.0),
            change=_quality,
        ),
        Preset(
            name="balanced",
            purpose="near quality in less time",
            limits=Limits(psnr=42.0, identity_lost=0.03),
            change=_balanced,
        ),
        Preset(
            name="fast",
            purpose="previews and large batches",
            limits=Limits(psnr=34.0, identity_lost=0.06),
            change=_fast,
        ),
        Preset(
            name="low_memory",
            purpose="meant for cards of 8 to 12 GB; the frames of quality but for rounding",
            limits=Limits(psnr=50.0, identity_lost=0.01),
            change=_low_memory,
        ),
    )
}
