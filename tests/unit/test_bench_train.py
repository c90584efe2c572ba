"""The training benchmark runs the real loop, and its parts are those of a step."""

import json
from dataclasses import replace

import pytest

from infra.cli import main
from training.benchmark import TrainBench, bench_train

SMALL = {"height": 32, "width": 32, "frames": 2, "steps": 2}


def test_parts_of_a_step_add_up_to_it() -> None:
    told = []
    config = replace(TrainBench(engines=("zero2", "ddp"), track=False), **SMALL)
    found = bench_train(config, lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1]
    for row in found["rows"].values():
        parts = row["parts"]
        assert list(parts) == ["data", "forward", "backward", "optimiser", "other"]
        assert sum(parts.values()) == pytest.approx(row["seconds"], rel=0.5)  # of medians
        assert min(parts["forward"], parts["backward"], parts["optimiser"]) > 0
        assert row["bare_seconds"] > 0
        assert row["peak_gb"] > 0
        assert row["tflops"] == pytest.approx(found["flops"] / row["seconds"] / 1e12, abs=1e-4)


def test_without_a_baseline_there_is_no_overhead(tmp_path, capsys) -> None:
    report = tmp_path / "train.json"
    given = ["bench", "train", "--engines", "ddp", "--no-baseline", "--report", str(report)]
    given += [part for name, size in SMALL.items() for part in (f"--{name}", str(size))]
    with pytest.raises(SystemExit) as ended:
        main(given)
    assert not ended.value.code
    row = json.loads(report.read_text())["rows"]["ddp"]
    assert "overhead" not in row
    assert "ddp" in capsys.readouterr().out


def test_mistakes_are_said() -> None:
    with pytest.raises(ValueError, match="expected of zero2, ddp"):
        TrainBench(engines=("zero9",))
    with pytest.raises(ValueError, match="multiples of"):
        bench_train(TrainBench(height=33))
