"""Curation survives what a cluster does to it: killed drivers, workers, decoders and nodes."""

import pytest
from curation_kills import torture


@pytest.mark.slow
def test_killed_runs_end_with_the_bytes_of_an_undisturbed_one(tmp_path) -> None:
    # Decoders and nodes are killed in the tests of curation and of clusters, too.
    result = torture(2, tmp_path, seed=7, videos=8)
    assert not result["failures"], result["failures"]
    assert sum(result["kills"].values()) >= 2, "too few kills to mean anything"
