"""Every engine does what plain PyTorch does, alone and on two workers.

Run as a program it is one of two workers: rank, folder.
"""

import dataclasses
import os
import subprocess
import sys
from math import isfinite
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from toy_task import toy_config

from training.ema import WeightAverage
from training.engine import convert_state, open_engine

SAMPLES, SIZE = 400, 8  # 50 steps
ENGINES = ["zero-1", "zero-2", "zero-3", "ddp"]
EVERY_ENGINE = [*ENGINES, "zero-1-bf16", "zero-2-bf16", "zero-3-bf16", "ddp-bf16"]


def make_config(kind, **task):
    config = toy_config(samples=SAMPLES, width=15, **task)  # an odd size: shares get padding
    engine, _, rest = kind.partition("-")
    stage = rest.partition("-")[0]
    run = dataclasses.replace(
        config.run,
        engine="deepspeed" if engine == "zero" else "ddp",
        zero_stage=int(stage) if engine == "zero" else 2,
        precision="bf16" if kind.endswith("bf16") else "fp32",
    )
    return dataclasses.replace(config, run=run)


def build(kind, *, converted=False, **task):
    config = make_config(kind, **task)
    toy = config.task.build_task(config.run.seed)
    return config, toy, open_engine(toy, config, torch.device("cpu"), converted=converted)


def accumulate(config, task, engine, start):
    """The gradients of one step, and the loss of each micro-batch."""
    share, micro = SIZE // engine.world, config.batch.micro_batch
    first = start + engine.rank * share
    return [
        engine.backward(task.batch(range(position, position + micro)), position)[0]
        for position in range(first, first + share, micro)
    ]


def train(config, task, engine, start, end, average=None):
    """The loss and the gradient norm of each step."""
    history = []
    for position in range(start, end, SIZE):
        losses = accumulate(config, task, engine, position)
        norm = engine.grad_norm()
        history.append((engine.average({"loss": losses})[0]["loss"], norm))
        engine.step(config.optim.learning_rate(position))
        if average is not None:
            average.update(0.9)
    return history


def plain_history(config):
    """Losses, norms and averaged weights of one process in plain PyTorch."""
    task, optim = config.task.build_task(config.run.seed), config.optim
    torch.manual_seed(config.run.seed)
    model = task.build()
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    mean = {name: p.detach().clone() for name, p in weights.items()}
    optimizer = torch.optim.AdamW(
        weights.values(), betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
    )
    history = []
    for start in range(0, SAMPLES, SIZE):
        optimizer.param_groups[0]["lr"] = optim.learning_rate(start)
        optimizer.zero_grad()
        loss, _ = task.loss(model, task.batch(range(start, start + SIZE)))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(weights.values(), optim.clip)
        optimizer.step()
        history.append((loss.item(), norm.item()))
        for name, value in weights.items():
            mean[name] = 0.9 * mean[name] + 0.1 * value.detach()
    return history, mean


def tensors(engine, folder):
    """Every tensor of weights and optimiser, by file and place in it."""
    engine.snapshot()(folder)
    found = {}

    def collect(node, place):
        if isinstance(node, torch.Tensor):
            found[place] = node
        elif isinstance(node, dict):
            for key, value in node.items():
                collect(value, f"{place}/{key}")
        elif isinstance(node, list | tuple):
            for index, value in enumerate(node):
                collect(value, f"{place}/{index}")

    for path in sorted(folder.rglob("*.pt")):
        collect(torch.load(path, weights_only=False), path.name)
    assert len(found) > 4
    return found


@pytest.fixture(autouse=True, scope="module")
def one_process():
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


@pytest.mark.parametrize("kind", ENGINES)
def test_losses_norms_and_average_equal_plain_pytorch(kind):
    config, task, engine = build(kind)
    average = WeightAverage(engine.model, keep=True)
    history = train(config, task, engine, 0, SAMPLES, average)
    expected, mean = plain_history(config)
    assert torch.tensor(history) == pytest.approx(torch.tensor(expected), abs=1e-6)
    state = average.state()
    assert state.keys() == mean.keys()
    for name, value in mean.items():
        assert torch.allclose(state[name], value, atol=1e-6), name


@pytest.mark.parametrize("kind", EVERY_ENGINE)
def test_skipped_step_leaves_weights_and_moments_bit_equal(kind, tmp_path):
    config, task, engine = build(kind, nan_sample=20)
    train(config, task, engine, 0, 16)
    before = tensors(engine, tmp_path / "before")
    accumulate(config, task, engine, 16)
    assert not isfinite(engine.grad_norm())
    engine.skip()
    accumulate(config, task, engine, 24)
    good = engine.grad_norm()
    assert isfinite(good)
    engine.skip()
    after = tensors(engine, tmp_path / "after")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert train(config, task, engine, 24, 32)[0][1] == good  # nothing of a skipped step is left
    assert not all(torch.equal(v, before[n]) for n, v in tensors(engine, tmp_path / "x").items())


@pytest.mark.parametrize("kind", EVERY_ENGINE)
def test_snapshot_written_later_continues_from_when_it_was_taken(kind, tmp_path):
    config, task, engine = build(kind, dropout=0.2)
    train(config, task, engine, 0, 40)
    write = engine.snapshot()
    whole = train(config, task, engine, 40, 80)
    write(tmp_path)
    engine.load(tmp_path)
    assert train(config, task, engine, 40, 80) == whole


def test_numbers_and_flags_are_taken_together():
    _, _, engine = build("ddp")
    nan = torch.tensor(torch.nan)
    numbers = {"loss": [torch.tensor(1.0), torch.tensor(3.0)], "seldom": [torch.tensor(5.0), nan]}
    means = {"loss": 2.0, "seldom": 5.0}
    assert engine.average(numbers, [4, 2**40], done=True) == (means, [4, 2**40], True, False)
    assert engine.average(numbers, stop=True)[1:] == ([], False, True)
    means, *_ = engine.average({"loss": [nan, torch.tensor(3.0)]})
    assert not isfinite(means["loss"])


@pytest.mark.parametrize("kind", ["zero-2", "ddp"])
def test_folder_without_a_state_is_refused(kind, tmp_path):
    _, _, engine = build(kind)
    with pytest.raises(ValueError, match="holds no optimiser state"):
        engine.load(tmp_path)


def test_conversion_that_fails_or_takes_too_long_is_said(tmp_path):
    with pytest.raises(ValueError, match="cannot convert"):
        convert_state(tmp_path / "nothing", tmp_path / "to")
    with pytest.raises(ValueError, match=r"did not convert .* within 0 s"):
        convert_state(tmp_path / "nothing", tmp_path / "to", limit=0.01)


def test_two_workers_equal_one_and_their_state_loads_on_two_and_on_one(tmp_path):
    expected, _ = plain_history(make_config("ddp"))
    command = [sys.executable, __file__, str(tmp_path)]
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    workers = [subprocess.Popen([*command, str(rank)], env=environment) for rank in (0, 1)]
    try:
        assert [worker.wait(240) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    for kind in ENGINES:
        history, again = torch.load(tmp_path / f"{kind}.pt")
        assert torch.tensor(history) == pytest.approx(torch.tensor(expected), abs=1e-6)
        assert again == history[25:]
    for kind in ("zero-3", "ddp"):
        folder, converted = tmp_path / kind, kind != "ddp"
        if converted:
            folder = tmp_path / "converted"
            convert_state(tmp_path / kind, folder)
        config, task, engine = build(kind, converted=converted)
        engine.load(folder)
        history = train(config, task, engine, SAMPLES // 2, SAMPLES)
        assert torch.tensor(history) == pytest.approx(torch.tensor(expected[25:]), abs=1e-6)


def work(folder, rank):
    """One of two workers: train, write half-way, read that back with new engines."""
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    for kind in ENGINES:
        config, task, engine = build(kind)
        history = train(config, task, engine, 0, SAMPLES // 2)
        write = engine.snapshot()
        history += train(config, task, engine, SAMPLES // 2, SAMPLES)
        write(folder / kind)
        engine.barrier()
        _, _, other = build(kind)
        other.load(folder / kind)
        again = train(config, task, other, SAMPLES // 2, SAMPLES)
        if rank == 0:
            torch.save((history, again), folder / f"{kind}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]))
