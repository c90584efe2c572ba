"""Trainable sets by name, and low-rank updates that become a plain model again."""

import pytest
import torch

from animator.model import Animator
from animator.trainable import choose_trainable, lora_state, merged_state
from animator.unet import idle_parameters
from tests.unit.test_model import SMALL, inputs, small_animator


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_sets_are_nested_and_hold_what_their_names_say():
    names, sets = {n for n, _ in Animator(SMALL).named_parameters()}, {}
    for what in ("all", "attentions", "adapters"):
        model = Animator(SMALL)
        choose_trainable(model, what)
        sets[what] = trained(model)
    idle = {f"unet.{name}" for name in idle_parameters(model.unet)}
    scratch = {n for n in names if n.startswith(("pose_net.", "face_encoder."))}
    unet = names - scratch
    assert sets["all"] == names - idle
    assert sets["attentions"] == scratch | {n for n in unet - idle if "attentions" in n}
    assert sets["adapters"] == scratch | {n for n in unet if ".id_to_" in n}
    # A later choice replaces an earlier one.
    choose_trainable(model, "all")
    assert trained(model) == sets["all"]


def test_every_trained_weight_gets_a_gradient():
    # A data-parallel engine waits for the gradient of each weight that it was given.
    for what in ("all", "lora"):
        model = small_animator().train()
        choose_trainable(model, what, rank=2)
        keep = torch.tensor([0.0, 1.0])
        model(*inputs(SMALL), keep_face=keep, keep_pose=1 - keep).square().mean().backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == trained(model)


def test_low_rank_updates_train_a_small_share_and_leave_the_base_alone():
    model = small_animator().train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    choose_trainable(model, "lora", rank=2, alpha=4.0)
    own = {name for name in trained(model) if ".lora_" in name}
    parts = ("to_q", "to_k", "to_v", "to_out.0")
    assert {n.rpartition(".lora_")[0].rpartition(".attn")[2][2:] for n in own} == set(parts)
    optimiser = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    model(*inputs(SMALL)).square().mean().backward()
    optimiser.step()
    for name, value in model.named_parameters():
        plain = name.replace(".base_layer.", ".")
        if plain in before and not value.requires_grad:
            assert torch.equal(value, before[plain])
    assert any(model.state_dict()[name].abs().max() > 0 for name in own if ".lora_B." in name)


@torch.no_grad()
def test_merged_weights_give_the_same_prediction_in_a_plain_model(tmp_path):
    model = small_animator()
    choose_trainable(model, "lora", rank=2, alpha=5.0)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    expected = model(*inputs(SMALL))
    assert (expected - small_animator()(*inputs(SMALL))).abs().max() > 1e-3
    plain = Animator(SMALL).eval()
    plain.load_state_dict(merged_state(model.state_dict(), alpha=5.0))
    torch.testing.assert_close(plain(*inputs(SMALL)), expected, atol=1e-5, rtol=1e-4)
    plain.save_pretrained(tmp_path)
    again = Animator.from_pretrained(tmp_path)
    assert torch.equal(again(*inputs(SMALL)), plain(*inputs(SMALL)))


def test_the_low_rank_tensors_alone_are_small_and_named_for_peft():
    model = small_animator()
    choose_trainable(model, "lora", rank=2)
    small = lora_state(model.state_dict())
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in small)
    assert sum(v.numel() for v in small.values()) < 0.05 * sum(
        p.numel() for p in model.parameters()
    )


def test_a_state_that_cannot_be_merged_is_refused():
    plain = small_animator().state_dict()
    merged = merged_state(plain)
    assert all(merged[name] is value for name, value in plain.items())
    model = small_animator()
    choose_trainable(model, "lora", rank=2)
    with pytest.raises(ValueError, match="without alpha"):
        merged_state(model.state_dict())
    low_rank = {n: v for n, v in model.state_dict().items() if ".lora_" in n}
    with pytest.raises(ValueError, match="without its weight"):
        merged_state(low_rank, alpha=16.0)
    with pytest.raises(ValueError, match="low-rank tensors already"):
        choose_trainable(model, "all")
    with pytest.raises(ValueError, match="Got 'most'"):
        choose_trainable(small_animator(), "most")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1"):
        choose_trainable(small_animator(), "lora", rank=0)
