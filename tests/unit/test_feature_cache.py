"""Deep features kept between steps: what a shallow call leaves out and what it gives."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from animator.config import AnimatorConfig, tiny
from animator.feature_cache import FeatureCache
from animator.model import Animator

TWO = replace(tiny(), num_frames=2, block_out_channels=(32, 64), num_attention_heads=(1, 2))
FOUR = replace(
    TWO,
    width=128,
    block_out_channels=(32, 32, 64, 64),
    num_attention_heads=(1, 1, 2, 2),
    layers_per_block=2,
)


def model_of(config: AnimatorConfig) -> Animator:
    torch.manual_seed(0)
    return Animator(config).eval()


def inputs(model: Animator, noise: float = 0.0) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(1)
    config = model.config
    sample = torch.randn(1, 2, 2 * config.latent_channels, 16, 8, generator=draw)
    context = torch.randn(1, 5, config.cross_attention_dim, generator=draw)
    sample = sample + noise * torch.randn(sample.shape, generator=draw)
    return sample, torch.zeros(1), context, None, torch.tensor([[6.0, 127.0, 0.02]])


@pytest.mark.parametrize("config", [TWO, FOUR], ids=["two levels", "four levels"])
@torch.no_grad()
def test_a_shallow_call_on_the_same_input_is_the_whole_call(config: AnimatorConfig) -> None:
    model = model_of(config)
    cache = FeatureCache(model.unet)
    plain = model.denoise(*inputs(model))
    outputs = []
    for _ in range(2):
        with cache.call("a", refresh=False):
            outputs.append(model.denoise(*inputs(model)))
    assert (cache.whole_calls, cache.shallow_calls) == (1, 1)
    assert torch.equal(outputs[0], plain)
    assert torch.equal(outputs[1], plain)
    assert torch.equal(model.denoise(*inputs(model)), plain)  # nothing is left in the network


@torch.no_grad()
def test_a_shallow_call_follows_its_input_and_costs_a_fraction() -> None:
    model = model_of(FOUR)
    cache = FeatureCache(model.unet)
    flops = {}
    with cache.call("a", refresh=True):
        first = model.denoise(*inputs(model))
    for name, refresh in (("shallow", False), ("whole", True)):
        counter = FlopCounterMode(display=False)
        with cache.call("a", refresh=refresh), counter:
            output = model.denoise(*inputs(model, noise=0.1))
        flops[name] = counter.get_total_flops()
        if name == "shallow":
            near = output
    far = (first - output).abs().mean()
    assert 0 < (near - output).abs().mean() < far
    assert flops["shallow"] < 0.7 * flops["whole"]


@torch.no_grad()
def test_keys_are_kept_apart_and_a_refresh_replaces() -> None:
    model = model_of(TWO)
    cache = FeatureCache(model.unet)
    wholes = {}
    for key, noise in (("a", 0.0), ("b", 1.0), ("a", 2.0)):
        with cache.call(key, refresh=True):
            wholes[key, noise] = model.denoise(*inputs(model, noise))
    size = cache.num_bytes
    with cache.call("a", refresh=False) as shallow:
        assert shallow
        assert torch.equal(model.denoise(*inputs(model, 2.0)), wholes["a", 2.0])
    with cache.call("b", refresh=False):
        assert torch.equal(model.denoise(*inputs(model, 1.0)), wholes["b", 1.0])
    assert cache.num_bytes == size
    cache.clear()
    assert cache.num_bytes == 0
    with cache.call("a", refresh=False) as shallow:
        assert not shallow


@torch.no_grad()
def test_what_does_not_fit_is_computed_whole_each_time() -> None:
    model = model_of(TWO)
    cache = FeatureCache(model.unet, max_bytes=10)
    for _ in range(2):
        with cache.call("a", refresh=False) as shallow:
            model.denoise(*inputs(model))
        assert not shallow
    assert (cache.num_bytes, cache.whole_calls) == (0, 2)


def test_a_call_that_fails_leaves_the_network_as_it_was() -> None:
    model = model_of(TWO)
    cache = FeatureCache(model.unet)
    with cache.call("a", refresh=True):
        expected = model.denoise(*inputs(model))
    with pytest.raises(RuntimeError, match="stop"), cache.call("a", refresh=False):
        raise RuntimeError("stop")
    assert torch.equal(model.denoise(*inputs(model)), expected)
