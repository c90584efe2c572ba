"""Running a model faster or smaller: what changes, and what must not."""

import copy
from dataclasses import replace

import pytest
import torch

from animator.config import tiny
from animator.feature_cache import FeatureCache
from animator.model import Animator
from inference.guidance import Conditions, GuidanceConfig, GuidedDenoiser
from inference.parallel import WindowedDenoiser
from inference.speed import SpeedConfig, prepare, repeated_blocks
from inference.windows import WindowConfig, plan_windows

SMALL = replace(
    tiny(),
    num_frames=4,
    block_out_channels=(64, 64),
    num_attention_heads=(2, 2),
    height=64,
    width=64,
)
FRAMES = 7


@pytest.fixture
def animator() -> Animator:
    torch.manual_seed(0)
    return Animator(SMALL).eval()


def conditions(config=SMALL) -> Conditions:
    draw = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    return Conditions(
        random(1, 5, config.cross_attention_dim),
        random(FRAMES, config.block_out_channels[0], 8, 8),
        random(1, config.latent_channels, 8, 8),
        torch.tensor([[6.0, 127.0, 0.02]]),
    )


def predictions(
    animators: list[Animator], speed: SpeedConfig, steps: int = 3
) -> list[torch.Tensor]:
    """The clip's prediction at each step, from latents that drift a little."""
    denoisers = [
        GuidedDenoiser(model, conditions(), GuidanceConfig.constant(2.0), speed.cache(model))
        for model in animators
    ]
    windows = WindowConfig()
    denoise = WindowedDenoiser(
        denoisers,
        lambda step: plan_windows(FRAMES, SMALL.num_frames, windows, step),
        refresh_every=speed.cache_every,
    )
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(FRAMES, SMALL.latent_channels, 8, 8, generator=draw)
    found = []
    for step in range(steps):
        total = torch.zeros_like(x)
        for frames, share in denoise(lambda f, x=x: x[list(f)], torch.tensor(2.0), step):
            total[list(frames)] += share
        found.append(total)
        x = x + 0.05 * torch.randn(x.shape, generator=draw)
    return found


def test_cached_steps_are_near_and_whole_ones_equal(animator: Animator) -> None:
    whole = predictions([animator], SpeedConfig())
    cached = predictions([animator], SpeedConfig(cache_every=2))
    change = (whole[1] - whole[0]).abs().mean()
    assert torch.equal(cached[0], whole[0])
    assert 0 < (cached[1] - whole[1]).abs().mean() < change


def test_cache_does_not_depend_on_the_number_of_devices(animator: Animator) -> None:
    speed = SpeedConfig(cache_every=3)
    alone = predictions([animator], speed)
    shared = predictions([animator, copy.deepcopy(animator)], speed)
    for one, two in zip(alone, shared, strict=True):
        assert torch.equal(one, two)


def test_cache_of_windows_that_move_is_used_throughout_and_does_not_grow(
    animator: Animator, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = []

    class Kept(FeatureCache):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            caches.append(self)

    monkeypatch.setattr("inference.speed.FeatureCache", Kept)
    one_step = predictions([animator], SpeedConfig(cache_every=2), steps=1)
    ten_steps = predictions([animator], SpeedConfig(cache_every=2), steps=10)
    assert len(one_step) == 1
    assert len(ten_steps) == 10
    assert caches[1].num_bytes <= 1.5 * caches[0].num_bytes
    assert caches[1].shallow_calls == caches[1].whole_calls


def test_channels_last_changes_no_more_than_rounding(animator: Animator) -> None:
    before = predictions([animator], SpeedConfig(), steps=1)[0]
    prepare(animator, SpeedConfig(channels_last=True))
    weight = animator.unet.down_blocks[0].resnets[0].spatial_res_block.conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    after = predictions([animator], SpeedConfig(), steps=1)[0]
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_every_repeated_block_is_compiled_and_gives_the_same(animator: Animator) -> None:
    before = predictions([animator], SpeedConfig(), steps=1)[0]
    compiled = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        nonlocal compiled
        compiled += 1
        return graph

    count = len(list(repeated_blocks(animator)))
    prepare(animator, SpeedConfig(compile=True), backend=backend)
    after = predictions([animator], SpeedConfig(), steps=1)[0]
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert count > 10
    assert 0 < compiled <= count


def test_int8_linears_take_half_and_stay_near(animator: Animator) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    before = predictions([animator], SpeedConfig(), steps=1)[0]
    linears = [m for m in animator.unet.modules() if isinstance(m, torch.nn.Linear)]
    large = [m for m in linears if min(m.weight.shape) >= 64]
    prepare(animator, SpeedConfig(linears="int8"))
    assert all(type(m.weight).__name__ == "Int8Tensor" for m in large)
    after = predictions([animator], SpeedConfig(), steps=1)[0]
    error = (after - before).square().mean() / before.square().mean()
    assert 0 < error < 1e-3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"cache_every": 0}, "1 \\(off\\) to 10"),
        ({"cache_gib": -1}, "0 to 1024"),
        ({"offload": True, "compile": True}, "one of them"),
    ],
)
def test_settings_out_of_range_are_refused(given: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SpeedConfig(**given)


def test_offloading_without_a_gpu_is_refused(animator: Animator) -> None:
    with pytest.raises(ValueError, match="expected a GPU"):
        prepare(animator, SpeedConfig(offload=True))
