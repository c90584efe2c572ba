"""Classifier-free guidance: strengths over frames and noise levels, one call or two, windows."""

import dataclasses
import math

import pytest
import torch

from animator import edm
from inference.guidance import Conditions, GuidanceConfig, GuidedDenoiser
from inference.parallel import WindowedDenoiser
from inference.windows import WindowConfig, plan_windows
from tests.unit.test_model import SMALL, inputs, small_animator

FRAMES, CELLS = 3, 4
SIGMA = torch.tensor(2.0)
STRONG = GuidanceConfig.constant(3.0)


@pytest.fixture(scope="module")
def model():
    # In double precision: random weights amplify the rounding of fp32 a thousandfold, and a
    # batch of two is rounded in another order than two calls.
    return small_animator().double()


@pytest.fixture(scope="module")
@torch.no_grad()
def conditions(model):
    _, _, token, embedding, poses, ids = inputs(SMALL, batch=1, frames=2 * FRAMES)
    poses = poses.double()
    generator = torch.Generator().manual_seed(4)
    reference = torch.randn(1, SMALL.latent_channels, CELLS, CELLS, generator=generator)
    return Conditions(model.context(token, embedding), model.pose_net(poses), reference, ids)


def noisy(frames: int = FRAMES) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    return 2 * torch.randn(1, frames, SMALL.latent_channels, CELLS, CELLS, generator=generator)


@torch.no_grad()
def denoise(model, conditions, guidance, sigma=SIGMA):
    """One window."""
    used = dataclasses.replace(conditions, features=conditions.features[:FRAMES])
    return GuidedDenoiser(model, used, guidance)(noisy(), [range(FRAMES)], sigma)


def blended(denoisers, frames, batch=1, overlap=1):
    """A clip of several windows, `(T, C, h, w)`."""
    x, config = noisy(frames)[0], WindowConfig(overlap=overlap)
    windowed = WindowedDenoiser(
        denoisers, lambda step: plan_windows(frames, FRAMES, config, step), batch
    )
    total = torch.zeros_like(x)
    for window, share in windowed(lambda wanted: x[list(wanted)], SIGMA, 0):
        total[list(window)] += share
    return total


@torch.no_grad()
def by_hand(model, conditions, scale):
    """The public forward's two calls, mixed as the formula says."""
    x = noisy()
    still = conditions.reference[:, None].expand(-1, FRAMES, -1, -1, -1)
    scaled = edm.c_in(SIGMA, SMALL.sigma_data) * x
    time, ids = edm.c_noise(SIGMA).reshape(1), conditions.time_ids
    features = conditions.features[:FRAMES]
    with_all = model.denoise(torch.cat([scaled, still], 2), time, conditions.context, features, ids)
    token = torch.zeros(1, 1, SMALL.cross_attention_dim)
    with_all = with_all.float()
    without = model(torch.cat([scaled, torch.zeros_like(still)], 2), time, token, None, None, ids)
    without = without.float()
    return without + scale * (with_all - without)


@pytest.mark.parametrize("batched", [True, False])
def test_guidance_mixes_the_conditional_and_the_unconditional_call(model, conditions, batched):
    guidance = dataclasses.replace(STRONG, batched=batched)
    got = denoise(model, conditions, guidance)
    torch.testing.assert_close(got, by_hand(model, conditions, 3.0), atol=1e-5, rtol=1e-4)


def test_strength_rises_from_the_first_frame_to_the_last(model, conditions):
    rising = denoise(model, conditions, GuidanceConfig(min=1.0, max=3.0))
    for frame, scale in enumerate((1.0, 2.0, 3.0)):
        expected = by_hand(model, conditions, scale)[:, frame]
        torch.testing.assert_close(rising[:, frame], expected, atol=1e-5, rtol=1e-4)


def test_outside_of_the_interval_one_call_does(model, conditions):
    calls = []
    handle = model.unet.register_forward_hook(lambda *_: calls.append(1))
    guidance = dataclasses.replace(STRONG, sigma_min=0.5, sigma_max=1.5, batched=False)
    try:
        outside = denoise(model, conditions, guidance)
        assert len(calls) == 1
        denoise(model, conditions, guidance, sigma=torch.tensor(1.0))
        assert len(calls) == 3
    finally:
        handle.remove()
    plain = denoise(model, conditions, GuidanceConfig())
    torch.testing.assert_close(outside, plain)


def test_windows_see_their_own_poses_and_strengths(model, conditions):
    used = dataclasses.replace(conditions, features=conditions.features[:5])
    whole = blended([GuidedDenoiser(model, used, GuidanceConfig(min=1.0, max=3.0))], 5)
    # The last window covers frames 2-4 alone at its end: its own call gives the same there.
    used = dataclasses.replace(conditions, features=conditions.features[2:5])
    last = GuidanceConfig(min=2.0, max=3.0)
    alone = GuidedDenoiser(model, used, last)(noisy(5)[:, 2:5], [range(3)], SIGMA)[0]
    torch.testing.assert_close(whole[3:], alone[1:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("batched", [True, False])
def test_windows_in_one_call_are_what_they_are_alone(model, conditions, batched):
    guidance = GuidanceConfig(min=1.0, max=3.0, batched=batched)
    denoiser = GuidedDenoiser(model, conditions, guidance)
    calls = []
    handle = model.unet.register_forward_hook(lambda *_: calls.append(1))
    try:
        alone = blended([denoiser], 6)
        single = len(calls)
        together = blended([denoiser], 6, batch=2)
        assert len(calls) - single < single
    finally:
        handle.remove()
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "wrong", [{"min": -1.0}, {"max": math.nan}, {"sigma_min": 3.0, "sigma_max": 2.0}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        GuidanceConfig(**wrong)
