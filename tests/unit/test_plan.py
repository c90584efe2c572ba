"""The plan: sources by content, a folder that belongs to one plan, a ledger of what is done."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.curation.config import CurationConfig
from pipelines.curation.ledger import Event, FolderInUseError, RunJournal, folder_lock
from pipelines.curation.plan import PlanError, find_sources, load_plan, make_plan, save_plan
from pipelines.overrides import apply_overrides

CONFIG = apply_overrides(CurationConfig(), ["output.sources_per_shard=2"])


def write(folder: Path, **files: str) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.mp4").write_text(content)
    return [str(folder / f"{name}.mp4") for name in files]


def test_folders_files_globs_and_lists_name_the_same_sources(tmp_path):
    uris = write(tmp_path / "v", a="1", b="2")
    (tmp_path / "v" / "notes.md").write_text("no video")
    (tmp_path / "v" / "UPPER.MOV").write_text("3")
    listing = tmp_path / "list.txt"
    listing.write_text(f"# mine\n{tmp_path / 'v'}\n")
    expected = sorted([*uris, str(tmp_path / "v" / "UPPER.MOV")])
    assert find_sources([str(tmp_path / "v")]) == expected
    assert find_sources([str(listing)]) == expected
    assert find_sources([str(tmp_path / "v" / "*.mp4"), uris[0]]) == uris


@pytest.mark.parametrize("pattern", ["nowhere", "*.mp4", "."])
def test_a_pattern_without_videos_is_an_error(tmp_path, pattern, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlanError, match="holds no videos"):
        find_sources([pattern])


def test_one_content_under_two_names_is_one_source(tmp_path):
    uris = write(tmp_path, a="same", b="same", c="other")
    plan = make_plan(uris, CONFIG)
    assert sorted(len(source.uris) for source in plan.sources) == [1, 2]
    both = next(source for source in plan.sources if len(source.uris) == 2)
    assert both.uris == (uris[0], uris[1])
    assert both.id == both.sha256[:16]


def test_ids_do_not_depend_on_names_or_order(tmp_path):
    one = make_plan(write(tmp_path / "x", a="1", b="2", c="3"), CONFIG)
    two = make_plan(reversed(write(tmp_path / "y", q="3", r="1", s="2")), CONFIG)
    assert [shard.sources for shard in one.shards] == [shard.sources for shard in two.shards]
    assert [len(shard.sources) for shard in one.shards] == [2, 1]


def test_unreadable_source_is_planned_with_its_error(tmp_path):
    plan = make_plan([str(tmp_path / "gone.mp4")], CONFIG)
    assert plan.sources[0].error == "cannot be read: not a regular file"


def test_saved_plan_is_accepted_again(tmp_path):
    plan = make_plan(write(tmp_path / "v", a="1"), CONFIG, {"face": "cascade"})
    save_plan(tmp_path, plan)
    before = (tmp_path / "plan.json").read_bytes()
    save_plan(tmp_path, plan)
    assert load_plan(tmp_path) == plan
    assert (tmp_path / "plan.json").read_bytes() == before


def test_other_settings_are_refused_with_the_difference(tmp_path):
    uris = write(tmp_path / "v", a="1")
    save_plan(tmp_path, make_plan(uris, CONFIG))
    other = apply_overrides(CONFIG, ["pose.max_missing=0.5"])
    with pytest.raises(PlanError, match=r"pose\.max_missing: 0\.7 → 0\.5"):
        save_plan(tmp_path, make_plan(uris, other))


def test_other_sources_are_refused_with_their_names(tmp_path):
    uris = write(tmp_path / "v", a="1", b="2")
    save_plan(tmp_path, make_plan(uris, CONFIG))
    Path(uris[1]).write_text("changed")
    with pytest.raises(PlanError, match=r"source that is new: .*b\.mp4"):
        save_plan(tmp_path, make_plan(uris, CONFIG))


def test_other_models_are_refused(tmp_path):
    uris = write(tmp_path / "v", a="1")
    save_plan(tmp_path, make_plan(uris, CONFIG, {"face": "small"}))
    with pytest.raises(PlanError, match=r"models\.face: 'small' → 'large'"):
        save_plan(tmp_path, make_plan(uris, CONFIG, {"face": "large"}))


def test_keypoints_beside_a_video_belong_to_the_plan(tmp_path):
    uris = write(tmp_path, a="same", b="same")
    (tmp_path / "b.pose.npz").write_bytes(b"keypoints")
    source = make_plan(uris, CONFIG).sources[0]
    assert source.uris == (uris[1], uris[0])
    assert source.pose_sha256 is not None


def test_second_run_on_a_folder_is_refused(tmp_path):
    with (
        folder_lock(tmp_path),
        pytest.raises(FolderInUseError, match="is being written by process"),
    ):
        with folder_lock(tmp_path):
            pass


def test_lock_of_a_killed_process_is_free(tmp_path):
    code = (
        "import sys, time, pathlib\n"
        "from pipelines.curation.ledger import folder_lock\n"
        "with folder_lock(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(FolderInUseError, match=str(holder.pid)), folder_lock(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with folder_lock(tmp_path):
        pass


def test_journal_counts_the_processes_that_died_on_a_source(tmp_path):
    journal, run = RunJournal.create(tmp_path)
    worker = RunJournal(tmp_path, run)
    assert [worker.begin("poison"), worker.begin("poison"), worker.begin("poison")] == [0, 1, 2]
    worker.begin("good")
    worker.end(Event(source="good", verdict="kept", reasons=(), clips=2))
    assert worker.begin("good") == 0
    assert journal.new_events() == [Event(source="good", verdict="kept", reasons=(), clips=2)]
    assert journal.new_events() == []
    journal.close()
    assert list(tmp_path.iterdir()) == []
