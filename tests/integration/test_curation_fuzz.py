"""Damaged files end in a verdict, within limits, and never stop a run."""

import random

import pytest
from curation_fuzz import MAX_DAMAGED_BYTES, TIMEOUT_SECONDS, excesses, fuzz, make_inputs, own_seed


@pytest.mark.slow
def test_damaged_files_end_in_a_verdict_and_nothing_escapes(tmp_path) -> None:
    result = fuzz(60, tmp_path / "fuzz", [], seed=3)
    assert not result["failures"], result["failures"]
    assert result["verdicts"].get("failed", 0) > 10


def test_every_seed_is_tried_whole_and_only_small_ones_damaged(tmp_path) -> None:
    large, empty = tmp_path / "large.mp4", tmp_path / "empty.mkv"
    large.write_bytes(b"x" * (MAX_DAMAGED_BYTES + 1))
    empty.touch()
    seeds = [large, empty, own_seed(tmp_path / "own.mp4")]
    made = make_inputs(tmp_path / "inputs", seeds, 30, random.Random(0))
    found = list((tmp_path / "inputs").iterdir())
    whole = sorted(path.stat().st_size for path in found if path.name.startswith("whole-"))
    assert made == len(found) == 33
    assert whole == sorted(path.stat().st_size for path in seeds)
    damaged = [path for path in found if not path.name.startswith("whole-")]
    assert max(path.stat().st_size for path in damaged) < MAX_DAMAGED_BYTES


@pytest.mark.parametrize(
    ("slowest", "peak", "stalled", "said"),
    [
        (3 * TIMEOUT_SECONDS, 1e9, False, "a file took 90.0 s, and may take 30 s"),
        (1.0, 7e9, False, "7.00 GB were used, 6 GB are the bound"),
        (1.0, 1e9, True, "no shard was committed for"),
    ],
)
def test_too_much_time_or_memory_is_a_failure(slowest, peak, stalled, said) -> None:
    (failure,) = excesses(slowest, peak, stalled=stalled)
    assert said in failure
    assert not [*excesses(TIMEOUT_SECONDS, 2e9)]
