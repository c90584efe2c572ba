"""Equations of the paper against plain NumPy, written from the text."""

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention

from animator import edm
from animator.id_adapter import MERGES, IDAdapter, ImageTokenAttention, align_and_add
from animator.losses import (
    alignment_loss,
    denoising_loss,
    denoising_loss_of_clips,
    face_loss_of_clips,
    means_by_quartile,
)
from inference.noise import START, ClipNoise
from inference.sampler import SamplerConfig, sample
from inference.states import ClipStates


def test_eq_12_mean_distance_over_visible_joints():
    rng = np.random.default_rng(0)
    aligned, target = rng.normal(size=(2, 3, 18, 2))
    visible = (rng.random((3, 18)) > 0.4).astype(np.float64)
    distance = np.sqrt(((aligned - target) ** 2).sum(-1))
    expected = (distance * visible).sum() / visible.sum()
    got = alignment_loss(*(torch.from_numpy(a) for a in (aligned, target, visible)))
    assert abs(got.item() - expected) < 1e-9


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attention(z, context, weights, heads):
    """softmax(q k' / sqrt(d)) v, head by head."""
    q, k, v = z @ weights["q"].T, context @ weights["k"].T, context @ weights["v"].T
    width = q.shape[-1] // heads
    parts = []
    for h in range(heads):
        of = slice(h * width, (h + 1) * width)
        weight = softmax(q[..., of] @ k[..., of].swapaxes(-1, -2) / np.sqrt(width))
        parts.append(weight @ v[..., of])
    return np.concatenate(parts, -1)


def test_eq_13_and_14_the_id_adapter():
    rng = np.random.default_rng(1)
    frames, positions, channels, width, heads = 2, 12, 8, 6, 2
    z = rng.normal(size=(frames, positions, channels))
    image_token = rng.normal(size=(frames, 1, width))
    face_tokens = rng.normal(size=(frames, 4, width))
    block = Attention(channels, cross_attention_dim=width, heads=heads, dim_head=channels // heads)
    adapter = IDAdapter(width, channels)
    block, adapter = block.double(), adapter.double()

    def array(layer):
        return layer.weight.detach().numpy()

    own = {"q": array(block.to_q), "k": array(block.to_k), "v": array(block.to_v)}
    new = {"q": own["q"], "k": array(adapter.id_to_k), "v": array(adapter.id_to_v)}
    # Eq. 13: one query, two branches.
    z_img = attention(z, image_token, own, heads)
    z_face = attention(z, face_tokens, new, heads)
    # Eq. 14: the face branch takes the image branch's statistics, one of each a frame.
    expected = np.empty_like(z_img)
    for n in range(frames):
        mean_f, std_f = z_face[n].mean(), z_face[n].std(ddof=1)
        mean_i, std_i = z_img[n].mean(), z_img[n].std(ddof=1)
        expected[n] = (z_face[n] - mean_f) / (std_f + 1e-5) * std_i + mean_i + z_img[n]
    expected = expected @ array(block.to_out[0]).T + block.to_out[0].bias.detach().numpy()
    context = torch.from_numpy(np.concatenate([image_token, face_tokens], 1))
    got = adapter(block, torch.from_numpy(z), context)
    np.testing.assert_allclose(got.detach().numpy(), expected, atol=1e-5)


def test_eq_13_one_image_token_is_a_broadcast_of_its_value():
    rng = np.random.default_rng(2)
    block = Attention(8, cross_attention_dim=6, heads=2, dim_head=4).double()
    z = torch.from_numpy(rng.normal(size=(3, 5, 8)))
    context = torch.from_numpy(rng.normal(size=(3, 5, 6)))
    got = ImageTokenAttention()(block, z, context)
    torch.testing.assert_close(got, block(z, context[:, :1]))


def test_eq_14_face_features_take_the_statistics_of_image_features():
    rng = np.random.default_rng(1)
    face = rng.normal(3, 5, size=(2, 12, 8)).astype(np.float32)
    image = rng.normal(-1, 0.5, size=(2, 12, 8)).astype(np.float32)
    got = align_and_add(torch.from_numpy(face), torch.from_numpy(image)).numpy() - image
    for n in range(2):
        np.testing.assert_allclose(got[n].mean(), image[n].mean(), atol=1e-5)
        np.testing.assert_allclose(got[n].std(), image[n].std(), rtol=1e-4)
        np.testing.assert_allclose(np.corrcoef(got[n].ravel(), face[n].ravel())[0, 1], 1, atol=1e-5)


def test_eq_14_a_dropped_image_token_silences_the_face_without_nan():
    face = torch.randn(1, 4, 8, requires_grad=True)
    image = torch.zeros(1, 4, 8, requires_grad=True)
    out = align_and_add(face, image)
    out.sum().backward()
    assert out.abs().max() == 0
    assert torch.isfinite(face.grad).all()
    assert torch.isfinite(image.grad).all()


def test_table_5_what_distribution_alignment_is_compared_with():
    rng = np.random.default_rng(3)
    face = rng.normal(3, 5, size=(2, 12, 8))
    image = rng.normal(-1, 0.5, size=(2, 1, 8))
    mean = face.mean((1, 2), keepdims=True)
    deviation = face.std((1, 2), keepdims=True, ddof=1)
    expected = {
        "addition": image + face,
        "norm": image + (face - mean) / (deviation + 1e-5),
    }
    for merge, value in expected.items():
        got = MERGES[merge](torch.from_numpy(face), torch.from_numpy(image)).numpy()
        np.testing.assert_allclose(got, value, atol=1e-5)
        block = Attention(8, cross_attention_dim=6, heads=2, dim_head=4)
        ways = [IDAdapter(6, 8, merge=kind) for kind in (merge, "distribution")]
        ways[1].load_state_dict(ways[0].state_dict())  # the same weights under either
        z, context = torch.randn(3, 5, 8), torch.randn(3, 5, 6)
        first, second = (adapter(block, z, context) for adapter in ways)
        assert (first - second).abs().max() > 1e-3


def test_eq_25_the_mask_weighs_the_residual_inside_the_norm():
    rng = np.random.default_rng(2)
    denoised, clean = rng.normal(size=(2, 2, 3, 4, 5, 6))
    mask = rng.random((2, 3, 1, 5, 6))
    weight = rng.random(2) + 0.5
    squared = ((denoised - clean) * (1 + mask)) ** 2
    expected = (squared.reshape(2, -1).mean(1) * weight).mean()
    got = denoising_loss(*(torch.from_numpy(a) for a in (denoised, clean, mask, weight)))
    assert abs(got.item() - expected) < 1e-6


def test_eq_25_by_clip_in_the_face_and_by_noise_level():
    rng = np.random.default_rng(3)
    denoised, clean = rng.normal(size=(2, 4, 3, 4, 5, 6))
    mask = (rng.random((4, 3, 1, 5, 6)) > 0.7) * 0.6
    mask[2] = 0  # a clip without a face
    weight = rng.random(4) + 0.5
    given = [torch.from_numpy(a) for a in (denoised, clean, mask, weight)]
    clips = denoising_loss_of_clips(*given)
    assert torch.equal(clips.mean(), denoising_loss(*given))
    inside = np.broadcast_to(mask > 0, denoised.shape)
    expected = [
        np.mean((denoised[n] - clean[n])[inside[n]] ** 2) * weight[n] if n != 2 else np.nan
        for n in range(4)
    ]
    np.testing.assert_allclose(face_loss_of_clips(*given).numpy(), expected, rtol=1e-5)
    edges, sigma = torch.tensor([0.5, 1.0, 8.0]), torch.tensor([0.1, 9.0, 2.0, 0.4])
    got = means_by_quartile(clips, sigma, edges)
    torch.testing.assert_close(got[[0, 2, 3]], torch.stack([clips[[0, 3]].mean(), *clips[[2, 1]]]))
    assert got[1].isnan()


def test_cosine_interpolated_noise_levels():
    # Cosine schedules of log SNR for noise of 32 and of 64 pixels, weighed by the time.
    def cosine(t, noise):
        shift = 2 * np.log(noise / 64)
        low, high = (np.log((0.5 / s) ** 2) - shift for s in (700.0, 0.002))
        start, end = np.arctan(np.exp(-high / 2)), np.arctan(np.exp(-low / 2))
        return -2 * np.log(np.tan(start + t * (end - start))) + shift

    draws = 4000
    got = torch.cat([edm.cosine_sigma(torch.Generator().manual_seed(n)) for n in range(draws)])
    times = torch.cat([torch.rand(1, generator=torch.Generator().manual_seed(n)) for n in range(5)])
    t = times.double().numpy()
    expected = 0.5 * np.exp(-((1 - t) * cosine(t, 32) + t * cosine(t, 64)) / 2)
    np.testing.assert_allclose(got[:5].numpy(), expected, rtol=1e-4)
    assert got.min() >= 0.0019
    assert got.max() <= 701
    edges = edm.sigma_quartiles("cosine", 0.0, 1.0)
    shares = torch.bincount(torch.bucketize(got, edges), minlength=4) / draws
    torch.testing.assert_close(shares, torch.full((4,), 0.25), atol=0.03, rtol=0)


def test_quartiles_of_lognormal_noise_levels():
    generator = torch.Generator().manual_seed(0)
    got = torch.cat([edm.training_sigma(generator, 0.7, 1.6) for _ in range(4000)])
    edges = edm.sigma_quartiles("lognormal", 0.7, 1.6)
    shares = torch.bincount(torch.bucketize(got, edges), minlength=4) / len(got)
    torch.testing.assert_close(shares, torch.full((4,), 0.25), atol=0.03, rtol=0)


# Algorithm 1: a linear "decoder" and "face embedding", so that the gradient is a formula.
ALGORITHM_SHAPE = (1, 2, 3, 4, 4)
PIXELS, FACE = 30, 6


def linear_face_model():
    rng = np.random.default_rng(7)
    size = int(np.prod(ALGORITHM_SHAPE[2:]))
    decoder = rng.normal(size=(PIXELS, size)) / np.sqrt(size)
    arcface = rng.normal(size=(FACE, PIXELS)) / np.sqrt(PIXELS)
    return arcface @ decoder, rng.normal(size=FACE)


def adam_on_the_face_loss(x_pred, rate, iterations=10):
    """The inner loop of Algorithm 1: mean |1 - cos(Arc(Decoder(x)), Arc(y))| over frames."""
    to_face, y = linear_face_model()
    x = x_pred.reshape(-1, to_face.shape[1]).copy()
    first, second = np.zeros_like(x), np.zeros_like(x)
    for k in range(1, iterations + 1):
        gradient = np.empty_like(x)
        for frame, latent in enumerate(x):
            f = to_face @ latent
            length = np.linalg.norm(f) * np.linalg.norm(y)
            cosine = f @ y / length
            d_cosine = y / length - cosine * f / (f @ f)
            gradient[frame] = -np.sign(1 - cosine) * (to_face.T @ d_cosine) / len(x)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        step = first / (1 - 0.9**k) / (np.sqrt(second / (1 - 0.999**k)) + 1e-8)
        x -= rate * step
    return x.reshape(x_pred.shape)


def torch_face_optimisation(predicted, rate, iterations=10):
    to_face, y = (torch.from_numpy(a) for a in linear_face_model())
    x = predicted.clone().detach().requires_grad_(True)
    optimiser = torch.optim.Adam([x], lr=rate)
    for _ in range(iterations):
        faces = x.flatten(2)[0] @ to_face.T
        loss = (1 - torch.cosine_similarity(faces, y[None], dim=-1)).abs().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return x.detach()


def algorithm_1(denoise, x, t, churn, t_min, t_max, noise, optimised_steps, rate):
    """Written from the text; `noise` is the epsilon of each step, of deviation S_noise."""
    steps = len(t) - 1
    for i in range(steps):
        gamma = 0.0
        if t_min <= t[i] <= t_max:
            gamma = min(churn / steps, np.sqrt(2) - 1)
        t_hat = t[i] + gamma * t[i]
        x_hat = x + np.sqrt(t_hat**2 - t[i] ** 2) * noise[i]
        x_pred = denoise(x_hat, t_hat)
        if i < optimised_steps:
            x_pred = adam_on_the_face_loss(x_pred, rate)
        d = (x_hat - x_pred) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            d_next = (x - denoise(x, t[i + 1])) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * (d + d_next) / 2
    return x


@pytest.mark.parametrize(
    "chosen",
    [
        {"churn": 0.0},
        {"churn": 1.2},
        {"churn": 40.0},  # capped at sqrt(2) - 1
        {"churn": 1.2, "churn_min": 0.05, "churn_max": 5.0, "churn_noise": 1.003},
    ],
)
def test_algorithm_1_equals_plain_numpy(chosen):
    steps, rate, optimised_steps = 6, 0.05, 3
    config = SamplerConfig(solver="heun", steps=steps, sigma_min=0.01, sigma_max=20.0, **chosen)
    sigmas = edm.karras_sigmas(steps, 0.01, 20.0).double()
    clip_noise = ClipNoise(5, ALGORITHM_SHAPE[2:])
    frames = range(ALGORITHM_SHAPE[1])
    highest = np.inf if config.churn_max is None else config.churn_max
    churned = [config.churn > 0 and config.churn_min <= t <= highest for t in sigmas[:-1]]
    noise = [
        clip_noise(i, frames).double().numpy()[None] * config.churn_noise
        if now
        else np.zeros(ALGORITHM_SHAPE)
        for i, now in enumerate(churned)
    ]

    def denoise(x, sigma):
        return x / (1 + sigma**2) + 0.1 * sigma

    def face_optimisation(x, numbers, i):
        return torch_face_optimisation(x[None], rate)[0] if i < optimised_steps else x

    states = ClipStates(ALGORITHM_SHAPE[1:], dtype=torch.float64)
    sample(
        lambda read, sigma, step: [(frames, denoise(read(frames), sigma))],
        states,
        sigmas,
        config,
        clip_noise,
        refine=face_optimisation,
    )
    got = states.current.read(frames)[None]
    start = (clip_noise(START, frames) * sigmas[0])[None]
    expected = algorithm_1(
        denoise,
        start.numpy(),
        sigmas.numpy(),
        config.churn,
        config.churn_min,
        highest,
        noise,
        optimised_steps,
        rate,
    )
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-6)


def euler_step(x, predicted, t, t_next):
    """One step of our sampler in the paper's time, in which sigma = 1 - t."""
    sigmas = torch.tensor([1 - t, 1 - t_next], dtype=torch.float64)
    config = SamplerConfig(solver="euler", steps=1)
    start, target = (
        torch.from_numpy(np.asarray(v, np.float64)).reshape(-1, 1) for v in (x, predicted)
    )
    states = ClipStates(start.shape, dtype=torch.float64)
    frames = range(len(start))
    sample(
        lambda read, sigma, step: [(frames, target)],
        states,
        sigmas,
        config,
        lambda step, numbers: start[list(numbers)] / sigmas[0],
    )
    return states.current.read(frames).reshape(np.shape(x)).numpy()


def test_eq_15_to_21_a_sampling_step_is_the_optimal_control():
    # Eq. 16 on a grid is a least-squares problem in the controls c: minimise the sum of c² dt / 2
    # and r |X_1 - x_1|² / 2 over X_1 = X_t + sum of c dt. Its first control is eq. 20's c*, and
    # for r to infinity one step of it is the sampler's step (eq. 21 without its noise).
    x_t, x_1, t, grid = 0.7, -1.3, 0.35, 500
    dt = (1 - t) / grid
    for r in (0.5, 10.0, 1e7):
        rows = np.vstack([np.eye(grid) * np.sqrt(dt), np.full(grid, dt * np.sqrt(r))])
        right = np.append(np.zeros(grid), (x_1 - x_t) * np.sqrt(r))
        control = np.linalg.lstsq(rows, right, rcond=None)[0]
        closed = r * (x_1 - x_t) / (1 + r * (1 - t))
        np.testing.assert_allclose(control, closed, rtol=1e-6)
    t_next = t + 0.1
    expected = x_t + (x_1 - x_t) / (1 - t) * (t_next - t)
    np.testing.assert_allclose(euler_step([x_t], [x_1], t, t_next), [expected])
    np.testing.assert_allclose(expected, x_t + control[0] * (t_next - t), rtol=1e-5)


def test_eq_22_to_24_a_sampling_step_follows_the_score():
    # Data at two points: the posterior mean and the density of x = theta + sigma noise are
    # formulas, and the score is a difference quotient of the log density.
    points, weights = np.array([-1.0, 2.0]), np.array([0.3, 0.7])
    t = 0.4
    sigma = 1 - t

    def density(x):
        return (weights * np.exp(-((x - points) ** 2) / (2 * sigma**2))).sum()

    x, step = 0.45, 1e-4
    score = (np.log(density(x + step)) - np.log(density(x - step))) / (2 * step)
    likelihood = weights * np.exp(-((x - points) ** 2) / (2 * sigma**2))
    mean = (likelihood * points).sum() / likelihood.sum()
    np.testing.assert_allclose(mean, x + sigma**2 * score, atol=1e-6)  # eq. 22, 23
    t_next = t + 0.01
    got = euler_step([x], [mean], t, t_next)
    np.testing.assert_allclose(got, [x + (1 - t) * score * (t_next - t)], atol=1e-8)  # eq. 24


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
