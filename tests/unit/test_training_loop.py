import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import toy_task
from safetensors.torch import load_file
from toy_task import ToyConfig, reference_losses, toy_config

from training.checkpoint import newest_checkpoint
from training.config import EmaConfig, GuardConfig, read_config
from training.launch import train
from training.loader import BatchLoader, micro_batches, spans
from training.metrics import (
    TIMINGS,
    MetricsLog,
    MetricsTail,
    Quiet,
    format_line,
    read_lines,
    read_metrics,
)
from training.step_clock import StepClock
from training.task import Stopped, TrainingError, mix_seed, sample_generator


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
    records = [
        {k: v for k, v in record.items() if k not in TIMINGS}
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
    taken = [record["samples"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert taken == [[[first, first + 7]] for first in range(0, 96, 8)]


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
    config = toy_config(dropout=0.2, background=False, **accident)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "broken")
    assert len(read_metrics(tmp_path / "broken" / "metrics.jsonl")) > 8  # past the checkpoint
    notes = Notes()
    run(config, tmp_path / "broken", notes)
    assert "Continuing from 64 samples." in notes.texts
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")


def test_run_from_damaged_checkpoint_continues_from_the_one_before(tmp_path):
    accident = {"accident": "stop", "accident_at": 56, "accident_marker": str(tmp_path / "m")}
    config = toy_config(samples=64, every=16, background=False, **accident)
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


def test_step_without_a_finite_loss_is_left_out_and_its_batch_kept(tmp_path):
    notes = Notes()
    run(toy_config(nan_sample=20), tmp_path, notes)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["skipped"] for r in records] == [0, 0] + [1] * 10
    assert records[2]["loss"] is None
    assert all(record["loss"] is not None for record in records[3:])
    assert "Left out step 3 (samples 16 to 23): the loss is nan." in notes.texts
    batch = load_file(tmp_path / "left-out" / "samples-000000000016-rank-0.safetensors")
    assert batch["x"].shape == (8, 4)
    assert batch["y"].isnan().flatten().tolist() == [s in (20, 21) for s in range(16, 24)]


def test_left_out_step_changes_no_weight(tmp_path):
    last = {}
    for name, samples, nan_from in (("short", 16, -1), ("long", 48, 16)):
        config = toy_config(
            samples=samples, nan_from=nan_from, guard=GuardConfig(max_in_a_row=20), every=8
        )
        config = dataclasses.replace(
            config,
            optim=dataclasses.replace(config.optim, schedule="constant"),
            ema=EmaConfig(half_life=0),  # the average is the weights
        )
        summary = run(config, tmp_path / name)
        last[name] = newest_checkpoint(tmp_path / name / "checkpoints").average()
        assert summary.loss == read_metrics(tmp_path / name / "metrics.jsonl")[1]["loss"]
    assert read_metrics(tmp_path / "long" / "metrics.jsonl")[-1]["skipped"] == 4
    assert all(last["long"][name].equal(value) for name, value in last["short"].items())


def test_run_that_leaves_out_one_step_after_the_other_stops_and_names_them(tmp_path):
    with pytest.raises(
        TrainingError,
        match=r"step 7 \(samples 48 to 55\) the loss is nan, and 4 steps before .*left-out",
    ):
        run(toy_config(nan_from=16), tmp_path)


def test_interrupted_run_remembers_what_its_guard_knew(tmp_path):
    guard = GuardConfig(spike=50.0, settle_steps=3)
    whole = toy_config(guard=guard, spike_sample=74)
    run(whole, tmp_path / "whole")
    assert [r["skipped"] for r in outcome(tmp_path / "whole")[0]][8:] == [0, 1, 1, 1]
    accident = {"accident": "stop", "accident_at": 83, "accident_marker": str(tmp_path / "marker")}
    broken = toy_config(guard=guard, spike_sample=74, every=64, background=False, **accident)
    with pytest.raises(KeyboardInterrupt):
        run(broken, tmp_path / "broken")
    run(broken, tmp_path / "broken")
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")


def test_replaced_clip_is_named_once(tmp_path):
    notes = Notes()
    run(toy_config(replaced_sample=20), tmp_path, notes)
    assert notes.texts.count("Clip clip-20 was replaced: it is torn") == 1
    entries = read_lines(tmp_path / "left-out" / "clips.jsonl", "key")
    assert [(e["key"], e["reason"]) for e in entries] == [("clip-20", "it is torn")]


class Asking(Notes):
    """Sends this process signals once a step is shown, as a scheduler or a user would."""

    def __init__(self, *signals, at=4):
        super().__init__()
        self.signals, self.at = list(signals), at

    def step(self, record):
        if record["step"] >= self.at and self.signals:
            os.kill(os.getpid(), self.signals.pop(0))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_run_that_is_asked_to_end_leaves_a_checkpoint_and_continues_to_the_same_bits(
    tmp_path, number
):
    run(toy_config(), tmp_path / "whole")
    before = signal.getsignal(number)
    slow = toy_config(delay=0.05)
    with pytest.raises(Stopped, match=r"Stopped at (\d+) samples, with a checkpoint") as stopped:
        run(slow, tmp_path / "out", asking := Asking(number))
    assert signal.getsignal(number) == before
    assert any("Stopping with a checkpoint" in text for text in asking.texts)
    seen = int(str(stopped.value).split()[2])
    assert newest_checkpoint(tmp_path / "out" / "checkpoints").samples_seen == seen < 96
    notes = Notes()
    run(toy_config(), tmp_path / "out", notes)
    assert f"Continuing from {seen} samples." in notes.texts
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")


def test_second_interrupt_stops_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(toy_config(delay=0.5), tmp_path, Asking(signal.SIGINT, signal.SIGINT, at=1))


def test_checkpoint_in_the_background_is_the_one_that_is_waited_for(tmp_path):
    for background in (True, False):
        run(toy_config(dropout=0.2, every=8, background=background), tmp_path / str(background))
    assert outcome(tmp_path / "True") == outcome(tmp_path / "False")
    for name in ("samples-000000000088", "samples-000000000096"):
        files = [
            json.loads((tmp_path / str(b) / "checkpoints" / name / "train.json").read_text())
            for b in (True, False)
        ]
        averages = [record["files"]["ema.safetensors"] for record in files]
        assert averages[0] == averages[1]


def driver(out, *options):
    command = [sys.executable, toy_task.__file__, str(out), "--workers", "1", "--local", *options]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout


def test_checkpoints_that_do_not_fit_are_given_up_and_the_run_goes_on(tmp_path):
    wide = {"width": 20_000}  # 80 kB a tensor
    run(toy_config(**wide), tmp_path / "whole")
    accident = {"accident": "stop", "accident_at": 43, "accident_marker": str(tmp_path / "marker")}
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(toy_config(background=False, **wide, **accident), out)
    code, said = driver(out, "--width", "20000", "--file-limit", "50000")
    assert code == 1
    lines = said.splitlines()
    assert lines[0] == "Continuing from 32 samples."
    assert lines[1].startswith("A checkpoint could not be written (OSError: [Errno 27] File too l")
    assert lines[1].endswith("the newest good one is samples-000000000032. Training goes on.")
    assert lines[-1].startswith("TrainingError: The last checkpoint could not be written (")
    assert read_metrics(out / "metrics.jsonl")[-1]["samples_seen"] == 96
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["samples-000000000032"]
    run(toy_config(**wide), out)
    assert outcome(out) == outcome(tmp_path / "whole")


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


def test_spans_tell_what_was_taken_twice_or_left_out():
    assert spans([8, 10, 12, 14], 2) == [[8, 15]]
    assert spans([8, 8, 12], 2) == [[8, 9], [8, 9], [12, 13]]
    assert spans([], 2) == []


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
        "mfu": 0.412, "skipped": 0, "eta": 990.0,
    }  # fmt: skip
    assert format_line(record, 1000) == (
        "step 00010/01000 (1.0%) | loss 0.1234 | grad 1.2 | lr 1.0e-03 | 3.1 samples/s | mfu 41.2% "
        "| data 2% | mem 1.2 GB | pos 1.25 | eta 16:30"
    )
    left_out = {**record, "loss": None, "grad_norm": None, "skipped": 3, "mfu": None}
    assert format_line(left_out, 1000) == (
        "step 00010/01000 (1.0%) | loss – | grad – | lr 1.0e-03 | 3.1 samples/s "
        "| data 2% | mem 1.2 GB | pos 1.25 | eta 16:30 | left out 3"
    )


def test_seconds_of_all_steps_are_those_of_the_run():
    started = time.perf_counter()
    clock = StepClock(torch.device("cpu"), steps=4, samples=2, flops=50.0, peak=1000.0)
    records = []
    for _ in range(4):
        time.sleep(0.03)  # the checkpoint of the step before
        clock.begin()
        for part in ("compute", "optimiser"):
            time.sleep(0.02)
            clock.lap(part)
        time.sleep(0.01)
        records.append(clock.end(data_wait=0.015))
    whole = time.perf_counter() - started
    assert sum(r["dt"] for r in records) == pytest.approx(whole, rel=0.02)
    for record in records:
        parts = ("data_wait", "compute", "optimiser", "other")
        assert sum(record[part] for part in parts) == pytest.approx(record["dt"])
        assert record["other"] >= 0.04
        assert record["mfu"] == pytest.approx(50 * 2 / record["dt"] / 1000)
        assert record.keys() == TIMINGS
    assert [r["eta"] > 0 for r in records] == [True, True, True, False]
