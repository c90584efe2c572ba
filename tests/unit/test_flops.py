"""Analytic operation counts against torch's counter, on tensors without storage."""

import contextlib
import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from animator.config import svd_xt, tiny
from animator.flops import forward_flops, training_flops
from animator.model import Animator
from animator.trainable import choose_trainable

FACES = dataclasses.replace(tiny(), face_encoder="projection", id_adapter="addition")
SIZES = {
    "tiny": (tiny(), 128, 96, 8, 2),
    "without the face encoder": (FACES, 128, 96, 8, 1),
    "published 512": (svd_xt(), 512, 512, 16, 1),
    "published 576": (svd_xt(), 576, 1024, 16, 1),
}
KINDS = {"mm": "linear", "addmm": "linear", "convolution": "conv"}


@contextlib.contextmanager
def without_storage(config):
    """An animator whose tensors, and those made meanwhile, have shapes alone."""
    with torch.device("meta"):
        model = Animator(config)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    with FakeTensorMode():
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
        model.load_state_dict(state, assign=True)
        yield model


def inputs(config, height, width, frames, batch):
    factor = config.spatial_factor
    shapes = [
        (batch, frames, 2 * config.latent_channels, height // factor, width // factor),
        (batch,),
        (batch, 1, config.cross_attention_dim),
        (batch, config.face_embedding_dim),
        (batch * frames, 3, height, width),
        (batch, 3),
    ]
    return [torch.empty(shape) for shape in shapes]


def counted(model, given, *, backward=False):
    """Operations by kind as torch's counter sees them."""
    # The counter does not know every fused kernel; plain products it does.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(*given)
        if backward:
            output.sum().backward()
    kinds = {"linear": 0, "conv": 0, "attention": 0}
    for operator, flops in counter.get_flop_counts()["Global"].items():
        name = str(operator).removeprefix("aten.")
        kinds[KINDS.get(name, "conv" if "convolution" in name else "attention")] += flops
    return kinds | {"total": sum(kinds.values())}


@pytest.mark.parametrize("case", SIZES.values(), ids=SIZES)
def test_forward_agrees_with_the_counter_of_torch(case):
    config, *size = case
    with without_storage(config) as model:
        expected = counted(model, inputs(config, *size))
    got = forward_flops(config, *size)
    for kind, flops in expected.items():
        assert abs(got[kind] / flops - 1) < 0.02, kind


def test_the_published_network_costs_what_is_known_of_it():
    # Stable Video Diffusion's UNet alone, measured: 51.2 and 20.3 TFLOP for 16 frames.
    for size, expected in (((576, 1024), 51.2e12), ((512, 512), 20.3e12)):
        assert abs(forward_flops(svd_xt(), *size, 16)["total"] / expected - 1) < 0.02


@pytest.mark.parametrize("what", ["all", "attentions", "adapters"])
def test_training_agrees_with_the_counter_of_torch(what):
    size = (128, 96, 8, 1)
    with without_storage(tiny()) as model:
        choose_trainable(model.train(), what)
        expected = counted(model, inputs(tiny(), *size), backward=True)["total"]
    assert abs(training_flops(tiny(), *size, trainable=what) / expected - 1) < 0.02


def test_all_trained_costs_three_forward_passes():
    size = (128, 96, 8)
    assert training_flops(tiny(), *size) == 3 * forward_flops(tiny(), *size)["total"]
