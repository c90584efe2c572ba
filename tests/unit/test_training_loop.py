import dataclasses
import json
import threading
import time

import pytest
import torch
from safetensors.torch import load_file
from toy_task import ToyConfig, reference_losses, toy_config

from training.checkpoint import newest_checkpoint
from training.config import read_config
from training.launch import train
from training.loop import BatchLoader, micro_batches
from training.metrics import MetricsLog, MetricsTail, Quiet, format_line, read_metrics
from training.task import TrainingError, mix_seed, sample_generator


class Notes(Quiet):
    def __init__(self):
        self.texts, self.records = [], []

    def note(self, text):
        self.texts.append(text)

    def step(self, record):
        self.records.append(record)


def run(config, out, progress=None):
    return train(config, out, progress=progress or Quiet(), local=True)


def outcome(out):
    """Everything of a run that must not depend on how often it was interrupted."""
    timings = {"dt", "data_wait", "samples_per_second", "memory_gb"}
    records = [
        {k: v for k, v in record.items() if k not in timings}
        for record in read_metrics(out / "metrics.jsonl")
    ]
    weights = load_file(out / "model" / "model.safetensors")
    return records, {name: value.tolist() for name, value in weights.items()}


def test_losses_equal_plain_adamw(tmp_path):
    config = toy_config()
    summary = run(config, tmp_path)
    losses = [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert losses == pytest.approx(reference_losses(config), abs=1e-6)
    assert (summary.steps, summary.samples_seen, summary.loss) == (12, 96, losses[-1])


def test_released_model_is_the_average_and_keeps_frozen_parts(tmp_path):
    config = toy_config()
    summary = run(config, tmp_path)
    released = load_file(summary.model / "model.safetensors")
    average = newest_checkpoint(tmp_path / "checkpoints").average()
    assert torch.equal(released["0.weight"], average["0.weight"])
    torch.manual_seed(config.run.seed)
    initial = config.task.build_task(0).build().state_dict()
    assert torch.equal(released["4.weight"], initial["4.weight"])
    assert "4.weight" not in average
    assert not torch.equal(released["0.weight"], initial["0.weight"])


def test_interrupted_run_continues_to_the_same_bits(tmp_path):
    config = toy_config(dropout=0.2)
    run(config, tmp_path / "whole")
    accident = {"accident": "stop", "accident_at": 75, "accident_marker": str(tmp_path / "marker")}
    config = toy_config(dropout=0.2, **accident)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "broken")
    assert len(read_metrics(tmp_path / "broken" / "metrics.jsonl")) > 8  # past the checkpoint
    notes = Notes()
    run(config, tmp_path / "broken", notes)
    assert "Continuing from 64 samples." in notes.texts
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")


def test_run_from_damaged_checkpoint_continues_from_the_one_before(tmp_path):
    config = toy_config(
        samples=64, every=16, accident="stop", accident_at=56, accident_marker=str(tmp_path / "m")
    )
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "broken")
    newest = newest_checkpoint(tmp_path / "broken" / "checkpoints")
    assert newest.samples_seen == 48
    (newest.folder / "ema.safetensors").write_bytes(b"torn")
    notes = Notes()
    run(config, tmp_path / "broken", notes)
    assert "ema.safetensors has 4 bytes" in notes.texts[0]
    assert notes.texts[1] == "Continuing from 32 samples."
    run(toy_config(samples=64, every=16), tmp_path / "whole")
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")


def test_finished_run_returns_at_once(tmp_path):
    first = run(toy_config(samples=16), tmp_path)
    before = (tmp_path / "summary.json").stat().st_mtime_ns
    assert run(toy_config(samples=16), tmp_path) == first
    assert (tmp_path / "summary.json").stat().st_mtime_ns == before


def test_finished_run_with_other_settings_is_refused(tmp_path):
    run(toy_config(samples=16), tmp_path)
    with pytest.raises(ValueError, match=r"optim.lr: 0.01 → 0.02"):
        run(toy_config(samples=16, lr=2e-2), tmp_path)


def test_loss_that_is_not_a_number_stops_and_names_the_step(tmp_path):
    with pytest.raises(TrainingError, match=r"loss is nan at step 3 \(samples 16 to 23\)"):
        run(toy_config(nan_sample=20), tmp_path)


def test_unreadable_sample_is_reported_from_the_loading_thread(tmp_path):
    with pytest.raises(ValueError, match="sample 20 is not readable"):
        run(toy_config(bad_sample=20), tmp_path)


def test_second_run_in_the_same_folder_is_refused(tmp_path):
    config = toy_config(samples=160, delay=0.02)
    thread = threading.Thread(target=run, args=(config, tmp_path))
    thread.start()
    while not (tmp_path / "config.json").exists():
        time.sleep(0.01)
    with pytest.raises(ValueError, match="in use by another run"):
        run(config, tmp_path)
    thread.join()


def test_bf16_averages_the_fp32_masters(tmp_path):
    config = toy_config(samples=64, lr=1e-5)  # steps smaller than bf16 can resolve
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, precision="bf16"))
    summary = run(config, tmp_path)
    weight = load_file(summary.model / "model.safetensors")["0.weight"]
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, weight.bfloat16().float())


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_position_is_seen_once_whatever_the_world_size(world):
    config = toy_config(micro=1)
    seen = [s for rank in range(world) for s in micro_batches(config, rank, world, start=16)]
    assert sorted(seen) == list(range(16, 96))
    # and each step's batch is the same set of samples
    firsts = [list(micro_batches(config, rank, world, start=16)) for rank in range(world)]
    share = 8 // world
    assert {s for part in firsts for s in part[:share]} == set(range(16, 24))


def test_loader_builds_a_bounded_number_ahead():
    built = []

    class Recording:
        def batch(self, samples):
            built.append(list(samples))
            return {"x": torch.zeros(1)}

    class OneWorker:
        rank, world, accumulation, device = 0, 1, 4, torch.device("cpu")

    with BatchLoader(Recording(), toy_config(), OneWorker(), 0) as loader:  # type: ignore[arg-type]
        time.sleep(0.1)
        assert built == [[0, 1], [2, 3]]
        assert [first for first, _ in loader.step()] == [0, 2, 4, 6]


def test_randomness_belongs_to_the_sample():
    draws = [torch.randn(3, generator=sample_generator(1, 7)) for _ in range(2)]
    assert torch.equal(*draws)
    assert len({mix_seed(a, b) for a in range(20) for b in range(20)}) == 400


def test_learning_rate_is_a_function_of_samples():
    optim = dataclasses.replace(toy_config().optim, samples=1000, warmup_samples=100, lr=1.0)
    assert optim.learning_rate(0) < 0.02
    assert optim.learning_rate(500) == pytest.approx(0.5)
    assert optim.learning_rate(1000) == pytest.approx(0.0)
    constant = dataclasses.replace(optim, schedule="constant")
    assert constant.learning_rate(100) == constant.learning_rate(999) == 1.0


def test_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="expected a multiple of 6"):
        toy_config(workers=3)


def test_settings_can_be_read_back(tmp_path):
    config = toy_config(samples=16)
    run(config, tmp_path)
    assert read_config(tmp_path / "config.json", {"toy": ToyConfig}) == config


def test_log_is_cut_at_the_checkpoint_and_at_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"samples_seen": s}) for s in (8, 16, 24, 32)]
    path.write_text("\n".join(lines) + '\n{"samples_s')
    assert len(read_metrics(path)) == 4
    with MetricsLog(path, 16) as log:
        log.write({"samples_seen": 24, "again": True})
    assert [record["samples_seen"] for record in read_metrics(path)] == [8, 16, 24]
    assert read_metrics(path)[-1]["again"]


def test_log_is_never_written_by_two(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, 0), pytest.raises(ValueError, match="written by another run"):
        MetricsLog(path, 0, patience=0.1)


def test_tail_follows_a_log_that_is_cut_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    assert list(tail.new()) == []
    with MetricsLog(path, 0) as log:
        for samples in (8, 16, 24):
            log.write({"samples_seen": samples})
    assert [r["samples_seen"] for r in tail.new()] == [8, 16, 24]
    with MetricsLog(path, 8) as log:
        log.write({"samples_seen": 16})
        assert [r["samples_seen"] for r in tail.new()] == []  # cut below what was read
        log.write({"samples_seen": 24})
        assert [r["samples_seen"] for r in tail.new()] == [24]


def test_line_says_where_the_run_is():
    record = {
        "step": 10, "loss": 0.12341, "grad_norm": 1.23, "lr": 1e-3, "samples_per_second": 3.14,
        "data_wait": 0.02, "dt": 1.0, "memory_gb": 1.2, "epoch": 1.25,
    }  # fmt: skip
    assert format_line(record, 1000) == (
        "step 00010/01000 (1.0%) | loss 0.1234 | grad 1.2 | lr 1.0e-03 | 3.1 samples/s | data 2% "
        "| mem 1.2 GB | pos 1.25 | eta 16:30"
    )
