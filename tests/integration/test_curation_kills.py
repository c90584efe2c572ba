"""Curation survives what a cluster does to it: killed drivers, workers, decoders and nodes."""

import pytest
from curation_kills import KINDS, torture


@pytest.mark.slow
def test_killed_runs_end_with_the_bytes_of_an_undisturbed_one(tmp_path) -> None:
    result = torture(len(KINDS), tmp_path, seed=7, videos=8)
    assert not result["failures"], result["failures"]
    assert sum(result["kills"].values()) >= 3, "too few kills to mean anything"
