"""The doctor reports facts, and problems in place of crashes."""

import json
from pathlib import Path

import pytest

from infra import doctor


def test_the_report_covers_what_a_user_needs_to_know_and_is_json() -> None:
    report = json.loads(json.dumps(doctor.examine()))
    assert all(report[part] is not None for part in report), report["problems"]
    assert report["packages"]["torch"]
    assert report["codecs"]["encode"] == {"libx264": True, "aac": True}
    assert report["devices"]["torch"]
    assert set(report["backends"]) == {"face", "pose"}
    assert all(backend["reason"] for backend in report["backends"].values())
    text = "\n".join(doctor.lines(report))
    assert report["backends"]["face"]["name"] in text


def test_a_model_file_in_the_given_folder_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("ANIMATOR_MODELS", str(tmp_path))
    assert not any(model["path"] for model in doctor.known_models())
    (tmp_path / "pose").mkdir()
    (tmp_path / "pose" / "yolox_l.onnx").write_bytes(b"0")
    found = {model["name"]: model["path"] for model in doctor.known_models()}
    assert found["yolox_l"] == str(tmp_path / "pose" / "yolox_l.onnx")


def test_a_broken_probe_becomes_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", None)
    report = doctor.examine()
    assert report["packages"] is None
    assert any(problem.startswith("packages: TypeError") for problem in report["problems"])
    assert "Problem    packages: TypeError" in "\n".join(doctor.lines(report))


def test_two_runtimes_that_exclude_each_other_are_a_problem() -> None:
    report = doctor.examine()
    report["packages"]["onnxruntime-gpu"] = report["packages"]["onnxruntime"]
    assert any("exclude each other" in problem for problem in doctor._problems(report))
