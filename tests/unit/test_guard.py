import json
import math

import pytest
import torch
from safetensors.torch import load_file

from training.config import GuardConfig
from training.guard import Guard, keep_batch
from training.metrics import Appender, read_lines
from training.task import TrainingError


def settled(spike=10.0, settle_steps=4, **settings) -> Guard:
    guard = Guard(GuardConfig(spike=spike, settle_steps=settle_steps, **settings))
    for _ in range(settle_steps):
        assert guard.fault(0.5, 2.0) is None
    return guard


@pytest.mark.parametrize(
    ("loss", "norm", "reason"),
    [
        (math.nan, 1.0, "the loss is nan"),
        (math.inf, 1.0, "the loss is inf"),
        (0.5, math.inf, "the gradient norm is inf"),
        (0.5, math.nan, "the gradient norm is nan"),
    ],
)
def test_step_without_finite_numbers_is_left_out_from_the_first_one_on(loss, norm, reason):
    guard = Guard(GuardConfig())
    assert guard.fault(loss, norm) == reason
    assert (guard.left_out, guard.in_a_row, guard.good) == (1, 1, 0)


def test_norm_far_above_the_mean_is_left_out_and_does_not_enter_it():
    guard = settled()
    assert guard.fault(0.5, 19.9) is None  # ten times the mean is 20
    before = guard.mean
    assert guard.fault(0.5, 1e3) == "the gradient norm is 1e+03, the mean before it 6.47"
    assert guard.mean == before


def test_large_norms_are_believed_while_the_run_settles():
    guard = Guard(GuardConfig(spike=10.0, settle_steps=4))
    norms = [1e-3, 1.0, 1e3, 1e6]
    assert [guard.fault(0.5, norm) for norm in norms] == [None] * 4
    assert guard.mean == pytest.approx(sum(norms) / 4)


def test_mean_follows_norms_that_fall():
    guard = settled()
    for _ in range(40):
        guard.fault(0.5, 0.02)
    assert guard.fault(0.5, 1.0) is not None


def test_spikes_are_taken_where_the_guard_is_told_so():
    assert settled(spike=0).fault(0.5, 1e30) is None


def test_gradients_that_were_all_zero_make_no_spike_of_the_first_other_one():
    guard = Guard(GuardConfig(spike=10.0, settle_steps=2))
    assert [guard.fault(0.0, 0.0) for _ in range(3)] == [None] * 3
    assert guard.fault(0.5, 1.0) is None


def test_run_ends_only_when_steps_in_a_row_are_left_out(tmp_path):
    guard = settled(max_in_a_row=2)
    guard.fault(math.nan, 1.0)
    guard.fault(0.5, 2.0)
    guard.fault(math.nan, 1.0)
    assert not guard.exhausted
    reason = guard.fault(math.nan, 1.0)
    assert guard.exhausted
    error = guard.exhaustion("step 9", reason, tmp_path)
    assert isinstance(error, TrainingError)
    assert "At step 9 the loss is nan, and 1 step before it were left out too" in str(error)
    assert str(tmp_path) in str(error)


def test_state_read_back_decides_alike():
    settings = GuardConfig(spike=3.0, settle_steps=3)
    norms = torch.rand(60, generator=torch.Generator().manual_seed(0)).mul(4).exp().tolist()
    whole, part = Guard(settings), Guard(settings)
    verdicts = [whole.fault(0.5, norm) for norm in norms]
    first = [part.fault(0.5, norm) for norm in norms[:30]]
    continued = Guard(settings)
    continued.load(json.loads(json.dumps(part.state())))
    assert first + [continued.fault(0.5, norm) for norm in norms[30:]] == verdicts
    assert len(set(verdicts)) > 3  # some taken, several left out


def keep(folder, position, rank=0, steps=2, **facts):
    batches = [{"x": torch.full((2, 3), float(position + i))} for i in range(2)]
    return keep_batch(folder, position, rank, lambda: batches, facts, steps)


def test_batch_of_a_left_out_step_can_be_looked_at(tmp_path):
    numbers = {"loss": [torch.tensor(math.nan), torch.tensor(0.5)]}
    assert keep(tmp_path / "new", 16, rank=1, reason="why", numbers=numbers) is None
    path = tmp_path / "new" / "samples-000000000016-rank-1.safetensors"
    assert load_file(path)["x"][:, 0].tolist() == [16, 16, 17, 17]
    facts = json.loads(path.with_suffix(".json").read_text())
    assert facts == {"reason": "why", "numbers": {"loss": ["nan", 0.5]}}


def test_only_the_newest_batches_of_a_worker_are_kept(tmp_path):
    for position in (8, 16, 24):
        keep(tmp_path, position)
    keep(tmp_path, 8, rank=1)
    left = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert left == [
        "samples-000000000008-rank-1.safetensors",
        "samples-000000000016-rank-0.safetensors",
        "samples-000000000024-rank-0.safetensors",
    ]


def test_batch_that_cannot_be_kept_is_said_and_raises_nothing(tmp_path):
    (tmp_path / "taken").write_text("a file where the folder should be")
    assert "taken" in keep(tmp_path / "taken", 8)


def test_lines_that_a_full_disk_refuses_follow_when_there_is_room(tmp_path):
    path = tmp_path / "missing" / "lines.jsonl"
    (tmp_path / "missing").write_text("in the way")
    file = Appender(path)
    file.write({"a": 1})
    (tmp_path / "missing").unlink()
    file.write({"a": 2})
    file.close()
    assert [entry["a"] for entry in read_lines(path, "a")] == [1, 2]
