"""Damaged files end in a verdict, within limits, and never stop a run."""

import pytest
from curation_fuzz import fuzz


@pytest.mark.slow
def test_damaged_files_end_in_a_verdict_and_nothing_escapes(tmp_path) -> None:
    result = fuzz(60, tmp_path / "fuzz", [], seed=3)
    assert not result["failures"], result["failures"]
    assert result["verdicts"].get("failed", 0) > 10
    assert result["peak_gb"] < 8
