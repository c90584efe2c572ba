"""Model cards: written with the model, true to the run, and never a reason to lose it."""

import dataclasses
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_task import ToyConfig, ToyTask, toy_config

from animator import licences
from animator.config import AlignmentConfig
from animator.weights import read_config, save_model
from pipelines.overrides import apply_overrides
from tests.unit.test_alignment_weights import BANDAI, write_block
from tests.unit.test_clips import write_shard
from tests.unit.test_model import small_animator
from tests.unit.test_motion import write_motion
from tests.unit.test_tasks import SMALL
from training.align import AlignConfig
from training.animate import AnimateConfig
from training.card import training_command, write_card
from training.config import TrainConfig
from training.curve import loss_curve
from training.launch import train
from training.metrics import MetricsLog, Quiet, read_metrics
from training.recipes import get_recipe

MAX_CURVE_BYTES = 40_000


class Notes(Quiet):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def alignment_config(motion: Path) -> TrainConfig:
    block = AlignmentConfig(width=16, num_heads=2, encoder_depth=1, fusion_depth=1)
    task = AlignConfig(motion=str(motion), block=block)
    return dataclasses.replace(toy_config(samples=48), task=task)


def rows(card: str) -> dict[str, str]:
    """The cells of every table of two columns, by the first one."""
    lines = (line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("|"))
    return {cells[0]: cells[1] for cells in lines if len(cells) == 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Path]:
    folder = tmp_path_factory.mktemp("alignment")
    motion = write_motion(folder / "motion")
    shutil.copy(write_motion(folder / "other", source=None) / "walk.npz", motion / "dance.npz")
    config = alignment_config(motion)
    train(config, folder / "out", progress=Quiet(), local=True)
    return config, folder / "out"


def test_a_trained_alignment_says_what_it_is_and_what_it_may_be_used_for(run):
    config, out = run
    card = (out / "model" / "MODEL_CARD.md").read_text()
    facts = rows(card)
    block = config.task.build_task(0).build()
    assert f"{sum(p.numel() for p in block.parameters()):,} parameters" in card
    assert facts["width"] == "16"
    assert facts["seed"] == "0"
    assert facts["samples seen"] == "48 in 6 steps"
    assert torch.__version__ in facts["versions"]
    assert facts["fingerprint (SHA-256)"] == config.task.build_task(0).fingerprint
    assert facts["sequences of motion capture"] == "2"
    assert "**These weights are for non-commercial use**" in card
    assert f"states no licence: {BANDAI}; none stated." in card
    last = read_metrics(out / "metrics.jsonl")[-1]
    assert facts["closed form, each frame by itself"] == f"{last['distance_closed_form']:.4g}"
    assert facts["learned, one transform a clip"] == f"{last['distance_clip']:.4g}"
    assert str(out.parent) not in card
    assert "None" not in card


def test_the_command_of_the_card_gives_the_same_settings(run):
    config, out = run
    card = (out / "model" / "MODEL_CARD.md").read_text()
    words = shlex.split(card.split("```bash\n")[1].split("```")[0].replace("\\\n", " "))
    assert words[:3] == ["animator", "train", "alignment"]
    given = list(zip(words[3::2], words[4::2], strict=True))
    assert ("--motion", "DIR") in given
    settings = [value for option, value in given if option == "--set"]
    settings.append(f"task.motion={config.task.motion}")
    assert apply_overrides(get_recipe(dict(given)["--recipe"]), settings) == config


@pytest.mark.parametrize("recipe", ["alignment_motion", "animator_576x1024_8gpu", "animator_demo"])
def test_the_command_names_the_nearest_recipe_and_what_differs(recipe):
    assert training_command(get_recipe(recipe)) == [
        f"animator train {recipe.split('_')[0]}",
        f"--recipe {recipe}",
        f"--out runs/{recipe.split('_')[0]}",
    ]
    changes = ["run.use_gpu=false", "optim.betas=0.8,0.9", "run.seed=7", "optim.lr=3e-05"]
    config = apply_overrides(get_recipe(recipe), [*changes, "task.shards=some/where/shards"])
    words = shlex.split(" ".join(training_command(config) or []))
    assert "some/where/shards" not in words
    assert words[words.index("--shards") + 1] == "DIR"
    sets = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    assert apply_overrides(get_recipe(recipe), [*sets, "task.shards=some/where/shards"]) == config


def test_folders_that_training_starts_from_are_not_named():
    config = get_recipe("animator_576x1024_8gpu")
    config = apply_overrides(config, ["task.start=my/start", "task.alignment=my/alignment"])
    words = training_command(config) or []
    assert "--set task.start=DIR" in words
    assert "--set task.alignment=DIR" in words


def test_the_same_run_gives_the_same_small_curve(run, tmp_path):
    config, out = run
    curve = (out / "model" / "curve.svg").read_bytes()
    task = config.task.build_task(0)
    write_card(config, task, 1, out, tmp_path)
    assert (tmp_path / "curve.svg").read_bytes() == curve
    assert len(curve) < MAX_CURVE_BYTES
    random = np.random.default_rng(0)
    losses = np.exp(random.normal(size=30_000)) / np.arange(1, 30_001) ** 0.1
    long = loss_curve(np.arange(30_000).tolist(), losses.tolist(), "Loss, alignment")
    assert len(long.encode()) < MAX_CURVE_BYTES


def test_hours_and_samples_are_those_of_all_attempts(tmp_path):
    config = toy_config()
    for start, steps in ((0, range(1, 7)), (32, range(5, 13))):  # the second cuts the first
        with MetricsLog(tmp_path / "metrics.jsonl", start) as log:
            for step in steps:
                log.write({"samples_seen": 8 * step, "step": step, "loss": 1 / step, "dt": 600.0})
    write_card(config, config.task.build_task(0), 5, tmp_path, tmp_path)
    facts = rows((tmp_path / "MODEL_CARD.md").read_text())
    assert facts["hours"].startswith("2.00")
    assert facts["samples seen"] == "96 in 12 steps"


def test_a_card_that_cannot_be_written_is_noted_and_the_model_stays(tmp_path):
    class TornTask(ToyTask):
        def save_model(self, state: dict[str, torch.Tensor], folder: Path) -> None:
            super().save_model(state, folder)
            (folder / "config.json").write_text("{")

    class TornConfig(ToyConfig):
        def build_task(self, seed: int, global_batch: int = 1) -> ToyTask:
            return TornTask(self, seed)

    config = dataclasses.replace(toy_config(samples=16), task=TornConfig())
    notes = Notes()
    summary = train(config, tmp_path / "out", progress=notes, local=True)
    assert (summary.model / "model.safetensors").is_file()
    assert not (summary.model / "MODEL_CARD.md").exists()
    assert any(text.startswith("The model has no card: JSONDecodeError") for text in notes.texts)
    assert (tmp_path / "out" / "summary.json").is_file()


def test_every_task_gets_a_card(tmp_path):
    train(toy_config(samples=16), tmp_path, progress=Quiet(), local=True)
    card = (tmp_path / "model" / "MODEL_CARD.md").read_text()
    assert card.startswith("# Model card: toy\n")
    assert rows(card)["rmse"]
    assert "Make it again" not in card
    assert (tmp_path / "model" / "curve.svg").read_text().startswith("<svg")


def test_an_animator_inherits_the_terms_of_what_it_was_made_from(tmp_path):
    shards, work = tmp_path / "shards", tmp_path / "work"
    shards.mkdir()
    work.mkdir()
    write_shard(shards, work, 0, {"long_000": 12})
    torch.manual_seed(0)
    start = small_animator()
    sizes = start.config
    about = {"licence": licences.STABLEANIMATOR_V1}
    save_model(tmp_path / "start", animator=(sizes, start.state_dict()), about=about)
    write_block(tmp_path / "alignment", data="1", motion={BANDAI: 4})
    task_config = AnimateConfig(
        shards=str(shards),
        animator=sizes,
        start=str(tmp_path / "start"),
        alignment=str(tmp_path / "alignment"),
    )
    task = task_config.build_task(0)
    model = tmp_path / "model"
    task.save_model(start.state_dict(), model)
    stored = read_config(model)
    assert stored["licence"] == licences.STABLEANIMATOR_V1
    assert stored["trained_on"]["alignment"]["motion"] == {BANDAI: 4}
    record = {"samples_seen": 1, "step": 1, "loss": 1.0, "dt": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    config = dataclasses.replace(toy_config(), task=task_config)
    write_card(config, task, 1, tmp_path, model)
    card = (model / "MODEL_CARD.md").read_text()
    assert rows(card)["the weights that training started from"] == licences.STABLEANIMATOR_V1
    assert rows(card)["motion capture, 4 sequences"] == BANDAI
    assert "**These weights are for non-commercial use**" in card
    free = AnimateConfig(shards=str(shards), animator=SMALL).build_task(0)
    free.save_model(free.build().state_dict(), tmp_path / "free")
    write_card(config, free, 1, tmp_path, tmp_path / "free")
    card = (tmp_path / "free" / "MODEL_CARD.md").read_text()
    assert "Nothing listed here forbids commercial use." in card
    assert "non-commercial" not in card
