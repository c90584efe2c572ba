"""Curation survives what a cluster does to it: killed drivers, workers, decoders and nodes."""

from pathlib import Path

import pytest
from curation_kills import torture
from killing import MOST_MISSES, Nodes, Result, repeat, summary


@pytest.mark.slow
def test_killed_runs_end_with_the_bytes_of_an_undisturbed_one(tmp_path) -> None:
    # Decoders and nodes are killed in the tests of curation and of clusters, too.
    result = torture(2, tmp_path, seed=7, videos=6)
    assert not result["failures"], result["failures"]
    assert sum(result["kills"].values()) >= 2, "too few kills to mean anything"
    assert result["runs"] == 2, "each with a kill"


@pytest.mark.slow
def test_a_round_without_a_kill_is_made_again_and_is_no_run(tmp_path) -> None:
    numbers: list[int] = []

    def one(number: int, out: Path) -> tuple[list[str], Result, list[str]]:
        out.mkdir()
        (tmp_path / f"{out.name}.log").touch()
        numbers.append(number)
        hit = number == 0 or numbers.count(number) > 2
        return ["node"], {"struck": ["node"] * (hit and number != 2), "starts": 1}, []

    nodes = Nodes("nothing at all", workers=0)
    try:
        result = repeat(3, tmp_path, nodes, one, until_struck=True)
    finally:
        nodes.close()
    assert numbers == [0, 1, 1, 1] + [2] * MOST_MISSES
    assert (result["runs"], result["runs_without_a_kill"]) == (2, 2 + MOST_MISSES)
    assert [failure["run"] for failure in result["failures"]] == [2]
    assert "nothing was killed" in result["failures"][0]["wrong"][0]
    assert summary(result).startswith("2 runs: 2 kills (2 node), 12 runs without a kill")
