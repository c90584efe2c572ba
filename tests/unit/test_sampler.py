"""Noise schedules, samplers and windows."""

import dataclasses

import pytest
import torch

from animator import edm
from inference.sampler import SamplerConfig, sample
from inference.windows import WindowConfig, blend_windows, triangular_weights, windows_of


def gaussian_denoiser(x, sigma):
    """Exact for data of N(0, 1): what a perfect model would answer."""
    return x / (1 + sigma**2)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_samples_have_the_spread_of_the_data(solver):
    config = SamplerConfig(solver=solver, steps=40, sigma_min=0.01, sigma_max=50)
    sigmas = edm.karras_sigmas(40, 0.01, 50)
    noise = torch.randn(1, 1, 1, 100, 100, generator=torch.Generator().manual_seed(0))
    out = sample(gaussian_denoiser, noise * sigmas[0], sigmas, config)
    assert abs(float(out.std()) - 1) < (0.01 if solver == "heun" else 0.1)


def test_published_noise_levels():
    sigmas = edm.karras_sigmas(25)
    assert sigmas[-1] == 0
    expected = [700, 545.7, 421.6, 322.5]
    assert sigmas[:4].tolist() == pytest.approx(expected, rel=1e-3)


def test_refinement_and_progress_are_called_at_each_step():
    config = SamplerConfig(steps=5, sigma_min=0.1, sigma_max=10)
    sigmas = edm.karras_sigmas(5, 0.1, 10)
    refined, done = [], []
    goal = torch.full((1, 1, 1, 2, 2), 3.0)

    def refine(predicted, step):
        refined.append(step)
        return goal

    x = torch.randn(1, 1, 1, 2, 2) * 10
    out = sample(gaussian_denoiser, x, sigmas, config, refine=refine, on_step=done.append)
    assert refined == done == [0, 1, 2, 3, 4]
    torch.testing.assert_close(out, goal, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("sigma_min", -1.0),
        ("sigma_max", 0.001),
        ("sigma_max", float("inf")),
        ("rho", 0.0),
        ("churn", -50.0),
        ("churn_noise", float("nan")),
        ("churn_max", -1.0),
    ],
)
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match="expected"):
        dataclasses.replace(SamplerConfig(), **{field: value})


@pytest.mark.parametrize("anchor_first", [False, True])
@pytest.mark.parametrize(("frames", "window", "overlap"), [(70, 8, 2), (17, 16, 4), (9, 8, 1)])
def test_windows_cover_every_frame(frames, window, overlap, anchor_first):
    config = WindowConfig(overlap=overlap, anchor_first=anchor_first)
    spans = windows_of(frames, window, config)
    assert {f for span in spans for f in span} == set(range(frames))
    assert all(len(span) == len(set(span)) == window for span in spans)
    assert spans[-1][-1] == frames - 1
    if anchor_first:
        assert all(span[0] == 0 for span in spans)


def test_windows_of_published_weights_begin_with_the_first_frame():
    spans = windows_of(40, 16, WindowConfig(overlap=4, anchor_first=True))
    assert spans == [
        list(range(16)),
        [0, *range(13, 28)],
        [0, *range(25, 40)],
    ]


@pytest.mark.parametrize("anchor_first", [False, True])
def test_blending_equal_predictions_changes_nothing(anchor_first):
    x = torch.randn(1, 21, 2, 3, 3)
    config = WindowConfig(overlap=2, anchor_first=anchor_first)
    seen = []

    def predict(part, frames):
        assert torch.equal(part, x[:, frames])
        seen.append(frames.tolist())
        return part * 2

    torch.testing.assert_close(blend_windows(predict, x, 8, config), x * 2)
    assert seen == windows_of(21, 8, config)
    assert triangular_weights(8).min() > 0


def test_short_clips_take_one_call():
    calls = []
    blend_windows(
        lambda part, frames: calls.append(frames.tolist()) or part,
        torch.zeros(1, 5, 1, 1, 1),
        8,
        WindowConfig(),
    )
    assert calls == [[0, 1, 2, 3, 4]]


def test_overlaps_that_leave_frames_out_are_refused():
    with pytest.raises(ValueError, match="smaller than the window"):
        windows_of(20, 8, WindowConfig(overlap=8))
    with pytest.raises(ValueError, match="at least 1"):
        windows_of(20, 8, WindowConfig(overlap=0, anchor_first=True))
    with pytest.raises(ValueError, match="0 or more"):
        WindowConfig(overlap=-1)
