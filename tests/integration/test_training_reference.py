"""Two workers under DeepSpeed compute what one plain PyTorch process does, written out here."""

import math
from typing import Literal

import pytest
import torch
from einops import rearrange, repeat

from animator.config import AnimatorConfig
from tests.unit.test_clips import write_shard
from training.animate import AnimateConfig
from training.config import (
    BatchConfig,
    CheckpointConfig,
    EmaConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from training.launch import train
from training.metrics import Quiet, read_metrics
from training.ray_workers import ray_session

pytestmark = pytest.mark.slow

STEPS, BATCH = 50, 4
SMALL = AnimatorConfig(
    height=64,
    width=64,
    num_frames=4,  # oneDNN's bf16 gradient of a temporal convolution is NaN for 2 of 4x4
    block_out_channels=(32, 32),
    num_attention_heads=(1, 1),
    cross_attention_dim=32,
    face_encoder_depth=1,
)


def config(shards, precision: Literal["fp32", "bf16"] = "fp32", lr=5e-4) -> TrainConfig:
    return TrainConfig(
        task=AnimateConfig(shards=str(shards), animator=SMALL),
        optim=OptimConfig(samples=STEPS * BATCH, lr=lr, warmup_samples=40, schedule="cosine"),
        batch=BatchConfig(global_batch=BATCH, micro_batch=1),
        checkpoint=CheckpointConfig(every_samples=10_000),
        ema=EmaConfig(half_life=40),
        run=RunConfig(
            num_workers=2,
            threads_per_worker=1,
            use_gpu=False,
            track=False,
            precision=precision,
            max_failures=0,
        ),
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder, work = tmp_path_factory.mktemp("shards"), tmp_path_factory.mktemp("work")
    write_shard(folder, work, 0, {"one_000": 30, "two_000": 24})
    return folder


def plain_losses(given: TrainConfig) -> list[float]:
    """The same run as a plain PyTorch loop: eq. 25 over EDM's preconditioning, AdamW, one process.

    Only what a sample is (`task.batch`), the frozen encoders and the network itself are the
    product's; schedule, preconditioning, weight, loss, clipping and update are written out.
    """
    task = given.build_task()
    torch.manual_seed(given.run.seed)
    model = task.build()
    optim = given.optim
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=optim.lr,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.01,
    )
    losses = []
    for step in range(STEPS):
        seen = step * BATCH
        rate = optim.lr * (0.5 + 0.5 * math.cos(math.pi * seen / (STEPS * BATCH)))
        rate *= min(1.0, (seen + 1) / 40)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        batch = task.batch(range(seen, seen + BATCH))
        frames = rearrange(batch["frames"].float() / 127.5 - 1, "b t h w c -> (b t) c h w")
        image = rearrange(batch["reference"].float() / 127.5 - 1, "b h w c -> b c h w")
        poses = rearrange(batch["poses"].float() / 127.5 - 1, "b t h w c -> (b t) c h w")
        clean = rearrange(task.encoder.codec.encode(frames), "(b t) ... -> b t ...", b=BATCH)
        noisy_image = image + 0.02 * batch["reference_noise"]
        reference = task.encoder.reference_latents(noisy_image)
        reference = reference * batch["keep_reference"][:, None, None, None]
        reference = repeat(reference, "b c h w -> b t c h w", t=SMALL.num_frames)
        token = task.encoder.image_token(batch["token_image"])
        token = token * batch["keep_image_token"][:, None, None]
        sigma = batch["sigma"][:, None, None, None, None]
        noisy = clean + sigma * batch["noise"]
        time_ids = torch.stack(
            [torch.tensor([fps - 1, 127.0, 0.02]) for fps in batch["fps"].tolist()]
        )
        denoised = model(
            torch.cat([noisy / (sigma**2 + 1).sqrt(), reference], dim=2),
            batch["sigma"].log() / 4,
            token,
            batch["face_embedding"],
            poses,
            time_ids,
        )
        squared = ((denoised - clean) * (1 + batch["face_mask"])).square().mean((1, 2, 3, 4))
        ratio = batch["sigma"] ** 2
        loss = (squared * (ratio + 1) / (ratio + 0.25)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def expected(shards) -> list[float]:
    """In fp32, which is what both precisions of the product are held to."""
    return plain_losses(config(shards))


@pytest.fixture(scope="module")
def cluster():
    """One Ray for both runs, which takes longer to start than a good part of a run."""
    with ray_session():
        yield


def trained_losses(given: TrainConfig, out) -> list[float]:
    train(given, out, progress=Quiet())
    return [record["loss"] for record in read_metrics(out / "metrics.jsonl")]


def test_two_workers_with_zero_2_equal_plain_pytorch(shards, expected, cluster, tmp_path):
    found = trained_losses(config(shards), tmp_path / "out")
    assert sum(expected[-15:]) < 0.9 * sum(expected[:15]), "nothing was learned"
    assert found == pytest.approx(expected, abs=1e-6)


def test_bf16_stays_near_plain_pytorch(shards, expected, cluster, tmp_path):
    found = trained_losses(config(shards, "bf16"), tmp_path / "out")
    assert found != expected
    assert found == pytest.approx(expected, rel=0.03)
