"""Windows shared by several devices: the same bits as on one, errors and all."""

import threading

import pytest
import torch

from animator.model import Animator
from inference.guidance import Conditions, GuidanceConfig, GuidedDenoiser
from inference.parallel import WindowedDenoiser, replicas
from inference.windows import WindowConfig, plan_windows
from tests.unit.test_model import SMALL, inputs, small_animator

FRAMES, CELLS, SIGMA = 10, 4, torch.tensor(2.0)
CONFIG = WindowConfig(overlap=1)


@pytest.fixture(scope="module")
def model() -> Animator:
    return small_animator()


@torch.no_grad()
def denoiser_of(model: Animator) -> GuidedDenoiser:
    _, _, token, embedding, poses, ids = inputs(SMALL, batch=1, frames=FRAMES)
    generator = torch.Generator().manual_seed(4)
    reference = torch.randn(1, SMALL.latent_channels, CELLS, CELLS, generator=generator)
    told = Conditions(model.context(token, embedding), model.pose_net(poses), reference, ids)
    return GuidedDenoiser(model, told, GuidanceConfig.constant(2.0))


def shares(denoisers, x):
    windowed = WindowedDenoiser(
        denoisers, lambda step: plan_windows(FRAMES, SMALL.num_frames, CONFIG, step)
    )
    return list(windowed(lambda frames: x[list(frames)], SIGMA, 0))


def test_two_devices_give_the_bits_of_one_in_the_same_order(model):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(FRAMES, SMALL.latent_channels, CELLS, CELLS, generator=generator)
    copies = replicas(model, ("cpu", "cpu"))
    assert copies[0] is model
    assert copies[1] is not model
    used = set()
    for copy in copies:
        copy.unet.register_forward_hook(lambda module, *_: used.add(threading.get_ident()))
    alone = shares([denoiser_of(model)], x)
    used.clear()
    together = shares([denoiser_of(copy) for copy in copies], x)
    assert len(used) == 2
    assert threading.get_ident() not in used
    assert [frames for frames, _ in together] == [frames for frames, _ in alone]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(together, alone, strict=True))


def test_what_fails_on_a_device_fails_the_run(model):
    def read(frames):
        if 5 in frames:
            raise RuntimeError("out of memory")
        return torch.zeros(len(frames), SMALL.latent_channels, CELLS, CELLS)

    denoisers = [denoiser_of(copy) for copy in replicas(model, ("cpu", "cpu"))]
    windowed = WindowedDenoiser(denoisers, lambda step: plan_windows(FRAMES, 3, CONFIG, step))
    with pytest.raises(RuntimeError, match="out of memory"):
        list(windowed(read, SIGMA, 0))


def test_devices_that_are_not_there_are_named(model):
    assert replicas(model, ()) == [model]
    with pytest.raises(ValueError, match=r"Got device 'gpu7'.*cuda:0"):
        replicas(model, ("gpu7",))
