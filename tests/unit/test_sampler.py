"""Noise schedules, samplers and windows."""

import dataclasses

import pytest
import torch

from animator import edm
from inference.noise import ClipNoise
from inference.sampler import SamplerConfig, sample
from inference.states import ClipStates
from inference.windows import WindowConfig, plan_windows, weights_of, windows_of


def gaussian_denoiser(frames):
    """Exact for data of N(0, 1): what a perfect model would answer, two frames at a time."""

    def denoise(read, sigma, step):
        for start in range(0, frames, 2):
            window = range(start, min(start + 2, frames))
            yield window, read(window) / (1 + sigma**2)

    return denoise


def sampled(config, shape, *, seed=0, sigmas=None, **options):
    states = ClipStates(shape)
    if sigmas is None:
        sigmas = edm.karras_sigmas(config.steps, config.sigma_min, config.sigma_max)
    noise = ClipNoise(seed, shape[1:])
    sample(gaussian_denoiser(shape[0]), states, sigmas, config, noise, **options)
    return states.current.read(range(shape[0]))


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_samples_have_the_spread_of_the_data(solver):
    config = SamplerConfig(solver=solver, steps=40, sigma_min=0.01, sigma_max=50)
    out = sampled(config, (1, 1, 100, 100))
    assert abs(float(out.std()) - 1) < (0.01 if solver == "heun" else 0.1)


def test_published_noise_levels():
    sigmas = edm.karras_sigmas(25)
    assert sigmas[-1] == 0
    expected = [700, 545.7, 421.6, 322.5]
    assert sigmas[:4].tolist() == pytest.approx(expected, rel=1e-3)


def test_refinement_and_progress_are_called_at_each_step():
    config = SamplerConfig(steps=5, sigma_min=0.1, sigma_max=10)
    refined, done = [], []

    def refine(predicted, frames, step):
        refined.append((step, frames.tolist()))
        return predicted * 0 + 3.0 + frames.reshape(-1, 1, 1, 1)

    out = sampled(config, (3, 1, 2, 2), portion=2, refine=refine, on_step=done.append)
    assert done == [0, 1, 2, 3, 4]
    assert refined == [(step, part) for step in done for part in ([0, 1], [2])]
    goal = torch.tensor([3.0, 4.0, 5.0]).reshape(3, 1, 1, 1).expand(3, 1, 2, 2)
    torch.testing.assert_close(out, goal, atol=1e-4, rtol=0)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_size_of_portions_changes_no_bit(solver):
    config = SamplerConfig(solver=solver, steps=6, sigma_min=0.1, sigma_max=10, churn=4)

    def refine(predicted, frames, step):
        return predicted + 0.01 * frames.reshape(-1, 1, 1, 1) * step

    whole = sampled(config, (7, 2, 3, 3), portion=100, refine=refine)
    assert torch.equal(whole, sampled(config, (7, 2, 3, 3), portion=1, refine=refine))
    assert torch.equal(whole, sampled(config, (7, 2, 3, 3), portion=3, refine=refine))
    assert not torch.equal(whole, sampled(config, (7, 2, 3, 3), seed=1, refine=refine))


def test_noise_of_a_frame_does_not_depend_on_what_is_drawn_with_it():
    noise = ClipNoise(7, (2, 40, 40))
    together = noise(3, range(5))
    assert torch.equal(noise(3, [4, 1]), together[[4, 1]])
    other = [noise(2, [4]), noise(3, [5]), ClipNoise(8, (2, 40, 40))(3, [4])]
    for drawn in other:
        correlation = torch.corrcoef(torch.stack([drawn.flatten(), together[4].flatten()]))[0, 1]
        assert abs(float(correlation)) < 0.1
    assert abs(float(together.std()) - 1) < 0.05


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
        tuple(range(16)),
        (0, *range(13, 28)),
        (0, *range(25, 40)),
    ]


@pytest.mark.parametrize("anchor_first", [False, True])
@pytest.mark.parametrize("blend", ["triangular", "cosine", "flat"])
@pytest.mark.parametrize("shift", ["none", "half", "golden"])
def test_shares_of_a_frame_add_up_to_one_in_every_step(shift, blend, anchor_first):
    config = WindowConfig(overlap=3, anchor_first=anchor_first, shift=shift, blend=blend)
    for step in range(7):
        total = torch.zeros(45)
        for frames, shares in plan_windows(45, 8, config, step):
            assert len(set(frames)) == 8
            assert shares.min() > 0
            total[list(frames)] += shares
        torch.testing.assert_close(total, torch.ones(45))
    assert weights_of(blend, 8).min() > 0


def test_shifted_windows_meet_in_other_frames_from_step_to_step():
    config = WindowConfig(overlap=4, shift="golden")
    starts = [{span[0] for span in windows_of(100, 16, config, step)} for step in range(8)]
    inner = [tuple(sorted(s - {0, 84})) for s in starts]
    assert len(set(inner)) == 8
    assert all(0 in s and 84 in s for s in starts)
    still = dataclasses.replace(config, shift="none")
    assert windows_of(100, 16, still, 5) == windows_of(100, 16, still)


@pytest.mark.parametrize("shift", ["half", "golden"])
def test_shifting_costs_one_window_of_a_long_clip_and_none_of_a_short_one(shift):
    for frames in range(9, 80):
        config = WindowConfig(overlap=2, shift=shift)
        least = len(windows_of(frames, 8, dataclasses.replace(config, shift="none")))
        for step in range(8):
            most = least + (frames - 8 >= 4 * 6)
            assert least <= len(windows_of(frames, 8, config, step)) <= most


def test_short_clips_are_one_window():
    (window,) = plan_windows(5, 8, WindowConfig(shift="half"), step=1)
    assert window.frames == (0, 1, 2, 3, 4)
    assert window.shares.tolist() == [1] * 5


def test_overlaps_that_leave_frames_out_are_refused():
    with pytest.raises(ValueError, match="smaller than the window"):
        windows_of(20, 8, WindowConfig(overlap=8))
    with pytest.raises(ValueError, match="at least 1"):
        windows_of(20, 8, WindowConfig(overlap=0, anchor_first=True))
    with pytest.raises(ValueError, match="0 or more"):
        WindowConfig(overlap=-1)
    with pytest.raises(ValueError, match="at least 1"):
        WindowConfig(batch=0)
