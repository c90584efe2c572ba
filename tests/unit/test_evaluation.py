"""The agreement with labels counts what could not be read, too."""

from pathlib import Path

import pytest
from curated_run import Video, clip, run, settings

from infra.cli import main
from pipelines.curation.evaluation import evaluate_curation

MOVING = {"camera_percent_per_second": 9.0, "people": 1.0}
STILL = {"camera_percent_per_second": 0.1, "people": 0.0}
LABELS = """file,camera,cuts,face,people
moving.mp4,moving,no,yes,1
still.mp4,static,no,no,0
broken.mp4,moving,yes,yes,0
"""


def shards(folder: Path, *, broken: bool) -> Path:
    moving = clip(series={"face_score": [0.9, 0.9]}, **MOVING)
    still = clip(series={"face_score": [0.0, 0.0]}, **STILL)
    videos = {
        "moving.mp4": Video("moving", (moving,)),
        "still.mp4": Video("still", (still,)),
        "broken.mp4": Video("broken", (moving,), fails=broken),
    }
    return run(folder / "shards", videos, settings())


def labels(folder: Path) -> Path:
    path = folder / "labels.csv"
    path.write_text(LABELS)
    return path


def test_a_source_that_failed_was_not_recognised_and_lowers_every_measure(tmp_path) -> None:
    found = evaluate_curation(shards(tmp_path, broken=True), labels(tmp_path))
    assert found["failed"] == ["broken.mp4"]
    for rule, recall in {"moving_camera": 0.5, "cuts": 0.0, "face_present": 0.5}.items():
        assert found[rule]["missed"] == ["broken.mp4"]
        assert (found[rule]["clips"], found[rule]["recall"]) == (3, recall)
    assert found["people"]["accuracy"] == pytest.approx(2 / 3, abs=1e-4)
    assert found["people"]["wrong"] == {"broken.mp4": "labelled 0, found failed"}


def test_a_decoder_that_breaks_on_a_hard_clip_raises_no_score(tmp_path) -> None:
    read = evaluate_curation(shards(tmp_path / "read", broken=False), labels(tmp_path))
    broken = evaluate_curation(shards(tmp_path / "broken", broken=True), labels(tmp_path))
    assert not read["failed"]
    for rule in ("moving_camera", "cuts", "face_present"):
        assert broken[rule]["f1"] <= read[rule]["f1"]
    assert broken["people"]["accuracy"] <= read["people"]["accuracy"]


@pytest.mark.parametrize(
    ("broken", "said"),
    [(True, "1 of 3 sources failed, and count as not recognised"), (False, "none of 3 sources")],
)
def test_the_table_says_how_many_failed(tmp_path, capsys, broken, said) -> None:
    folder = shards(tmp_path, broken=broken)
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "curation", str(folder), "--labels", str(labels(tmp_path))])
    assert not ended.value.code
    assert said in capsys.readouterr().out
