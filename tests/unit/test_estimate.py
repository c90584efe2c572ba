"""What a run would cost: checked against real passes of the small model, and against counts."""

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import pytest
import torch

from animator.config import tiny
from animator.model import Animator
from animator.recompute import recompute_blocks
from inference.benchmark import _peak_memory
from infra.cli import main
from pipelines.overrides import apply_overrides
from training.activations import activations, count_parameters, measure
from training.estimate import GPUS, estimate
from training.recipes import get_recipe

SMALL = replace(tiny(), num_frames=2, block_out_channels=(32, 64), num_attention_heads=(1, 2))
HEIGHT, WIDTH = 96, 64


def smoke(*settings: str):
    config = get_recipe("animator_smoke")
    sizes = replace(SMALL, height=HEIGHT, width=WIDTH)
    return apply_overrides(
        replace(config, task=replace(config.task, animator=sizes)), list(settings)
    )


def real_model(recompute: float) -> Animator:
    torch.manual_seed(0)
    model = Animator(SMALL).train()
    recompute_blocks(model, recompute)
    return model


@pytest.mark.parametrize("recompute", [0.0, 1.0])
def test_fake_pass_holds_what_a_real_one_does(recompute: float) -> None:
    expected = measure(real_model(recompute), HEIGHT, WIDTH, 1)
    found = activations(SMALL, height=HEIGHT, width=WIDTH, recompute=recompute)
    assert found.kept == pytest.approx(expected.kept, rel=0.01)
    assert found.peak == pytest.approx(expected.peak, rel=0.01)


def test_recomputation_keeps_a_fraction_and_grows_the_way_back() -> None:
    whole = activations(SMALL, height=HEIGHT, width=WIDTH)
    least = activations(SMALL, height=HEIGHT, width=WIDTH, recompute=1.0)
    assert least.kept < 0.25 * whole.kept
    assert least.peak < 0.5 * whole.peak
    assert least.peak > least.kept


def test_process_grows_by_what_is_computed() -> None:
    # In a process of its own: what other tests left for malloc to reuse would be hidden.
    size = (4 * HEIGHT, 4 * WIDTH)  # large against what malloc rounds to
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        peak = fresh.submit(_growth, *size).result()
    found = activations(SMALL, height=size[0], width=size[1])
    # Convolutions on a CPU want working memory of their own, which the count leaves out.
    assert found.peak < peak + 0.05 * found.peak
    assert peak < 1.4 * found.peak


def _growth(height: int, width: int) -> float:
    torch.set_num_threads(1)  # each thread would have working memory of its own
    model = real_model(0.0)
    measure(model, height, width, 1)  # what libraries keep from their first call is not it
    with _peak_memory(torch.device("cpu")) as peak:
        measure(model, height, width, 1)
    return peak[0]


def test_half_precision_and_fewer_frames_need_less() -> None:
    half = activations(SMALL, height=HEIGHT, width=WIDTH, weights=torch.bfloat16)
    mixed = activations(SMALL, height=HEIGHT, width=WIDTH, weights=torch.bfloat16, autocast=True)
    whole = activations(SMALL, height=HEIGHT, width=WIDTH)
    assert half.peak < mixed.peak < whole.peak  # autocast keeps norms in fp32
    assert half.peak == pytest.approx(whole.peak / 2, rel=0.1)


def test_parameters_are_those_of_the_model() -> None:
    model = Animator(SMALL)
    counted = count_parameters(SMALL, "all", 16)
    assert counted.all == sum(p.numel() for p in model.parameters())
    assert sum(counted.parts.values()) == counted.all
    assert count_parameters(SMALL, "lora", 4).trainable < counted.trainable


def test_state_is_shared_out_as_the_engine_does() -> None:
    def memory(*settings: str) -> dict[str, float]:
        return estimate(smoke("batch.global_batch=8", *settings))["memory"]

    one, eight = memory(), memory("run.num_workers=8")
    assert eight["optimiser"] == one["optimiser"] / 8
    assert eight["gradients"] == one["gradients"] / 8
    assert eight["weights"] == one["weights"]
    counted = count_parameters(smoke().task.animator, "all", 16)
    assert one["weights"] == 4 * counted.all
    assert one["optimiser"] == 12 * counted.trainable  # masters and two moments, fp32
    plain = memory("run.engine=ddp")
    assert (plain["optimiser"], plain["buckets"]) == (8 * counted.trainable, 0)
    assert memory("run.precision=bf16")["weights"] == 2 * counted.all
    assert memory("ema.half_life=0")["average"] == 0


def test_time_follows_the_card_and_the_share_it_gives() -> None:
    slow = estimate(smoke(), gpu="a100-80gb", mfu=0.2)
    fast = estimate(smoke(), gpu="h100", mfu=0.4, clips=1000)
    ratio = 2 * GPUS["h100"].peak / GPUS["a100-80gb"].peak
    assert slow["seconds"] == pytest.approx(ratio * fast["seconds"])
    assert fast["run"]["hours"] == pytest.approx(20 * fast["seconds"] / 3600)
    assert fast["epoch"]["hours"] == pytest.approx(500 * fast["seconds"] / 3600)
    assert slow["epoch"] is None


def test_mistakes_say_what_was_expected() -> None:
    with pytest.raises(ValueError, match="expected one of a100"):
        estimate(smoke(), gpu="a1000")
    with pytest.raises(ValueError, match="MFU 35"):
        estimate(smoke(), mfu=35)
    with pytest.raises(ValueError, match="a recipe of the animator"):
        estimate(get_recipe("alignment_tiny"))


def test_verb_says_that_nothing_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["train", "estimate", "--recipe", "animator_smoke", "--set", "task.recompute=0"]
    given += ["--set", "task.animator.num_frames=2", "--set", "task.animator.layers_per_block=1"]
    given += ["--set", "task.animator.block_out_channels=32,64"]
    given += ["--set", "task.animator.num_attention_heads=1,2"]
    with pytest.raises(SystemExit) as ended:
        main(given)
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert "not measured on a GPU" in shown
    assert "in all" in shown
    with pytest.raises(SystemExit):
        main([*given, "--json"])
    assert json.loads(capsys.readouterr().out)["parameters"]["all"] > 1e6
