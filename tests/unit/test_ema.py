import torch
from torch import nn

from training.ema import WeightAverage, ema_decay


def test_state_stays_as_it_is_while_training_goes_on():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = WeightAverage(model, keep=True)
    state = average.state()
    before = {name: value.clone() for name, value in state.items()}
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value += 1
    average.update(0.5)
    assert all(torch.equal(state[name], before[name]) for name in before)
    after = average.state()
    assert torch.allclose(after["0.weight"], before["0.weight"] + 0.5)
    assert torch.equal(after["1.running_mean"], before["1.running_mean"] + 1)


def test_saved_average_is_taken_over():
    model = nn.Linear(2, 2)
    average = WeightAverage(model, keep=True)
    saved = average.state()
    with torch.no_grad():
        model.weight += 1
    average.update(0.0)
    assert not torch.equal(average.state()["weight"], saved["weight"])
    average.load(saved)
    assert torch.equal(average.state()["weight"], saved["weight"])


def test_workers_that_do_not_keep_it_have_nothing():
    average = WeightAverage(nn.Linear(2, 2), keep=False)
    average.update(0.5)
    assert average.state() == {}


def test_half_of_the_weight_is_gone_after_the_half_life():
    assert ema_decay(1_000_000, 500, half_life=500, ramp=0.05) == 0.5
    assert ema_decay(100, 5, half_life=500, ramp=0.05) == 0.5  # a young average forgets faster
    assert ema_decay(100, 5, half_life=0, ramp=0.05) == 0.0
