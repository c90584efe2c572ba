"""The animator goes on with other numbers of workers: no sample twice, none left out."""

import dataclasses
import itertools
from pathlib import Path

import pytest

from animator.config import AnimatorConfig
from tests.unit.test_clips import write_shard
from training.animate import AnimateConfig
from training.checkpoint import newest_checkpoint
from training.config import BatchConfig, CheckpointConfig, EmaConfig, OptimConfig, RunConfig
from training.config import TrainConfig as Config
from training.launch import train
from training.metrics import Quiet, read_metrics
from training.ray_workers import ray_session

BATCH = 4
LEGS = ((2, 12), (1, 24), (2, 36))  # workers, and the samples that are seen when they end


class Notes(Quiet):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder, work = tmp_path_factory.mktemp("shards"), tmp_path_factory.mktemp("work")
    write_shard(folder, work, 0, {"one_000": 20, "two_000": 16, "three_000": 12})
    animator = AnimatorConfig(
        height=64,
        width=64,
        num_frames=2,
        block_out_channels=(32, 32),
        num_attention_heads=(1, 1),
        cross_attention_dim=32,
        face_encoder_depth=1,
    )
    return Config(
        task=AnimateConfig(shards=str(folder), animator=animator, drop_pose=0.1, drop_face=0.1),
        optim=OptimConfig(samples=LEGS[-1][1], lr=5e-4, warmup_samples=16),
        batch=BatchConfig(global_batch=BATCH, micro_batch=1),
        checkpoint=CheckpointConfig(every_samples=1000),
        ema=EmaConfig(half_life=16),
        run=RunConfig(
            threads_per_worker=1, use_gpu=False, track=False, zero_stage=2, max_failures=0
        ),
    )


def leg(config: Config, out: Path, workers: int, samples: int) -> list[str]:
    """Train up to so many samples; what was said on the way."""
    notes = Notes()
    config = dataclasses.replace(
        config,
        optim=dataclasses.replace(config.optim, samples=samples),
        run=dataclasses.replace(config.run, num_workers=workers),
    )
    train(config, out, progress=notes, local=workers == 1)
    return notes.texts


def test_two_then_one_then_two_workers_use_every_sample_once(config, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    train(config, whole, progress=Quiet(), local=True)
    said = []
    with ray_session():
        for workers, samples in LEGS:
            said.append(leg(config, out, workers, samples))
            latest = newest_checkpoint(out / "checkpoints")
            assert latest is not None
            assert latest.world == workers
    assert any("2 workers' state converted for 1." in text for text in said[1])
    assert any("1 workers' state converted for 2." in text for text in said[2])

    undisturbed, steps = read_metrics(whole / "metrics.jsonl"), read_metrics(out / "metrics.jsonl")
    taken = [
        sample
        for step in steps
        for first, last in step["samples"]
        for sample in range(first, last + 1)
    ]
    assert taken == list(range(LEGS[-1][1]))
    assert [step["samples"] for step in steps] == [step["samples"] for step in undisturbed]
    # Gradients of two workers are added in another order, which is all that may differ.
    for name in ("loss", "grad_norm"):
        found, expected = ([step[name] for step in run] for run in (steps, undisturbed))
        assert found == pytest.approx(expected, abs=2e-6)
    losses = [step["loss"] for step in undisturbed]
    assert min(abs(a - b) for a, b in itertools.combinations(losses, 2)) > 1e-5  # tells them apart
