"""Presets: made from the model's own settings, changed by --set, and within their stated limits."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from animator.config import AnimatorConfig
from animator.model import Animator
from animator.weights import save_model
from inference.batch.config import BatchConfig, model_defaults, read_settings
from inference.conditioning import ReferenceEncoder
from inference.engine import AnimationEngine
from inference.evaluate import held_out
from inference.faces.config import FaceOptimizationConfig
from inference.guidance import GuidanceConfig
from inference.perception import Pose
from inference.pipeline import AnimationPipeline
from inference.preset_quality import IdentityJudge, distance, open_judge
from inference.presets import PRESETS, UnknownPresetError, preset
from inference.requests import AnimationRequest
from inference.sampler import SamplerConfig
from inference.settings import AnimationSettings
from inference.speed import SpeedConfig
from inference.windows import WindowConfig
from pipelines.clips import ClipStore
from pipelines.video import encode
from tests.unit.fashion_shards import write_fashion
from tests.unit.test_tasks import SMALL
from training.animate import AnimateConfig

# Large enough for a face of some pixels, small enough to be trained in seconds.
MEASURED = AnimatorConfig(
    num_frames=4,
    block_out_channels=(32, 64),
    num_attention_heads=(1, 2),
    face_encoder_depth=1,
)
SAMPLING = SamplerConfig(steps=16, sigma_min=0.02, sigma_max=80.0)
TRAINED, FRAMES = 40, 4  # steps, frames of one window


def test_a_name_that_there_is_none_of_is_refused_with_those_that_there_are(tmp_path):
    for ask in (
        lambda: preset("quick"),
        lambda: AnimationEngine(tmp_path, preset="quick"),
        lambda: BatchConfig(manifest=tmp_path, out=tmp_path, model_dir=tmp_path, preset="quick"),
    ):
        with pytest.raises(UnknownPresetError, match="quality, balanced, fast, low_memory"):
            ask()


def test_no_preset_makes_a_model_slower_than_its_own_settings():
    own = AnimationSettings(
        sampling=SamplerConfig(steps=4),
        guidance=GuidanceConfig(min=1.0, max=3.0, sigma_min=1.0, sigma_max=8.0),
        face=FaceOptimizationConfig(steps=2, iterations=3, key_frames=0.25, refresh=4),
        speed=SpeedConfig(cache_every=3),
    )
    for name in ("balanced", "fast"):
        made = PRESETS[name].settings(own, "cpu")
        assert made.sampling.steps == 4
        assert made.guidance == own.guidance
        assert made.face == own.face
        assert made.speed == own.speed
    # The one exception is what the model's own settings trade, which `quality` takes back.
    assert PRESETS["quality"].settings(own, "cpu") == replace(own, speed=SpeedConfig())
    assert PRESETS["quality"].settings(AnimationSettings(), "cpu") == AnimationSettings()
    high = replace(own, guidance=replace(own.guidance, sigma_min=100.0, sigma_max=None))
    assert PRESETS["fast"].settings(high, "cpu").guidance == high.guidance


def test_guidance_is_left_out_at_high_noise_alone():
    own = AnimationSettings(guidance=GuidanceConfig.constant(3.0))
    levels = SamplerConfig().levels()[:-1].tolist()
    counts = {}
    for name in PRESETS:
        guided = [PRESETS[name].settings(own, "cpu").guidance.applies(s) for s in levels]
        assert guided == sorted(guided)
        counts[name] = sum(guided)
    assert counts["quality"] == counts["low_memory"] == len(levels)
    assert 0 < counts["fast"] < counts["balanced"] < len(levels)


def test_low_memory_offloads_where_there_is_a_gpu_alone():
    own = AnimationSettings(
        windows=WindowConfig(batch=4), speed=SpeedConfig(compile=True, cache_every=2)
    )
    host, gpu = (PRESETS["low_memory"].settings(own, kind) for kind in ("cpu", "cuda"))
    assert host.speed == SpeedConfig(compile=True)
    assert gpu.speed == SpeedConfig(offload=True)  # with which compiling is refused
    assert not gpu.guidance.batched
    assert gpu.windows.batch == 1


def test_a_batch_item_is_another_one_with_another_preset(tmp_path):
    (tmp_path / "config.json").write_text("{}")

    def settings(name: str | None) -> str:
        config = BatchConfig(manifest=tmp_path, out=tmp_path, model_dir=tmp_path, preset=name)
        assert config.engine_options().get("preset") == name
        return json.dumps(read_settings(config))

    assert len({settings(None), settings("fast"), settings("balanced")}) == 3


def write_model(folder: Path) -> Path:
    """A model of random weights that is sampled in 14 steps."""
    torch.manual_seed(0)
    about = {"sampling": {"steps": 14, "sigma_min": 0.05, "sigma_max": 20.0}}
    save_model(folder, animator=(SMALL, Animator(SMALL).state_dict()), about=about)
    return folder


def write_inputs(folder: Path) -> tuple[Path, Path]:
    """A picture and a clip of three frames, each with its keypoints beside it."""
    rng = np.random.default_rng(0)
    body = rng.uniform(0.3, 0.7, (1, 1, 18, 2)).astype(np.float32)
    picture, clip = folder / "me.png", folder / "clip.mp4"
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(picture)
    encode(clip, [np.full((64, 64, 3), 40 * t, np.uint8) for t in range(3)], fps=8)
    for path, points in ((picture, body), (clip, np.repeat(body, 3, axis=0))):
        score = np.ones((len(points), 1, 18), np.float32)
        np.savez(path.with_suffix(".pose.npz"), keypoints=points, score=score, fps=8.0)
    return picture, clip


def test_set_changes_what_a_preset_sets_and_the_record_says_both(tmp_path, no_models):
    engine = AnimationEngine(
        write_model(tmp_path / "model"),
        preset="fast",
        alignment="closed-form",
        changes=["sampling.steps=3"],
    )
    assert (engine.settings.sampling.steps, engine.settings.sampling.schedule) == (3, "ays")
    assert engine.settings.speed.cache_every == 2
    picture, clip = write_inputs(tmp_path)
    request = AnimationRequest(reference=picture, driving=clip, output=tmp_path / "out.mp4")
    said = engine.run(request)["preset"]
    assert said["name"] == "fast"
    assert said["limits_against_quality"]["psnr_least"] == PRESETS["fast"].limits.psnr
    assert said["changed"] == ["sampling.steps: 10 → 3"]


class Measured(NamedTuple):
    """A trained model on a real clip."""

    own: AnimationSettings
    run: Callable[[AnimationSettings], np.ndarray]
    judge: IdentityJudge
    quality: np.ndarray

    def broken(self, name: str, settings: AnimationSettings) -> list[str]:
        frames = self.run(settings)
        apart = distance(frames, self.quality)["psnr"]
        lost = self.judge.similarity(self.quality) - self.judge.similarity(frames)
        print(f"{name}: {apart:.1f} dB, {lost:+.4f} of identity lost")
        return PRESETS[name].limits.broken(apart, lost)


@pytest.fixture(scope="module")
def measured(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    shards = write_fashion(data_root, tmp_path_factory.mktemp("fashion") / "shards", seconds=1.5)
    config = AnimateConfig(
        shards=str(shards),
        animator=MEASURED,
        sampling=SAMPLING,
        frame_strides=(1, 2),
        sigma_mean=-0.5,
    )
    task = config.build_task(seed=0)
    torch.manual_seed(0)
    model = task.build()
    assert isinstance(model, Animator)
    weights = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.Adam(weights, lr=4e-3)
    for step in range(TRAINED):
        loss, _ = task.loss(model, task.batch([2 * step, 2 * step + 1]))
        adam.zero_grad()
        loss.backward()
        adam.step()
    own = AnimationSettings(
        sampling=SAMPLING,
        guidance=GuidanceConfig.constant(2.0),
        face=FaceOptimizationConfig(mode="crop", min_face=8.0, steps=5, iterations=6),
    )
    encoder = ReferenceEncoder(MEASURED)
    pipeline = AnimationPipeline(model.eval(), encoder, None, own)
    data = held_out(ClipStore(shards), 0, (MEASURED.height, MEASURED.width), tail=0.6)
    pose = replace(
        data.pose, keypoints=data.pose.keypoints[:FRAMES], score=data.pose.score[:FRAMES]
    )
    first = Pose(pose.keypoints[0, :1], pose.score[0, :1], pose.size, pose.threshold)
    given = {"reference": data.trained[0], "face": data.face, "fps": data.fps}

    def run(settings: AnimationSettings) -> np.ndarray:
        return pipeline(
            **given, reference_pose=first, driving_pose=pose, align=False, settings=settings
        ).frames

    result = pipeline(**given, reference_pose=first, driving_pose=pose, align=False)
    judge = open_judge(
        encoder,
        picture=data.trained[0],
        face=data.face,
        reference_pose=first,
        driving_pose=pose,
        alignment=result.alignment,
        framing=result.framing,
    )
    assert judge is not None
    return Measured(own, run, judge, result.frames)


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["balanced", "fast", "low_memory"])
def test_a_preset_is_within_its_limits(measured: Measured, name: str):
    assert measured.broken(name, PRESETS[name].settings(measured.own, "cpu")) == []


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["balanced", "fast", "low_memory"])
def test_a_preset_that_is_spoiled_is_not(measured: Measured, name: str):
    made = PRESETS[name].settings(measured.own, "cpu")
    spoiled = replace(
        made,
        sampling=replace(made.sampling, steps=2),
        speed=replace(made.speed, cache_every=10),
    )
    assert measured.broken(name, spoiled)


def test_a_batch_counts_the_steps_that_its_preset_takes(tmp_path):
    (tmp_path / "config.json").write_text('{"sampling": {"steps": 40}}')
    given = {"manifest": tmp_path, "out": tmp_path, "model_dir": tmp_path}

    def steps(name: str | None, *changes: str) -> int:
        config = BatchConfig(**given, preset=name, changes=changes)
        return model_defaults(config)[1]

    assert steps(None) == steps("balanced") == 40
    assert steps("fast") == PRESETS["fast"].settings(AnimationSettings(), "cpu").sampling.steps
    assert steps("fast", "sampling.steps=30") == 30
