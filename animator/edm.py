"""Diffusion mathematics: preconditioning, noise schedules, the training distribution of sigma.

Shapes: B batch; latents are `(B, T, C, h, w)`. sigma is in units of the latents.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from diffusers.schedulers import AysSchedules
from torch import Tensor

from animator.config import Prediction

SigmaLaw = Literal["lognormal", "cosine"]

# Range of noise levels in training and sampling of v1 and of Stable Video Diffusion.
SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 700.0, 7.0


def _broadcast(sigma: Tensor, like: Tensor) -> Tensor:
    return sigma.reshape(-1, *[1] * (like.ndim - 1))


def c_skip(sigma: Tensor, sigma_data: float = 1.0) -> Tensor:
    """Share of the noisy sample in the prediction (EDM, table 1)."""
    return sigma_data**2 / (sigma**2 + sigma_data**2)


def c_out(sigma: Tensor, sigma_data: float = 1.0) -> Tensor:
    """Share of the network in the prediction; negative: the network predicts v."""
    return -sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()


def c_in(sigma: Tensor, sigma_data: float = 1.0) -> Tensor:
    """Scale of the network's input (EDM, table 1)."""
    return 1.0 / (sigma**2 + sigma_data**2).sqrt()


def c_noise(sigma: Tensor) -> Tensor:
    """Timestep of the network: a quarter of ln sigma."""
    return 0.25 * sigma.log()


def loss_weight(sigma: Tensor, sigma_data: float = 1.0, prediction: Prediction = "v") -> Tensor:
    """Weight of a noise level in the loss on the denoised sample.

    For v it is 1 / c_out²: every level counts the same on the network's output. A network that
    predicts the sample cannot follow that to low noise, where 1 / sigma² has no bound; it gets
    the same weight levelled off at half the data's spread.
    """
    floor = 0.0 if prediction == "v" else 0.25
    ratio = (sigma / sigma_data) ** 2
    return (ratio + 1) / (ratio + floor) / sigma_data**2


def precondition(
    network: Callable[[Tensor, Tensor], Tensor],
    noisy: Tensor,
    sigma: Tensor,
    sigma_data: float = 1.0,
    prediction: Prediction = "v",
) -> Tensor:
    """Denoised sample D(x; sigma) = c_skip·x + c_out·F(c_in·x; c_noise) (EDM, eq. 7).

    With `prediction="sample"` the network's output is the denoised sample itself. Noise fills
    every channel of a latent, pictures do not: a network narrower than a few times its latent
    cannot carry the noise that v asks for and leaves some of it in the picture (Li and He, 2025,
    "Back to Basics: Let Denoising Generative Models Denoise").

    Args:
        network: F, of the scaled sample and the timestep `(B,)`.
        noisy: x, `(B, ...)`.
        sigma: `(B,)`.
    """
    output = network(_broadcast(c_in(sigma, sigma_data), noisy) * noisy, c_noise(sigma))
    if prediction == "sample":
        return output
    skip, out = (_broadcast(c(sigma, sigma_data), noisy) for c in (c_skip, c_out))
    return skip * noisy + out * output


def training_sigma(generator: torch.Generator, mean: float, spread: float) -> Tensor:
    """One noise level, `(1,)`: ln sigma ~ N(mean, spread²) (EDM, section 5)."""
    return (torch.randn(1, generator=generator) * spread + mean).exp()


def cosine_sigma(generator: torch.Generator) -> Tensor:
    """One noise level, `(1,)`, of v1's cosine-interpolated schedule at a random time."""
    return _cosine_schedule(torch.rand(1, generator=generator))


def _cosine_schedule(
    time: Tensor,
    image_size: int = 64,
    noise_low: int = 32,
    noise_high: int = 64,
    sigma_data: float = 0.5,
    sigma_min: float = SIGMA_MIN,
    sigma_max: float = SIGMA_MAX,
) -> Tensor:
    """sigma at times from 0 (sigma_min) to 1 (sigma_max): ln SNR = -2 ln tan(a + time·(b - a)).

    a and b give the ends of the range. The curve is shifted by 2 ln(noise size / image size), as
    for noise of `noise_low` pixels at time 0 and of `noise_high` pixels at time 1, linear in
    between (Hoogeboom et al., 2023, "simple diffusion", section 3.1, the interpolated schedule).
    """
    ends = (-2 * math.log(sigma_max / sigma_data), -2 * math.log(sigma_min / sigma_data))

    def shifted(noise_size: int) -> Tensor:
        shift = 2 * math.log(noise_size / image_size)
        a, b = (math.atan(math.exp(-0.5 * (end - shift))) for end in reversed(ends))
        return -2 * (a + time * (b - a)).tan().log() + shift

    log_snr = torch.lerp(shifted(noise_low), shifted(noise_high), time)
    return (-0.5 * log_snr).exp() * sigma_data


def sigma_quartiles(law: SigmaLaw, mean: float, spread: float) -> Tensor:
    """The three noise levels that part the draws of training into four equal shares, `(3,)`.

    Args:
        law: `lognormal` for `training_sigma`, `cosine` for `cosine_sigma`.
        mean, spread: of ln sigma; the cosine schedule has neither.
    """
    shares = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    if law == "cosine":
        return _cosine_schedule(shares).float()
    return (torch.special.ndtri(shares) * spread + mean).exp().float()


def karras_sigmas(
    num_steps: int,
    sigma_min: float = SIGMA_MIN,
    sigma_max: float = SIGMA_MAX,
    rho: float = RHO,
) -> Tensor:
    """Noise levels of a sampler, falling, with 0 appended; `(num_steps + 1,)` (EDM, eq. 5).

    Raises:
        ValueError: for fewer than one step, or a range that does not fall.
    """
    _check_levels(num_steps, sigma_min, sigma_max)
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas = (high + ramp * (low - high)) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()


def ays_sigmas(
    num_steps: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX
) -> Tensor:
    """Noise levels optimised for few steps of Stable Video Diffusion, as `karras_sigmas` otherwise.

    Sabour et al., 2024, "Align Your Steps": ten steps found by optimisation (as diffusers keeps
    them), log-linear between them for other numbers. For another range than the published 0.002 to
    700 the levels keep their shares of it, in logarithms.

    Raises:
        ValueError: for fewer than one step, or a range that does not fall.
    """
    _check_levels(num_steps, sigma_min, sigma_max)
    *published, _ = AysSchedules["StableDiffusionVideoSigmas"]  # its last is the 0 appended
    levels = torch.tensor(published, dtype=torch.float64)
    shares = (levels / SIGMA_MIN).log() / math.log(SIGMA_MAX / SIGMA_MIN)  # from 1 to 0.2
    places = torch.linspace(0, len(shares) - 1, num_steps, dtype=torch.float64)
    before = places.long().clamp(max=len(shares) - 2)
    between = torch.lerp(shares[before], shares[before + 1], places - before)
    sigmas = sigma_min * (sigma_max / sigma_min) ** between
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()


def _check_levels(num_steps: int, sigma_min: float, sigma_max: float) -> None:
    if num_steps < 1:
        raise ValueError(f"Got {num_steps} steps, but expected at least 1.")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(
            f"Got sigma from {sigma_min} to {sigma_max}, but expected 0 < sigma_min < sigma_max."
        )
