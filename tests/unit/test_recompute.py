"""Recomputed blocks: the same numbers from less memory, and names that stay."""

import copy

import pytest
import torch

from animator.recompute import recompute_blocks
from tests.unit.test_model import SMALL, inputs, small_animator


def step(model):
    """Loss, gradients, and how many numbers were kept for the way back."""
    kept = [0]

    def pack(x):
        kept[0] += x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(*inputs(SMALL, batch=1)).square().mean()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}, kept[0]


def test_loss_and_gradients_are_the_same_bit_for_bit_from_less_memory():
    loss, gradients, all_kept = step(small_animator().train())
    kept = []
    for share in (0.5, 1.0):
        model = small_animator().train()
        recompute_blocks(model, share)
        again, own, numbers = step(model)
        kept.append(numbers)
        assert torch.equal(again, loss)
        assert own.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (gradient is None) == (own[name] is None)
            assert gradient is None or (own[name] == gradient).all(), name
    assert kept[1] < 0.35 * all_kept
    assert kept[1] < kept[0] < all_kept


def test_deep_blocks_are_the_first_to_keep_their_activations():
    model = small_animator()
    every, most = recompute_blocks(model, 1.0), recompute_blocks(model, 0.8)
    for part in ("resnets", ".transformer_blocks", "temporal_transformer_blocks"):
        assert any(part in name for name in every)
    assert {"pose_net", "face_encoder"} <= set(every)
    spared = [name for name in every if name not in most]
    assert len(spared) == round(0.2 * len(every))
    deep = ("face_encoder", "unet.mid_block", "unet.down_blocks.2", "unet.up_blocks.0")
    assert all(name.startswith(deep) for name in spared)
    assert recompute_blocks(model, 0.0) == []
    assert type(model.pose_net).__name__ == "PoseNet"


def test_names_and_copies_stay_as_they_are():
    model = small_animator().train()
    names = list(model.state_dict())
    recompute_blocks(model, 1.0)
    recompute_blocks(model, 1.0)  # choosing again changes nothing
    assert list(model.state_dict()) == names
    twin = copy.deepcopy(model)
    loss, _, kept = step(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(step(twin)[0], loss)  # it runs with its own weights
    model.eval()
    assert step(model)[2] > kept  # outside training nothing is recomputed


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_outside_its_range_is_refused(share):
    with pytest.raises(ValueError, match="share from 0"):
        recompute_blocks(small_animator(), share)
