"""The animator as a whole: sizes, conditioning paths, published reference outputs."""

import dataclasses

import pytest
import torch

from animator.config import AnimatorConfig, svd_xt, tiny
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
