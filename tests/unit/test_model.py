"""The animator as a whole: sizes, conditioning paths, published reference outputs."""

import dataclasses

import pytest
import torch

from animator.config import AnimatorConfig, svd_xt, tiny
from animator.face_gradient import FACE_GRADIENT_LIMIT
from animator.id_adapter import IDAdapter
from animator.model import Animator

SMALL = AnimatorConfig(
    height=32,
    width=32,
    num_frames=3,
    block_out_channels=(32, 64, 64),
    num_attention_heads=(2, 2, 2),
    cross_attention_dim=64,
    face_encoder_depth=1,
)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def inputs(config: AnimatorConfig, batch: int = 2, frames: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    cells = (config.height // 8, config.width // 8)
    return [
        draw(batch, frames, 2 * config.latent_channels, *cells),
        draw(batch),
        draw(batch, 1, config.cross_attention_dim),
        draw(batch, config.face_embedding_dim),
        draw(batch * frames, 3, config.height, config.width).clamp(-1, 1),
        torch.tensor([[6.0, 127, 0.02]] * batch),
    ]


def small_animator() -> Animator:
    """Random weights everywhere, also where training starts from zeros."""
    torch.manual_seed(0)
    model = Animator(SMALL).eval()
    for parameter in model.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def test_published_sizes():
    with torch.device("meta"):
        model = Animator(svd_xt())
    adapters = [m for m in model.modules() if isinstance(m, IDAdapter)]
    assert len(adapters) == 16
    adapter_size = sum(map(count, adapters))
    assert count(model.pose_net) == 205_557
    assert round(count(model.face_encoder) / 1e6, 2) == 57.18
    assert round(adapter_size / 1e6, 2) == 25.56
    assert count(model.unet) - adapter_size == 1_524_623_082


@torch.no_grad()
@pytest.mark.parametrize("changed", range(6))
def test_every_input_reaches_the_prediction(changed):
    model = small_animator()
    given = inputs(SMALL)
    before = model(*given)
    assert before.shape == (2, 3, SMALL.latent_channels, 4, 4)
    given[changed] = given[changed] * 0.5 + 0.3
    assert (model(*given) - before).abs().max() > 1e-6


@torch.no_grad()
def test_dropping_the_image_token_silences_the_face():
    model = small_animator()
    given = inputs(SMALL)
    given[2] = torch.zeros_like(given[2])
    before = model(*given)
    given[3] = given[3] + 1
    torch.testing.assert_close(model(*given), before, atol=1e-5, rtol=0)


def test_a_training_step_with_a_dropped_image_token_is_finite():
    model = small_animator().train()
    given = inputs(SMALL)
    given[2][0] = 0
    model(*given).square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@torch.no_grad()
def test_pose_of_one_call_does_not_leak_into_the_next():
    model = small_animator()
    given = inputs(SMALL)
    without = [*given[:4], None, given[5]]
    before = model(*without)
    model(*given)
    torch.testing.assert_close(model(*without), before)


def test_wrong_sizes_are_refused_with_both_numbers():
    model = Animator(SMALL)
    given = inputs(SMALL)
    with pytest.raises(ValueError, match=r"expected\s+\(B, T, 96, h, w\)"):
        model(given[0][:, :, :5], *given[1:])
    with pytest.raises(ValueError, match="multiples of 4"):
        model(given[0][..., :3], *given[1:])
    with pytest.raises(ValueError, match="multiples of 32"):
        dataclasses.replace(tiny(), height=100)


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 14, 16, 25])
def test_any_number_of_frames(frames):
    out = small_animator()(*inputs(SMALL, batch=1, frames=frames))
    assert out.shape == (1, frames, SMALL.latent_channels, 4, 4)
    assert torch.isfinite(out).all()


@torch.no_grad()
def test_clips_of_a_batch_do_not_see_each_other():
    model, given = small_animator(), inputs(SMALL, batch=2, frames=3)
    together = model(*given)
    for clip in range(2):
        alone = [x[clip : clip + 1] for x in given]
        alone[4] = given[4][3 * clip : 3 * clip + 3]
        torch.testing.assert_close(model(*alone)[0], together[clip], atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.15), (torch.float16, 0.02)])
def test_half_precision_stays_close_and_finite(dtype, tolerance):
    model, given = small_animator(), inputs(SMALL)
    exact = model(*given)
    half = model.to(dtype)(*given)
    assert half.dtype == dtype
    # Random weights let the rounding of some forty layers through undamped.
    error = (half.float() - exact).std() / exact.std()
    assert error < tolerance
    given[2] = torch.zeros_like(given[2])  # a dropped image token has no spread to divide by
    assert torch.isfinite(model(*given)).all()


@torch.no_grad()
def test_half_precision_survives_large_features():
    # Sums over positions and channels leave fp16's range long before the features do.
    model = small_animator().half()
    given = inputs(SMALL)
    given[2] = given[2] * 300
    given[3] = given[3] * 300
    assert torch.isfinite(model(*given)).all()


@pytest.mark.parametrize(
    ("which", "change", "said"),
    [
        (2, lambda x: x.repeat(1, 2, 1), "image_token of shape"),
        (3, lambda x: x[:1], "face_embedding of shape"),
        (3, lambda x: x[:, :128], "face_embedding of shape"),
        (4, lambda x: x[:1], "pose_images of shape"),
        (4, lambda x: x[..., :16], "pose_images of shape"),
        (5, lambda x: x[:1], "added_time_ids of shape"),
        (6, lambda x: x[:, None], "keep_face of shape"),
        (7, lambda x: x[:1], "keep_pose of shape"),
    ],
)
def test_conditions_that_do_not_fit_the_sample_are_named(which, change, said):
    given = [*inputs(SMALL), torch.ones(2), torch.ones(2)]
    given[which] = change(given[which])
    with pytest.raises(ValueError, match=said):
        Animator(SMALL)(*given)


@torch.no_grad()
def test_a_dropped_face_or_pose_is_that_of_the_unconditional_call():
    model, given = small_animator(), inputs(SMALL)
    kept = model(*given)
    torch.testing.assert_close(model(*given, torch.ones(2), torch.ones(2)), kept)
    for which, name in ((3, "keep_face"), (4, "keep_pose")):
        without = [*given]
        without[which] = None
        nothing = model(*without)
        got = model(*given, **{name: torch.tensor([0.0, 1.0])})
        torch.testing.assert_close(got[0], nothing[0])
        torch.testing.assert_close(got[1], kept[1])
        assert (got[0] - kept[0]).abs().max() > 1e-6


@torch.no_grad()
def test_without_the_face_encoder_tokens_do_not_know_the_image():
    config = dataclasses.replace(SMALL, face_encoder="projection")
    torch.manual_seed(0)
    model, given = Animator(config).eval(), inputs(SMALL)
    tokens = model.context(given[2], given[3])[:, 1:]
    torch.testing.assert_close(model.context(given[2] + 1, given[3])[:, 1:], tokens)
    assert (model.context(given[2], given[3] + 1)[:, 1:] - tokens).abs().max() > 1e-3
    whole = small_animator()
    before = whole.context(given[2], given[3])[:, 1:]
    assert (whole.context(given[2] * 2, given[3])[:, 1:] - before).abs().max() > 1e-3
    assert not any("fusion_model" in name for name in model.state_dict())


def face_gradient(model, *, scale=1.0):
    """Norms, by clip, of the gradients of face tokens and prediction, as they flow on."""
    tokens, norms = [], {}
    handle = model.face_encoder.register_forward_hook(lambda _m, _i, out: tokens.append(out))
    output = model(*inputs(SMALL))
    handle.remove()
    tokens[0].register_hook(lambda g: norms.update(face=g.flatten(1).norm(dim=1)))
    output.register_hook(lambda g: norms.update(prediction=g.flatten(1).norm(dim=1)))
    (output.square().mean() * scale).backward()
    return norms["face"], norms["prediction"]


def test_the_gradient_into_an_untrained_face_encoder_is_bounded_by_clip():
    torch.manual_seed(0)
    model = Animator(SMALL).train()
    torch.nn.init.normal_(model.face_encoder.fusion_model.norm_out.bias, std=1e-6)
    free, prediction = face_gradient(model)
    assert (free > 100 * prediction).all()
    model.face_gradient_limit = FACE_GRADIENT_LIMIT
    bounded, prediction = face_gradient(model)
    torch.testing.assert_close(bounded, FACE_GRADIENT_LIMIT * prediction)
    # Whatever the loss is multiplied by, so that no number of workers changes the bound.
    smaller, _ = face_gradient(model, scale=1 / 64)
    torch.testing.assert_close(smaller, bounded / 64)
    endless, _ = face_gradient(model, scale=float("inf"))
    assert not endless.isfinite().any()  # left for whoever watches over the steps


def test_gradients_within_the_bound_are_untouched():
    gradients = []
    for limit in (None, 1e9):
        model = small_animator().train()
        model.face_gradient_limit = limit
        model(*inputs(SMALL)).square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert all(torch.equal(gradients[1][name], value) for name, value in gradients[0].items())
