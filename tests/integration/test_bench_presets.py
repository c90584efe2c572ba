"""The bench of presets from the command line: each in a process of its own, limits judged."""

import json

import pytest

from infra.cli import main
from tests.unit.test_presets import write_inputs, write_model


def test_presets_are_measured_beside_quality(tmp_path, no_models, monkeypatch, capsys):
    write_model(tmp_path / "model")
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)  # paths may be relative
    command = "bench presets --model model --reference me.png --driving clip.mp4"
    options = "--presets low_memory --frames 2 --alignment closed-form --json --report out.json"
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), *options.split()])
    assert not ended.value.code
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "out.json").read_text())
    assert list(found["rows"]) == ["quality", "low_memory"]
    assert found["video"]["frames"] == 2
    quality, low = found["rows"].values()
    assert quality["ratio"] == quality["cpu_ratio"] == 1.0
    assert quality["psnr"] == 100.0
    assert low["held"]
    assert low["psnr"] > low["limits"]["psnr"]
    assert "guidance.batched: True → False" in low["changes"]
    assert {"sampling", "decoding"} <= set(low["stages"])
    assert low["identity"] is None  # the picture shows no face
