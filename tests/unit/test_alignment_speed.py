"""The alignment benchmark: two rows of one run on one thread."""

import pytest
import torch

from animator.alignment import AlignmentBlock
from animator.config import AlignmentConfig
from animator.weights import save_model
from inference.alignment.speed import BASELINE, AlignmentBench, bench_alignment


def test_the_block_is_timed_beside_the_closed_form_on_one_thread(tmp_path):
    config = AlignmentConfig(width=16, num_heads=2)
    save_model(tmp_path / "model", alignment=(config, AlignmentBlock(config).state_dict()))
    threads, runs = torch.get_num_threads(), []
    bench = AlignmentBench(frames=50, repeats=3, alignment=str(tmp_path / "model"))
    result = bench_alignment(bench, lambda done, total: runs.append((done, total)))
    assert set(result["rows"]) == {BASELINE, "learned"}
    assert result["rows"][BASELINE]["ratio"] == 1
    assert result["rows"]["learned"]["ratio"] > 1
    assert result["machine"]["threads"] == 1
    assert torch.get_num_threads() == threads
    assert runs[-1] == (6, 6)
    assert result["alignment"]["name"] == "model"


def test_settings_that_cannot_be_are_named():
    with pytest.raises(ValueError, match="at least 1"):
        AlignmentBench(frames=0)
