"""The animator as a denoiser D(x; sigma): conditions and classifier-free guidance.

Shapes: B windows in one call, T frames of a clip, W of a window, P people, C latent channels,
h w latent size, D context width, F face tokens, C0 channels of the UNet's first block.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from animator import edm
from animator.feature_cache import FeatureCache
from animator.model import Animator

MAX_SCALE = 30.0


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    """Strength of classifier-free guidance over frames and noise levels; 1 is none.

    The strength rises evenly from `min` at the first frame to `max` at the last one, as Stable
    Video Diffusion has it; v1 has 3 for all. Outside of the interval of noise levels the
    conditional prediction is taken alone, which halves those steps (Kynkäänniemi et al., 2024,
    "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality").
    """

    min: float = 1.0
    max: float = 1.0
    sigma_min: float = 0.0
    sigma_max: float | None = None  # no limit
    batched: bool = True  # both predictions in one call; False takes two, and half the memory

    def __post_init__(self) -> None:
        for name in ("min", "max"):
            if not 0 <= getattr(self, name) <= MAX_SCALE:
                raise ValueError(
                    f"Got guidance.{name} {getattr(self, name)}, but expected 0 to {MAX_SCALE:g}."
                )
        if not 0 <= self.sigma_min <= self._highest:
            raise ValueError(
                f"Got guidance from sigma_min {self.sigma_min} to sigma_max {self.sigma_max}, but "
                "expected 0 <= sigma_min <= sigma_max."
            )

    @classmethod
    def constant(cls, scale: float) -> "GuidanceConfig":
        """The same strength for all frames and noise levels."""
        return cls(min=scale, max=scale)

    def applies(self, sigma: float) -> bool:
        """Whether a step at this noise level is guided."""
        return (self.min, self.max) != (1.0, 1.0) and self.sigma_min <= sigma <= self._highest

    @property
    def _highest(self) -> float:
        return math.inf if self.sigma_max is None else self.sigma_max

    def scales(self, num_frames: int) -> Tensor:
        """Strength of each frame of a clip, `(T, 1, 1, 1)`."""
        return torch.linspace(self.min, self.max, num_frames).reshape(-1, 1, 1, 1)


class Features(Protocol):
    """PoseNet's output for a clip, `(T, C0, h, w)`: a tensor, or what computes it on demand."""

    def __len__(self) -> int: ...

    def __getitem__(self, frames: list[int], /) -> Tensor:
        """Those of some frames, on the animator's device."""
        ...


class Regions(Protocol):
    """Whose place each latent cell of a clip is, `(T, h, w)`: a tensor, or what computes it."""

    def __getitem__(self, frames: list[int], /) -> Tensor:
        """Those of some frames, on the animator's device."""
        ...

    def to(self, device: torch.device, /) -> "Regions":
        """The same for an animator on another device."""
        ...


@dataclass(frozen=True)
class Conditions:
    """What the UNet is told of a clip; features and regions alone grow with its length."""

    context: Tensor  # (1, 1 + P·F, D): image token and each person's face tokens
    features: Features  # (T, C0, h, w): PoseNet's output
    reference: Tensor  # (1, C, h, w): latents of the reference
    time_ids: Tensor  # (1, 3)
    regions: Regions | None = None  # (T, h, w), where P is more than 1


class GuidedDenoiser:
    """D(x; sigma) of the animator for windows of one clip.

    Args:
        cache: of the animator's deep features, for steps that take them from the step before.
    """

    def __init__(
        self,
        animator: Animator,
        conditions: Conditions,
        guidance: GuidanceConfig,
        cache: FeatureCache | None = None,
    ):
        self.animator = animator
        self.conditions = conditions
        self.guidance = guidance
        self.cache = cache
        self._scales = guidance.scales(len(conditions.features)).to(conditions.reference.device)

    @torch.no_grad()
    def __call__(
        self,
        x: Tensor,
        windows: Sequence[Sequence[int]],
        sigma: Tensor,
        *,
        refresh: bool = True,
    ) -> Tensor:
        """Predicted clean latents of windows of equal length, in one call.

        Args:
            x: `(B, W, C, h, w)`, anywhere.
            windows: the numbers of their frames in the clip.
            sigma: a scalar.
            refresh: False takes deep features from the cache where it has them.

        Returns:
            `(B, W, C, h, w)` in float32 on the animator's device.
        """
        config, place = self.animator.config, self.conditions.reference.device
        guided = self.guidance.applies(float(sigma))

        def network(scaled: Tensor, timestep: Tensor) -> Tensor:
            return self._predict(scaled, timestep, windows, guided=guided, refresh=refresh)

        return edm.precondition(
            network, x.to(place), sigma.reshape(1).to(place), config.sigma_data, config.prediction
        )

    def _predict(
        self,
        scaled: Tensor,
        timestep: Tensor,
        windows: Sequence[Sequence[int]],
        *,
        guided: bool,
        refresh: bool,
    ) -> Tensor:
        def call(*given: bool) -> Tensor:
            with self._remembered(windows, given, refresh):
                return self._call(scaled, timestep, windows, given)

        if not guided:
            return call(True)
        if self.guidance.batched:
            conditional, unconditional = call(True, False).chunk(2)
        else:
            conditional, unconditional = call(True), call(False)
        scales = torch.stack([self._scales[list(frames)] for frames in windows])
        return unconditional + scales * (conditional - unconditional)

    def _remembered(
        self, windows: Sequence[Sequence[int]], given: tuple[bool, ...], refresh: bool
    ) -> contextlib.AbstractContextManager[object]:
        if self.cache is None:
            return contextlib.nullcontext()
        key = (tuple(tuple(frames) for frames in windows), given)
        return self.cache.call(key, refresh=refresh)

    def _call(
        self,
        scaled: Tensor,
        timestep: Tensor,
        windows: Sequence[Sequence[int]],
        given: tuple[bool, ...],
    ) -> Tensor:
        """The UNet's output for each entry of `given`: with all conditions, or with none (v1)."""
        told, (batch, num_frames) = self.conditions, scaled.shape[:2]
        still = told.reference[:, None].expand(batch, num_frames, -1, -1, -1)
        context = told.context.expand(batch, -1, -1)
        # With no condition at all, PoseNet's share is left out rather than added as zeros.
        pose = None
        if any(given):
            features = torch.cat([told.features[list(frames)] for frames in windows])
            pose = torch.cat([features if has else torch.zeros_like(features) for has in given])
        regions = None
        if told.regions is not None:
            regions = torch.cat([told.regions[list(frames)] for frames in windows])
            regions = regions.repeat(len(given), 1, 1)
        return self.animator.denoise(
            torch.cat(
                [
                    torch.cat([scaled, still if has else torch.zeros_like(still)], dim=2)
                    for has in given
                ]
            ),
            timestep.expand(len(given) * batch),
            torch.cat([context if has else torch.zeros_like(context) for has in given]),
            pose,
            told.time_ids.expand(len(given) * batch, -1),
            regions,
        ).float()
