import pytest
import torch
from torch import nn

from training.ema import WeightAverage, ema_decay


def test_weight_share_halves_after_one_half_life():
    assert ema_decay(1_000_000, 500, half_life=500, ramp=0.05) == pytest.approx(0.5)


def test_decay_over_two_spans_is_the_product_of_both():
    whole = ema_decay(1_000_000, 96, half_life=500, ramp=0.05)
    parts = ema_decay(1_000_000, 32, half_life=500, ramp=0.05) ** 3
    assert whole == pytest.approx(parts)


def test_short_run_forgets_its_initial_weights():
    share_of_initial = 1.0
    for seen in range(8, 801, 8):
        share_of_initial *= ema_decay(seen, 8, half_life=100_000, ramp=0.05)
    assert share_of_initial < 1e-6


def test_no_half_life_means_no_averaging():
    assert ema_decay(100, 8, half_life=0, ramp=0.05) == 0.0


def test_average_follows_trainable_weights_only():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    model[2].requires_grad_(False)
    start = model[0].weight.detach().clone()
    average = WeightAverage(model, keep=True)
    with torch.no_grad():
        model[0].weight += 1.0
        model[2].weight += 1.0
        model[1].running_mean += 3.0
    average.update(0.75)
    state = average.state()
    torch.testing.assert_close(state["0.weight"], start + 0.25)
    assert not any(name.startswith("2.") for name in state)
    torch.testing.assert_close(
        state["1.running_mean"], torch.full((2,), 3.0)
    )  # buffers as they are


def test_saved_average_continues_bit_for_bit():
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    first = WeightAverage(model, keep=True)
    with torch.no_grad():
        model.weight.normal_()
    first.update(0.9)
    second = WeightAverage(model, keep=True)
    second.load(first.state())
    with torch.no_grad():
        model.weight.normal_()
    first.update(0.9)
    second.update(0.9)
    assert torch.equal(first.state()["weight"], second.state()["weight"])


def test_average_of_another_model_is_refused():
    with pytest.raises(ValueError, match="lacks weight"):
        WeightAverage(nn.Linear(2, 2), keep=True).load({"bias": torch.zeros(2)})


def test_other_ranks_hold_nothing():
    average = WeightAverage(nn.Linear(2, 2), keep=False)
    average.update(0.5)
    assert average.state() == {}
