"""Samplers: EDM's stochastic Heun method (Algorithm 1 without its optimisation) and Euler.

Free functions that know no model: a denoiser of a clip goes in. The clip's latents wait on the
host or on disk (`inference.states`) and are worked through in portions of frames, so memory does
not grow with its length; no portion's size changes the result.
Shapes: T frames of a clip, t of a portion, W of a window, C latent channels, h w latent size;
sigma is a scalar tensor.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from animator import edm
from inference.noise import START
from inference.states import ClipStates, Frames

# From numbers of frames to their noisy latents `(t, C, h, w)`.
ReadFrames = Callable[[Sequence[int]], Tensor]
# D(x; sigma) of a clip at a step: window by window, which frames it has and their shares of the
# prediction `(W, C, h, w)`; a frame's shares over all windows add up to its prediction.
ClipDenoiser = Callable[[ReadFrames, Tensor, int], Iterable[tuple[Sequence[int], Tensor]]]
# The seam for face optimisation: predicted clean latents `(t, C, h, w)` of consecutive frames,
# their numbers in the clip `(t,)` and the step, to refined latents of the same shape.
Refiner = Callable[[Tensor, Tensor, int], Tensor]
# Standard normal noise `(t, C, h, w)` of frames at a step: `inference.noise.ClipNoise`.
Noise = Callable[[int, Sequence[int]], Tensor]
PORTION = 16  # frames


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """Noise levels and solver. The churn parameters are EDM's, off by default."""

    solver: Literal["heun", "euler"] = "euler"
    schedule: Literal["karras", "ays"] = "karras"
    steps: int = 25
    sigma_min: float = 0.002
    sigma_max: float = 700.0
    rho: float = 7.0
    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float | None = None  # no limit
    churn_noise: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 1000:
            raise ValueError(f"Got {self.steps} steps, but expected 1 to 1000.")
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"Got sigma_min {self.sigma_min} and sigma_max {self.sigma_max}, but expected "
                "0 < sigma_min < sigma_max."
            )
        if not math.isfinite(self.sigma_max) or not 1 <= self.rho <= 100:
            raise ValueError(
                f"Got sigma_max {self.sigma_max} and rho {self.rho}, but expected a finite noise "
                "level and rho from 1 to 100."
            )
        limits = (self.churn, self.churn_noise, self.churn_min)
        if not all(math.isfinite(value) and value >= 0 for value in limits):
            raise ValueError(
                f"Got churn {self.churn}, churn_noise {self.churn_noise} and churn_min "
                f"{self.churn_min}, but expected numbers of at least 0."
            )
        if self.churn_max is not None and not self.churn_max >= self.churn_min:
            raise ValueError(
                f"Got churn_min {self.churn_min} and churn_max {self.churn_max}, but expected "
                "churn_min <= churn_max."
            )

    def levels(self) -> Tensor:
        """Noise levels, falling and ending in 0, `(steps + 1,)`.

        `karras` are EDM's (eq. 5); `ays` those optimised for few steps, which have no `rho`.
        """
        if self.schedule == "ays":
            return edm.ays_sigmas(self.steps, self.sigma_min, self.sigma_max)
        return edm.karras_sigmas(self.steps, self.sigma_min, self.sigma_max, self.rho)


def raised_sigma(sigma: Tensor, config: SamplerConfig) -> Tensor:
    """The noise level a step starts from: sigma (1 + gamma) (Algorithm 1, lines 4-5).

    gamma = min(S_churn / N, sqrt(2) - 1) inside [S_min, S_max], else 0.
    """
    high = math.inf if config.churn_max is None else config.churn_max
    inside = config.churn_min <= float(sigma) <= high
    gamma = min(config.churn / config.steps, math.sqrt(2) - 1) if inside else 0.0
    return sigma * (1 + gamma)


def sample(
    denoise: ClipDenoiser,
    states: ClipStates,
    sigmas: Tensor,
    config: SamplerConfig,
    noise: Noise,
    *,
    portion: int = PORTION,
    device: torch.device | str = "cpu",
    refine: Refiner | None = None,
    on_step: Callable[[int], None] | None = None,
    on_work: Callable[[int], None] | None = None,
) -> None:
    """Integrate the reverse process over falling noise levels (Algorithm 1).

    Where the states have steps done already, the rest is done, with the same result.

    Args:
        denoise: the predicted clean latents.
        states: what is sampled; their `current` latents are the clean ones at the end.
        sigmas: `(steps + 1,)`, ending in 0.
        noise: the clip's first latents, and those of churning.
        portion: frames refined and updated at a time; changes memory alone where nothing is
            refined. Face optimisation takes the statistics of a clip from the portion it is given.
        device: where portions are refined and updated.
        refine: applied to the prediction of each step before it is used.
        on_step: called with the number of the step that has been finished; may raise to stop.
        on_work: called with the number of the step after each window and portion; may raise too.
    """
    if not states.step:
        for frames in _portions(len(states), portion):
            states.current.write(frames, noise(START, frames) * sigmas[0].cpu())
    predicted, corrected = states.room("predicted"), states.room("corrected")
    working = on_work or _ignore
    for step in range(states.step, len(sigmas) - 1):
        # Sums of shares are made in the order of windows, whoever computed them.
        sigma, target = raised_sigma(sigmas[step], config).cpu(), sigmas[step + 1].cpu()
        growth = (sigma**2 - sigmas[step].cpu() ** 2).sqrt() * config.churn_noise
        current, coming = states.current, states.coming

        def noisy(
            frames: Sequence[int],
            current: Frames = current,
            growth: Tensor = growth,
            step: int = step,
        ) -> Tensor:
            """Latents with the noise of churning added (Algorithm 1, line 6)."""
            x = current.read(frames)
            return x + growth * noise(step, frames) if growth > 0 else x

        _gather(predicted, denoise(noisy, sigma, step), lambda step=step: working(step))
        for frames in _portions(len(states), portion):
            x = noisy(frames).to(device)
            clean = predicted.read(frames).to(device)
            if refine is not None:
                clean = refine(clean, torch.tensor(frames, device=device), step)
                predicted.write(frames, clean)
            slope = (x - clean) / sigma.to(device)
            coming.write(frames, x + (target - sigma).to(device) * slope)
            working(step)
        if config.solver == "heun" and target > 0:
            _gather(corrected, denoise(coming.read, target, step), lambda step=step: working(step))
            for frames in _portions(len(states), portion):
                x, ahead = noisy(frames), coming.read(frames)
                slope = (x - predicted.read(frames)) / sigma
                correction = (ahead - corrected.read(frames)) / target
                coming.write(frames, x + (target - sigma) * (slope + correction) / 2)
        states.commit(last=step == len(sigmas) - 2)
        if on_step is not None:
            on_step(step)


def _portions(num_frames: int, portion: int) -> list[range]:
    return [
        range(start, min(start + portion, num_frames)) for start in range(0, num_frames, portion)
    ]


def _gather(
    total: Frames, shares: Iterable[tuple[Sequence[int], Tensor]], working: Callable[[], None]
) -> None:
    total.clear()
    for frames, share in shares:
        total.write(frames, total.read(frames) + share.cpu())
        working()


def _ignore(step: int) -> None:
    pass
