"""Equations of the paper against plain NumPy, written from the text."""

import numpy as np
import torch

from animator import edm
from animator.id_adapter import align_distribution
from animator.losses import alignment_loss, denoising_loss
from inference.sampler import SamplerConfig, sample


def test_eq_12_mean_distance_over_visible_joints():
    rng = np.random.default_rng(0)
    aligned, target = rng.normal(size=(2, 3, 18, 2))
    visible = (rng.random((3, 18)) > 0.4).astype(np.float64)
    distance = np.sqrt(((aligned - target) ** 2).sum(-1))
    expected = (distance * visible).sum() / visible.sum()
    got = alignment_loss(*(torch.from_numpy(a) for a in (aligned, target, visible)))
    assert abs(got.item() - expected) < 1e-9


def test_eq_13_face_features_take_the_statistics_of_image_features():
    rng = np.random.default_rng(1)
    face = rng.normal(3, 5, size=(2, 12, 8)).astype(np.float32)
    image = rng.normal(-1, 0.5, size=(2, 12, 8)).astype(np.float32)
    expected = np.empty_like(face)
    for n in range(2):
        mean_f, std_f = face[n].mean(), face[n].std(ddof=1)
        mean_i, std_i = image[n].mean(), image[n].std(ddof=1)
        expected[n] = (face[n] - mean_f) / (std_f + 1e-5) * std_i + mean_i
    got = align_distribution(torch.from_numpy(face), torch.from_numpy(image))
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-5)


def test_eq_13_a_dropped_image_token_silences_the_face_without_nan():
    face = torch.randn(1, 4, 8, requires_grad=True)
    image = torch.zeros(1, 4, 8, requires_grad=True)
    out = align_distribution(face, image)
    out.sum().backward()
    assert out.abs().max() == 0
    assert torch.isfinite(face.grad).all()
    assert torch.isfinite(image.grad).all()


def test_eq_25_the_mask_weighs_the_residual_inside_the_norm():
    rng = np.random.default_rng(2)
    denoised, clean = rng.normal(size=(2, 2, 3, 4, 5, 6))
    mask = rng.random((2, 3, 1, 5, 6))
    weight = rng.random(2) + 0.5
    squared = ((denoised - clean) * (1 + mask)) ** 2
    expected = (squared.reshape(2, -1).mean(1) * weight).mean()
    got = denoising_loss(*(torch.from_numpy(a) for a in (denoised, clean, mask, weight)))
    assert abs(got.item() - expected) < 1e-6


def heun(denoise, x, sigmas, churn, noise):
    """Algorithm 1 without its inner optimisation, for S_min = 0, S_max = inf, S_noise = 1."""
    steps = len(sigmas) - 1
    for i in range(steps):
        t = sigmas[i]
        gamma = min(churn / steps, np.sqrt(2) - 1)
        t_hat = t * (1 + gamma)
        x_hat = x + np.sqrt(t_hat**2 - t**2) * noise[i]
        d = (x_hat - denoise(x_hat, t_hat)) / t_hat
        x = x_hat + (sigmas[i + 1] - t_hat) * d
        if sigmas[i + 1] > 0:
            d_next = (x - denoise(x, sigmas[i + 1])) / sigmas[i + 1]
            x = x_hat + (sigmas[i + 1] - t_hat) * (d + d_next) / 2
    return x


def test_algorithm_1_equals_plain_numpy():
    steps, churn, shape = 6, 1.2, (1, 2, 3, 4, 4)
    sigmas = edm.karras_sigmas(steps, 0.01, 20.0)
    drawn = torch.Generator().manual_seed(5)
    noise = [torch.randn(shape, generator=drawn).double().numpy() for _ in range(steps)]

    def denoise(x, sigma):
        return x / (1 + sigma**2) + 0.1 * sigma

    start = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double() * sigmas[0]
    config = SamplerConfig(solver="heun", steps=steps, sigma_min=0.01, sigma_max=20.0, churn=churn)
    got = sample(
        denoise, start, sigmas.double(), config, generator=torch.Generator().manual_seed(5)
    )
    expected = heun(denoise, start.numpy(), sigmas.double().numpy(), churn, noise)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-6)


def test_preconditioning_recovers_a_clean_sample_from_its_v():
    # v = (noise - x sigma) / sqrt(1 + sigma²) is what the network predicts for sigma_data 1.
    sigma = torch.tensor([0.01, 1.0, 30.0])
    clean, noise = torch.randn(2, 3, 5, dtype=torch.float64)
    s = sigma[:, None].double()
    v = (noise - clean * s) / (1 + s**2).sqrt()
    got = edm.precondition(lambda _x, _t: v, clean + noise * s, sigma.double())
    torch.testing.assert_close(got, clean)


def test_a_network_that_predicts_the_sample_is_used_as_it_is():
    sigma = torch.tensor([0.1, 5.0])
    clean = torch.randn(2, 5)
    got = edm.precondition(lambda _x, _t: clean, clean + 1, sigma, 1.0, "sample")
    assert torch.equal(got, clean)
    levels = edm.loss_weight(torch.tensor([1e-3, 1e3]), 1.0, "sample")
    torch.testing.assert_close(levels, torch.tensor([4.0, 1.0]), atol=1e-2, rtol=0)
