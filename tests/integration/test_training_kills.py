"""Training survives what a cluster does to it: killed drivers, workers, nodes and saves."""

import pytest
from training_kills import torture


@pytest.mark.slow
def test_killed_runs_end_with_the_bits_of_an_undisturbed_one(tmp_path) -> None:
    # Drivers and workers are killed in the tests of training, too.
    result = torture(2, tmp_path, seed=5, kinds=("save", "node"))
    assert not result["failures"], result["failures"]
    assert sum(result["kills"].values()) >= 2, "too few kills to mean anything"
