"""The state of a run is read from its folder, whatever has become of the run."""

import fcntl
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image
from toy_task import toy_config
from typer.testing import CliRunner

from infra.cli import app
from training.checkpoint import checkpoint_name
from training.launch import train
from training.metrics import Quiet, read_metrics
from training.status import StatusError, read_status
from training.status_page import draw, render_page
from training.status_text import clock, size, status_lines


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("status") / "out"
    train(toy_config(), out, progress=Quiet(), local=True)
    return out


@pytest.fixture
def run(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def rewrite(out: Path, **numbers: object) -> None:
    """Give the last record other numbers."""
    records = read_metrics(out / "metrics.jsonl")
    records[-1] |= numbers
    (out / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def validate(out: Path, samples: int, **metrics: float) -> None:
    folder = out / "validation" / checkpoint_name(samples)
    folder.mkdir(parents=True)
    entry = {**metrics, "samples_seen": samples, "seconds": 1.5, "fingerprint": "f"}
    (folder / "metrics.json").write_text(json.dumps(entry))
    Image.new("RGB", (400, 100), (samples, 90, 60)).save(folder / "contact.png")


def test_finished_run_says_what_it_reached(run):
    status = read_status(run)
    assert status["state"] == "finished"
    assert status["position"]["samples_seen"] == 96
    assert status["position"]["share"] == 1.0
    records = read_metrics(run / "metrics.jsonl")
    mean = sum(record["loss"] for record in records[6:]) / 6
    assert status["now"]["numbers"]["loss"] == pytest.approx(mean)
    assert sum(status["now"]["parts"].values()) == pytest.approx(1.0, abs=0.02)
    assert [(c["samples_seen"], c["fault"]) for c in status["checkpoints"]] == [
        (64, None),
        (96, None),
    ]
    assert status["checkpoints"][0]["bytes"] > 1000
    assert status["validation"] == []
    json.dumps(status)
    text = "\n".join(status_lines(status))
    assert "96 of 96 samples (100.0 %), step 12 of 12" in text
    assert "step 00012/00012" in text  # the line of the console
    assert "Checkpoint 96: good" in text


def test_running_is_told_by_the_lock_and_silence_by_the_clock(run):
    (run / "summary.json").unlink()
    with (run / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert read_status(run)["message"] == "running"
        os.utime(run / "metrics.jsonl", (0, 0))
        assert re.match(r"running, but silent for .* a step takes", read_status(run)["message"])
    rewrite(run, samples_seen=88)
    assert read_status(run)["message"] == "stopped; the same command continues it"


def test_failure_is_told_in_its_own_words(run):
    (run / "summary.json").unlink()
    failure = {"kind": "TrainingError", "message": "At step 9 the loss is nan."}
    (run / "failure.json").write_text(json.dumps(failure))
    status = read_status(run)
    assert status["state"] == "failed"
    assert status["message"] == "failed: At step 9 the loss is nan."


def test_torn_checkpoints_left_out_steps_and_clips_are_shown(run):
    (run / "checkpoints" / checkpoint_name(96) / "train.json").unlink()
    rewrite(run, skipped=3, mfu=0.41, loss_sigma_q0=0.5, loss_sigma_q1=0.25)
    (run / "left-out").mkdir()
    clip = {"key": "clip_7", "reason": "the file ends early", "samples_seen": 8}
    (run / "left-out" / "clips.jsonl").write_text(json.dumps(clip) + "\n")
    text = "\n".join(status_lines(read_status(run)))
    assert "Checkpoint 96: not complete: train.json is missing" in text
    assert "Left out: 3 steps, 1 clips (clip_7)" in text
    assert "by noise level 0.5 0.25" in text
    assert "MFU 41.0 %" in text


def test_page_holds_curves_table_and_pictures_and_escapes_what_it_shows(run):
    for samples, loss in ((32, 0.5), (64, 0.3), (96, 0.4)):
        validate(run, samples, loss=loss, psnr=20.0 + samples / 96)
    (run / "best").mkdir()
    (run / "best" / "metrics.json").write_text(json.dumps({"samples_seen": 64, "loss": 0.3}))
    note = {"time": 0, "samples_seen": 8, "text": "<script>alert(1)</script>"}
    (run / "notes.jsonl").write_text(json.dumps(note) + "\n")
    done = CliRunner().invoke(
        app, ["train", "status", str(run), "--page", str(run / "page.html"), "--json"]
    )
    assert done.exit_code == 0, done.output
    status = json.loads(done.stdout)
    assert [row["samples_seen"] for row in status["validation"]] == [32, 64, 96]
    page = (run / "page.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 3
    assert "<b>loss</b>" in page
    assert "<b>validation: psnr</b>" in page
    assert re.search(r'class="used"><td class="n">64, best', page)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "http" not in page.replace("http://www.w3.org", "")  # nothing is fetched


def test_new_run_and_other_folders(run, tmp_path):
    new = tmp_path / "new"
    new.mkdir()
    with pytest.raises(StatusError, match="no folder of a training run"):
        read_status(new)
    shutil.copy(run / "config.json", new)
    status = read_status(new)
    assert status["state"] == "new"
    assert "no step was made yet" in "\n".join(status_lines(status))
    assert "no step was made yet" in render_page(new, status)
    done = CliRunner().invoke(app, ["train", "status", str(tmp_path)])
    assert done.exit_code != 0


def test_curve_is_thinned_and_scaled_to_what_comes_late():
    points = [(float(x), 1000.0 if x < 10 else 2.0 + x / 1000) for x in range(1000)]
    chart = draw("loss", [("", points)])
    assert chart is not None
    assert chart["top"] == "2.999" or float(chart["top"]) < 3.1
    assert len(chart["lines"][0]["path"].split("L")) <= 160
    assert draw("nothing", [("", [])]) is None
    assert draw("flat", [("", [(1.0, 0.0), (2.0, 0.0)])]) is not None


def test_times_and_sizes_read_as_people_say_them():
    assert clock(59.2) == "01:00"
    assert clock(3 * 3600 + 61) == "3:01:01"
    assert clock(2 * 86400 + 3600) == "2 d 01:00"
    assert size(999) == "999 B"
    assert size(27.4e9) == "27.4 GB"
