"""A batch survives what a cluster does to it: killed drivers and engines, also in a publication."""

import pytest
from batch_kills import torture


@pytest.mark.slow
@pytest.mark.usefixtures("no_models")
def test_killed_batch_ends_with_the_bytes_of_an_undisturbed_engine(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    result = torture(
        1, tmp_path / "work", seed=3, seeds=1, kinds=("driver", "engine"), strikes=2, engines=1
    )
    assert not result["failures"], result["failures"]
    assert sum(result["kills"].values()) == 2, "too few kills to mean anything"
