"""Training on a cluster survives a kill at the worst moment."""

import pytest
from training_kills import torture


@pytest.mark.slow
def test_run_killed_in_a_save_ends_with_the_bits_of_an_undisturbed_one(tmp_path) -> None:
    # Drivers and workers are killed in the tests of training; the script does thirty rounds.
    result = torture(1, tmp_path, seed=5, kinds=("save",))
    assert not result["failures"], result["failures"]
    assert result["kills"].get("save"), "nothing was killed in the middle of a save"
