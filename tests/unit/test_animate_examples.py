"""How the animator's examples are drawn: from pixels or latents, in buckets, by many threads."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from animator.config import AnimatorConfig
from animator.keypoints import SimilarityRange
from pipelines.curation.ledger import RunJournal
from pipelines.encode.config import EncodeConfig
from pipelines.encode.encoders import Encoders
from pipelines.encode.model import choose_encoders
from pipelines.encode.plan import write_settings
from pipelines.encode.worker import Job, encode_shard
from pipelines.schema import ShardError, shard_name
from tests.unit.encode_shards import moving_stripes, write_clips
from tests.unit.fashion_shards import write_fashion
from training.animate import AnimateConfig, AnimateTask
from training.clip_sizes import bucket_of
from training.frames import ByteCache, FramedClips
from training.task import TrainingError

SMALL = AnimatorConfig(
    height=64,
    width=64,
    num_frames=3,
    block_out_channels=(32, 32),
    num_attention_heads=(1, 1),
    cross_attention_dim=128,  # as the tiny model's image tokens have it
    face_encoder_depth=1,
    noise_augmentation=0.0,  # which latents cannot have
)
NAME = shard_name(0)
FACE = {
    "boxes": np.array([[0.3, 0.1, 0.7, 0.5]]),
    "landmarks": np.full((1, 5, 2), 0.4),
    "score": np.ones(1),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips with a face, one of them wide."""
    folder = tmp_path_factory.mktemp("data") / "shards"
    clips = {
        "aa_000": moving_stripes(14, 0),
        "bb_000": moving_stripes(9, 1),
        "cc_000": moving_stripes(12, 2, (64, 128)),
    }
    write_clips(folder, NAME, clips, faces=FACE)
    return folder


def encoded(source: Path, out: Path, **settings) -> Path:
    choice = choose_encoders(EncodeConfig(**{"size": "64x64", **settings}), None, "cpu")
    out.mkdir()
    write_settings(out, choice)
    journal, _ = RunJournal.create(out)
    encode_shard(Job(source=source, out=out, choice=choice), NAME, journal, Encoders(choice))
    journal.close()
    return out


@pytest.fixture(scope="module")
def latents(source: Path) -> Path:
    return encoded(source, source.parent / "latents")


def task_of(source: Path, batch: int = 1, **changes) -> AnimateTask:
    config = dataclasses.replace(AnimateConfig(shards=str(source), animator=SMALL), **changes)
    return config.build_task(seed=3, global_batch=batch)


def test_latents_give_the_loss_that_pixels_give(source, latents):
    pixels, cached = task_of(source), task_of(source, latents=str(latents))
    torch.manual_seed(0)
    model = pixels.build()
    samples = [0, 1, 2, 3]
    one, other = pixels.batch(samples), cached.batch(samples)
    assert "frames" not in other
    for name in ("sigma", "noise", "poses", "face_mask", "face_embedding", "keep_reference"):
        assert torch.equal(one[name], other[name]), name
    for batch in (one, other):  # every quarter of the noise levels
        batch["sigma"] = torch.tensor([0.3, 1.5, 4.0, 20.0])
    (expected, numbers), (loss, found) = pixels.loss(model, one), cached.loss(model, other)
    assert loss.item() == pytest.approx(expected.item(), rel=2e-3)
    for name, value in numbers.items():
        assert float(found[name]) == pytest.approx(float(value), rel=5e-3), name
    assert cached.fingerprint != pixels.fingerprint


def test_stored_image_tokens_stand_for_the_nearest_frames(source, latents, tmp_path):
    folder = encoded(source, tmp_path / "tokens", image_tokens=True, samples_per_second=8)
    plain, tokens = task_of(source, latents=str(latents)), task_of(source, latents=str(folder))
    one, other = plain.batch(range(6)), tokens.batch(range(6))
    expected = plain.encoder.image_token(one["token_image"])
    torch.testing.assert_close(other["image_token"], expected, atol=2e-3, rtol=2e-3)
    assert tokens.examples.needs_encoder  # for the thumbnail of the face


def test_latents_of_other_clips_or_another_framing_are_refused(source, latents, tmp_path):
    write_clips(tmp_path / "other", NAME, {"dd_000": moving_stripes(9, 7)})
    with pytest.raises(ShardError, match="animator encode"):
        task_of(tmp_path / "other", latents=str(latents))
    with pytest.raises(ValueError, match=r"--fit pad.*task\.framing is crop"):
        task_of(source, latents=str(latents), framing="crop")
    wide = dataclasses.replace(SMALL, width=128)
    with pytest.raises(ValueError, match=r"latents of frames of 64x64.*64x128"):
        task_of(source, latents=str(latents), animator=wide)
    other = dataclasses.replace(SMALL, cross_attention_dim=32)
    tokens = encoded(source, tmp_path / "tokens", image_tokens=True)
    with pytest.raises(ValueError, match="image_token dim 128, but the model has 32"):
        task_of(source, latents=str(tokens), animator=other)


def test_threads_get_what_one_thread_gets(source, latents):
    """Where whole clips are kept and where frames are read as they are asked for."""
    for settings in ({}, {"latents": str(latents)}):
        task = task_of(source, **settings)
        expected = [task.batch([sample]) for sample in range(8)]
        for cache_bytes in (1 << 30, 0):
            other = task_of(source, **settings)
            sizes = [other.examples.framed.size_of(i) for i in range(3)]
            other.examples.framed = FramedClips(
                other.examples.clips, (64, 64), "pad", cache_bytes, sizes=sizes
            )
            with ThreadPoolExecutor(8) as pool:
                found = list(pool.map(lambda s, task=other: task.batch([s]), range(8)))
            for one, two in zip(expected, found, strict=True):
                assert one.keys() == two.keys()
                for name, value in one.items():
                    assert torch.equal(value, two[name]), name


def test_a_value_is_made_once_however_many_ask(source):
    made = []
    cache: ByteCache[int] = ByteCache(10, lambda value: value)

    def make() -> int:
        made.append(1)
        return 4

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: cache.get("a", make), range(64))) == {4}
    assert len(made) == 1
    cache.get("b", make)
    cache.get("a", make)  # the one used last stays
    cache.get("c", make)
    assert len(made) == 3
    cache.get("a", make)
    assert len(made) == 3
    cache.get("b", make)
    assert len(made) == 4

    def fail() -> int:
        raise ShardError("no")

    with pytest.raises(ShardError):
        cache.get("d", fail)
    assert cache.get("d", make) == 4


def test_each_clip_is_trained_at_the_size_of_its_shape(source):
    sizes = ("64x64", "32x64", "64x128")
    task = task_of(source, batch=2, buckets=sizes)
    assert task.examples.buckets == {(64, 64): [0, 1], (64, 128): [2]}
    shapes = set()
    for step in range(5):
        batch = task.batch([2 * step, 2 * step + 1])
        shapes.add(tuple(batch["frames"].shape[2:4]))
        assert batch["noise"].shape[-2:] == tuple(s // 8 for s in batch["frames"].shape[2:4])
    assert shapes == {(64, 64), (64, 128)}
    torch.manual_seed(0)
    assert torch.isfinite(task.loss(task.build(), batch)[0])
    one = task_of(source)
    assert one.flops < task.flops < 2 * one.flops
    with pytest.raises(ValueError, match="bucket of 40x64"):
        task_of(source, buckets=("40x64",))
    with pytest.raises(ValueError, match="HEIGHTxWIDTH"):
        task_of(source, buckets=("wide",))


def test_clips_encoded_in_their_own_shapes_make_the_buckets(source, tmp_path):
    folder = encoded(source, tmp_path / "native", size="native")
    task = task_of(source, batch=2, latents=str(folder))
    assert task.examples.buckets == {(64, 32): [0, 1], (64, 128): [2]}
    (tmp_path / "native" / "encode.json").unlink()  # then each clip says for itself
    again = task_of(source, batch=2, latents=str(folder))
    assert again.examples.buckets == task.examples.buckets
    shapes = {task.batch([s, s + 1])["latents"].shape[-2:] for s in range(0, 12, 2)}
    assert shapes == {(8, 4), (8, 16)}


def test_the_bucket_is_of_the_nearest_shape_and_the_largest_that_is_filled():
    buckets = ((512, 512), (256, 256), (576, 1024), (1024, 576))
    assert bucket_of((1080, 1920), buckets) == (576, 1024)
    assert bucket_of((1920, 1080), buckets) == (1024, 576)
    assert bucket_of((600, 600), buckets) == (512, 512)
    assert bucket_of((300, 300), buckets) == (256, 256)
    assert bucket_of((100, 110), buckets) == (256, 256)


def test_a_clip_that_cannot_be_read_is_replaced_and_named(tmp_path):
    clips = {f"{name}_000": moving_stripes(9, 1) for name in ("aa", "bb", "cc")}
    write_clips(tmp_path / "shards", NAME, clips, damaged=["bb_000"])
    task = task_of(tmp_path / "shards")
    torch.manual_seed(0)
    model = task.build()
    with ThreadPoolExecutor(4) as pool:
        batches = list(pool.map(lambda s: task.batch([s]), range(9)))
    replaced = [bool(batch["replaced"]) for batch in batches]
    bad = task.examples.clips.index("bb_000")
    assert replaced == [task.examples.order.clip(sample) == bad for sample in range(9)]
    sample = replaced.index(True)
    assert task.loss(model, task.batch([sample, sample + 1]))[1]["replaced"] == 0.5
    again = task_of(tmp_path / "shards").batch([sample])
    assert torch.equal(again["frames"], batches[sample]["frames"])
    ((key, reason),) = task.problems()
    assert key == "bb_000"
    assert "does not decode" in reason
    assert task.problems() == []


def test_where_no_clip_can_be_read_all_are_named(tmp_path):
    clips = {f"{name}_000": moving_stripes(9, 1) for name in ("aa", "bb")}
    write_clips(tmp_path / "shards", NAME, clips, damaged=list(clips))
    with pytest.raises(TrainingError, match=r"(aa_000.*bb_000|bb_000.*aa_000).*shards verify"):
        task_of(tmp_path / "shards").batch([0])


def test_conditions_are_dropped_independently_and_change_nothing_else(source):
    plain = task_of(source).batch(range(12))
    batch = task_of(source, drop_face=0.5, drop_pose=0.5).batch(range(12))
    kept = torch.stack([batch["keep_face"], batch["keep_pose"]])
    assert {tuple(pair) for pair in kept.T.tolist()} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert plain["keep_face"].min() == plain["keep_pose"].min() == 1
    for name in plain.keys() - {"keep_face", "keep_pose"}:
        assert torch.equal(plain[name], batch[name]), name


def test_noise_levels_come_from_either_law(source):
    config = task_of(source, sigma="cosine").config
    generator = torch.Generator().manual_seed(0)
    draws = torch.cat([config.draw_sigma(generator) for _ in range(400)])
    edges = config.sigma_quartiles()
    below = [(draws < edge).float().mean().item() for edge in edges]
    assert below == pytest.approx([0.25, 0.5, 0.75], abs=0.08)
    task = task_of(source)
    torch.manual_seed(0)
    assert not torch.equal(task.config.sigma_quartiles(), edges)
    _, numbers = task.loss(task.build(), task.batch([0]))
    quarters = [float(numbers[f"loss_sigma_q{i}"]) for i in range(4)]
    assert sum(not np.isnan(value) for value in quarters) == 1


def test_without_the_face_mask_faces_count_as_all_else(source):
    task, without = task_of(source), task_of(source, face_mask=False)
    torch.manual_seed(0)
    model, batch = task.build(), task.batch([0, 1])
    assert batch["face_mask"].max() > 0
    nothing = {**batch, "face_mask": torch.zeros_like(batch["face_mask"])}
    assert without.loss(model, batch)[0] == task.loss(model, nothing)[0]
    assert without.loss(model, batch)[0] < task.loss(model, batch)[0]
    found = [t.loss(model, batch)[1]["loss_face"] for t in (task, without)]
    assert found[0] == found[1] > 0
    assert task.loss(model, nothing)[1]["loss_face"].isnan()


@pytest.mark.real_data
def test_augmented_poses_lie_beside_the_person_and_the_rest_stays(data_root, tmp_path):
    source = write_fashion(data_root, tmp_path / "shards")

    def drawn(kind: str, **changes) -> tuple[AnimateTask, dict]:
        task = task_of(source, pose_augmentation=kind, pose_augmented=1.0, **changes)
        return task, task.batch(range(6))

    still, plain = drawn("none")
    none = SimilarityRange(scale=1.0, rotation=0.0, shift=0.0)
    _, unmoved = drawn("perturbed", perturbation=none)
    assert torch.equal(plain["poses"], unmoved["poses"])
    off = {}
    for kind in ("perturbed", "aligned"):
        _, batch = drawn(kind)
        for name in plain.keys() - {"poses"}:
            assert torch.equal(plain[name], batch[name]), name
        off[kind] = (batch["poses"].float() - plain["poses"].float()).abs().mean((1, 2, 3, 4))
        assert (off[kind] > 0).sum() >= 5
    # Poses of other frames differ by as much as this; what alignment leaves is less.
    _, large = drawn("perturbed", perturbation=SimilarityRange())
    apart = (large["poses"].float() - plain["poses"].float()).abs().mean((1, 2, 3, 4))
    assert off["aligned"].mean() < 0.7 * apart.mean()
    assert off["perturbed"].mean() < 0.7 * apart.mean()
    assert still.problems() == []
