"""Samplers: EDM's stochastic Heun method (Algorithm 1 without its optimisation) and Euler.

Free functions that know no files and no model: a denoiser `D(x, sigma)` goes in.
Shapes: latents `(B, T, C, h, w)`; sigma is a scalar tensor.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]
# (predicted clean latents, step) -> refined latents: the seam for face optimisation.
Refiner = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """Noise levels and solver. The churn parameters are EDM's, off by default."""

    solver: Literal["heun", "euler"] = "euler"
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


def churned(
    x: Tensor, sigma: Tensor, config: SamplerConfig, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Raise the noise level by gamma before a step (Algorithm 1, lines 4-6).

    gamma = min(S_churn / N, sqrt(2) - 1) inside [S_min, S_max]; x grows by
    sqrt(t_hat^2 - t^2) times noise of deviation S_noise.
    """
    high = math.inf if config.churn_max is None else config.churn_max
    inside = config.churn_min <= float(sigma) <= high
    gamma = min(config.churn / config.steps, math.sqrt(2) - 1) if inside else 0.0
    if gamma == 0:
        return x, sigma
    raised = sigma * (1 + gamma)
    noise = torch.randn(x.shape, generator=generator).to(x) * config.churn_noise
    return x + (raised**2 - sigma**2).sqrt() * noise, raised


def sample(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    config: SamplerConfig,
    *,
    generator: torch.Generator | None = None,
    refine: Refiner | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Integrate the reverse process over falling noise levels (Algorithm 1).

    Args:
        denoise: D(x; sigma), the predicted clean latents.
        x: noise times `sigmas[0]`.
        sigmas: `(steps + 1,)`, ending in 0.
        refine: applied to the prediction of each step before it is used.
        on_step: called with the number of the step that has been finished; may raise to stop.

    Returns:
        clean latents, the shape of `x`.
    """
    for i in range(len(sigmas) - 1):
        x_hat, sigma = churned(x, sigmas[i], config, generator)
        target = sigmas[i + 1]
        predicted = denoise(x_hat, sigma)
        if refine is not None:
            predicted = refine(predicted, i)
        slope = (x_hat - predicted) / sigma
        x = x_hat + (target - sigma) * slope
        if config.solver == "heun" and target > 0:
            corrected = (x - denoise(x, target)) / target
            x = x_hat + (target - sigma) * (slope + corrected) / 2
        if on_step is not None:
            on_step(i)
    return x
