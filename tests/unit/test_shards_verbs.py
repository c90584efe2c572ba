"""The verbs for a folder of shards, as they are typed."""

import json
from pathlib import Path

import pytest
from PIL import Image

from infra.cli import main
from infra.console import FAILED, WRONG_USE
from pipelines.clips import ClipStore
from pipelines.exchange.importing import import_shards
from tests.unit.foreign_layouts import NUM_FRAMES, write_clip, write_set

pytestmark = pytest.mark.usefixtures("no_models")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Shards with two kept clips, one without people, and one that cannot be read."""
    source = write_set(tmp_path / "set", 2)
    write_clip(source / "rec" / "nobody", seed=4, with_keypoints=False)
    (source / "rec" / "empty" / "images").mkdir(parents=True)
    import_shards(source, tmp_path / "shards", jobs=0)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "shards"


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    code = ended.value.code
    return code if isinstance(code, int) else 0


def test_show_lists_the_clips(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("shards", "show", folder) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["key", "frames", "fps", "size", "seconds", "source"]
    assert {line.split()[0] for line in lines[1:]} == set(ClipStore(folder).keys)
    assert "48x64" in lines[1]


@pytest.mark.parametrize("by", ["key", "name"])
def test_show_makes_a_contact_sheet(
    folder: Path, capsys: pytest.CaptureFixture[str], by: str
) -> None:
    key = ClipStore(folder).keys[0]
    assert run("shards", "show", folder, key if by == "key" else "00001", "--json") == 0
    known = json.loads(capsys.readouterr().out)
    assert known["key"] == key
    assert known["num_frames"] == NUM_FRAMES
    assert known["shard"] == "shard-000000"
    with Image.open(known["sheet"]) as sheet:
        assert Path(known["sheet"]) == Path(f"{key}.png")
        assert min(sheet.size) > 200
        # Frames, text and lines: no plain picture.
        assert len(sheet.convert("RGB").getcolors(1 << 24) or ()) > 200


def test_a_sheet_replaces_a_sheet_but_nothing_else(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = ClipStore(folder).keys[0]
    assert run("shards", "show", folder, key, "--out", "sheet.png") == 0
    assert run("shards", "show", folder, key, "--out", "sheet.png") == 0
    photo = Path("photo.png")
    Image.new("RGB", (8, 8)).save(photo)
    before = photo.read_bytes()
    assert run("shards", "show", folder, key, "--out", photo) == WRONG_USE
    assert "no contact sheet" in capsys.readouterr().err
    assert photo.read_bytes() == before
    assert run("shards", "show", folder, "nobody", "--out", photo) == WRONG_USE
    assert photo.read_bytes() == before


def test_what_was_rejected_can_be_shown_with_its_reasons(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("shards", "show", folder, "nobody", "--json") == 0
    known = json.loads(capsys.readouterr().out)
    assert known["reasons"] == ["missing_keypoints"]
    assert Path(known["sheet"]).name == f"{known['id']}.png"
    key = known["clips"][0]["key"]
    assert run("shards", "show", folder, key, "--json") == 0
    assert json.loads(capsys.readouterr().out)["clip"]["scores"]["pose_missing"] == 1.0
    assert run("shards", "show", folder, "rec/empty", "--json") == 0
    known = json.loads(capsys.readouterr().out)
    assert "no numbered pictures" in known["error"]
    with Image.open(known["sheet"]) as sheet:
        assert sheet.width > 200


def test_a_typo_is_answered_with_the_nearest_names(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = ClipStore(folder).keys[0]
    assert run("shards", "show", folder, f"{key[:-1]}9") == WRONG_USE
    printed = capsys.readouterr()
    assert key in printed.err
    assert printed.out == ""


def test_stats_count_what_is_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("shards", "stats", folder, "--json") == 0
    counts = json.loads(capsys.readouterr().out)
    assert (counts["kept"], counts["rejected"], counts["failed"]) == (2, 1, 1)
    assert counts["frames_kept"] == 2 * NUM_FRAMES
    assert counts["reasons"] == {"unreadable": 1, "missing_keypoints": 1}
    assert run("shards", "stats", folder) == 0
    assert "4 videos: 2 kept, 1 rejected, 1 failed" in capsys.readouterr().out


def test_verify_fails_on_a_changed_byte(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("shards", "verify", folder) == 0
    tar = folder / "shard-000000.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    assert run("shards", "verify", folder) == FAILED
    assert "has been changed" in capsys.readouterr().out


def test_export_and_import_as_they_are_typed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("shards", "export", folder, "--out", "data", "--jobs", 2) == 0
    printed = capsys.readouterr()
    assert "2 clips written" in printed.out
    assert "neither square nor 9:16" in printed.err
    assert run("shards", "import", "data", "--out", "back", "--jobs", 0, "--json") == 0
    assert json.loads(capsys.readouterr().out)["kept"] == 2
    assert run("shards", "import", "data", "--out", "back", "--fps", 0) == WRONG_USE
    assert "fps is 0.0" in capsys.readouterr().err
    assert run("shards", "import", "data", "--out", "back", "--layout", "coco") == WRONG_USE
    assert "expected auto, stableanimator, tiktok, dwpose" in capsys.readouterr().err
    assert run("shards", "export", folder, "--out", "set") == WRONG_USE
