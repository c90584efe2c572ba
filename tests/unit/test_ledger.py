"""The ledger: one run at a time, what of a plan is done, the traces of processes that died."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import shards
from pipelines.curation.commits import COMMITS_FILE, read_commit
from pipelines.curation.config import CurationConfig
from pipelines.curation.ledger import (
    WORK_FOLDER,
    Event,
    FolderInUseError,
    RunJournal,
    clean_up,
    folder_lock,
    scan_done,
)
from pipelines.curation.plan import SOURCE_SCHEMA, Plan, make_plan, replace_config, save_plan
from pipelines.damaged import damaged_notes
from pipelines.overrides import apply_overrides
from pipelines.ray_sizes import RunError
from pipelines.schema import ClipRecord, ShardRecord, SourceRecord

CONFIG = apply_overrides(CurationConfig(), ["output.sources_per_shard=2"])
NAMES = ["shard-000000", "shard-000001", "shard-000002"]


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Five sources in three shards."""
    import pyarrow as pa

    uris = [f"v/{number}.mp4" for number in range(5)]
    table = pa.table([uris, *[[None] * 5] * 4], schema=SOURCE_SCHEMA)
    return save_plan(tmp_path, make_plan(table, CONFIG))


def commit(folder: Path, plan: Plan, index: int, *, reasons: tuple[str, ...] = ()) -> None:
    """Commit a shard whose first source is rejected with `reasons`, the others kept; the last of
    the plan has failed."""
    records = []
    members = {}
    for number, row in enumerate(plan.shard_rows(index)):
        verdict = "rejected" if number == 0 and reasons else "kept"
        if row.uri == "v/4.mp4":
            verdict = "failed"
        key = f"{row.id}_000"
        clip = ClipRecord(key=key, start=0, end=1, verdict=verdict, reasons=reasons)
        if verdict == "kept":
            members[f"{key}.json"] = b"{}"
        records.append(
            SourceRecord(
                id=row.id,
                sha256="",
                bytes=0,
                uris=(row.uri,),
                verdict=verdict,
                clips=() if verdict == "failed" else (clip,),
            )
        )
    name = plan.shard(index).name
    tar = folder / "staged.tar"
    sizes = shards.write_tar(tar, members)
    record = ShardRecord(
        name=name,
        config_hash=plan.config_hash,
        tar_sha256=shards.sha256_file(tar),
        tar_bytes=tar.stat().st_size,
        members=sizes,
        counts={},
        sources=tuple(records),
    )
    shards.commit(folder, tar, record)


def touch_later(path: Path, other: Path) -> None:
    """Make `path` one second younger than `other`."""
    later = other.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(later, later))


def test_committed_shards_are_done_and_counted(tmp_path, plan):
    commit(tmp_path, plan, 0, reasons=("cut",))
    commit(tmp_path, plan, 2)
    done = scan_done(tmp_path, plan)
    assert done.names == {NAMES[0], NAMES[2]}
    assert (done.failed, done.not_stored, done.stale) == ((NAMES[2],), (), frozenset())
    tars = sum((tmp_path / f"{name}.tar").stat().st_size for name in done.names)
    assert done.totals == {"kept": 1, "rejected": 1, "failed": 1, "clips": 1, "bytes": tars}
    assert [shard.name for shard in done.todo(plan)] == [NAMES[1]]


def test_clips_that_were_never_stored_are_told(tmp_path, plan):
    commit(tmp_path, plan, 0, reasons=("not_stored",))
    assert scan_done(tmp_path, plan).not_stored == (NAMES[0],)


def test_shards_of_other_settings_are_stale_and_kept(tmp_path, plan):
    commit(tmp_path, plan, 0)
    revised = replace_config(tmp_path, apply_overrides(CONFIG, ["faces.min_size=0.1"]))
    done = scan_done(tmp_path, revised)
    assert (done.names, done.stale) == (frozenset(), {NAMES[0]})
    assert done.totals["kept"] == 0
    assert clean_up(tmp_path, revised, done) == done
    assert (tmp_path / f"{NAMES[0]}.json").exists()


@pytest.mark.parametrize("cached", [False, True])
def test_shards_that_are_damaged_are_not_done(tmp_path, plan, cached):
    for index in range(3):
        commit(tmp_path, plan, index)
    if cached:
        assert len(scan_done(tmp_path, plan).names) == 3
    tar = tmp_path / f"{NAMES[0]}.tar"
    tar.write_bytes(tar.read_bytes() + b"x")
    (tmp_path / f"{NAMES[1]}.tar").unlink()
    record = tmp_path / f"{NAMES[2]}.json"
    record.write_bytes(record.read_bytes()[:-10])
    assert scan_done(tmp_path, plan).names == set()


def test_a_tar_younger_than_its_record_is_believed_by_its_hash_alone(tmp_path, plan):
    for index in (0, 1):
        commit(tmp_path, plan, index)
        path = tmp_path / NAMES[index]
        touch_later(path.with_suffix(".tar"), path.with_suffix(".json"))
    tar = tmp_path / f"{NAMES[1]}.tar"
    stat = tar.stat()
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    os.utime(tar, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    assert scan_done(tmp_path, plan).names == {NAMES[0]}
    # The check is not made again while the tar has that time.
    lines = (tmp_path / COMMITS_FILE).read_text().splitlines()
    assert json.loads(lines[0])["tar_checked_ns"] > 0
    assert scan_done(tmp_path, plan).names == {NAMES[0]}


def test_a_shard_of_other_sources_is_not_done(tmp_path, plan):
    commit(tmp_path, plan, 0)
    os.replace(tmp_path / f"{NAMES[0]}.tar", tmp_path / f"{NAMES[1]}.tar")
    record = json.loads((tmp_path / f"{NAMES[0]}.json").read_text()) | {"name": NAMES[1]}
    (tmp_path / f"{NAMES[0]}.json").unlink()
    (tmp_path / f"{NAMES[1]}.json").write_text(json.dumps(record))
    assert scan_done(tmp_path, plan).names == set()


def test_the_cache_saves_reading_records_and_can_be_lost(tmp_path, plan):
    commit(tmp_path, plan, 0)
    commit(tmp_path, plan, 1)
    done = scan_done(tmp_path, plan, keep_cache=False)
    assert not (tmp_path / COMMITS_FILE).exists()
    assert scan_done(tmp_path, plan) == done
    cache = (tmp_path / COMMITS_FILE).read_bytes()
    assert len(cache.splitlines()) == 2
    # Another text of the same size and time: only the cache can still know what it said.
    record = tmp_path / f"{NAMES[0]}.json"
    stat = record.stat()
    record.write_bytes(b" " * stat.st_size)
    os.utime(record, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    assert scan_done(tmp_path, plan) == done
    (tmp_path / COMMITS_FILE).unlink()
    assert scan_done(tmp_path, plan).names == {NAMES[1]}


def test_torn_and_foreign_lines_of_the_cache_are_ignored_and_removed(tmp_path, plan):
    commit(tmp_path, plan, 0)
    done = scan_done(tmp_path, plan)
    cache = (tmp_path / COMMITS_FILE).read_bytes()
    (tmp_path / COMMITS_FILE).write_bytes(b'[1]\n{"name": "x"}\n\xff\n' + cache + cache[:40])
    assert scan_done(tmp_path, plan) == done
    assert (tmp_path / COMMITS_FILE).read_bytes() == cache


def test_a_record_that_was_replaced_is_read_again(tmp_path, plan):
    commit(tmp_path, plan, 0)
    assert scan_done(tmp_path, plan).totals["rejected"] == 0
    commit(tmp_path, plan, 0, reasons=("cut",))
    assert scan_done(tmp_path, plan).totals["rejected"] == 1


@pytest.mark.parametrize("suffix", ["json", "tar"])
def test_what_cannot_be_read_stops_the_run_and_stays(tmp_path, plan, suffix):
    commit(tmp_path, plan, 0)
    path = tmp_path / f"{NAMES[0]}.{suffix}"
    path.unlink()
    path.symlink_to(path.name)  # not even its size can be asked for
    with pytest.raises(RunError, match=rf"{NAMES[0]}\.{suffix} cannot be read"):
        scan_done(tmp_path, plan)
    if suffix == "json":
        with pytest.raises(RunError, match=r"\.json cannot be read"):
            read_commit(tmp_path, NAMES[0])
    with pytest.raises(OSError, match=suffix):
        shards.committed(tmp_path, NAMES[0])
    assert path.is_symlink()


def test_damaged_shards_are_moved_aside_and_never_over_another(tmp_path, plan):
    for text in ("one", "two"):
        commit(tmp_path, plan, 0)
        (tmp_path / f"{NAMES[0]}.json").write_text(text)
        clean_up(tmp_path, plan, scan_done(tmp_path, plan))
    assert not list(tmp_path.glob("shard-*"))
    aside = {path.name: path.read_bytes() for path in (tmp_path / "damaged").iterdir()}
    assert sorted(aside) == [
        "shard-000000.1.json",
        "shard-000000.1.tar",
        "shard-000000.json",
        "shard-000000.tar",
    ]
    assert aside["shard-000000.1.json"] == b"two"
    (note,) = damaged_notes(tmp_path)
    assert note.startswith("2 damaged shards lie in")


def test_clean_up_leaves_what_is_done_and_nothing_of_dead_attempts(tmp_path, plan):
    commit(tmp_path, plan, 0)
    commit(tmp_path, plan, 1)
    commit(tmp_path, plan, 2)
    (tmp_path / f"{NAMES[1]}.json").unlink()
    (tmp_path / f"{NAMES[2]}.tar").unlink()
    (tmp_path / f".{NAMES[2]}.json.123.tmp").touch()
    (tmp_path / WORK_FOLDER / "run").mkdir(parents=True)
    (tmp_path / "shard-000001.tar.copy").touch()
    (tmp_path / "notes.json").touch()
    done = scan_done(tmp_path, plan)
    assert clean_up(tmp_path, plan, done) == done
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "commits.jsonl",
        "damaged",
        "notes.json",
        "plan.arrow",
        "plan.json",
        f"{NAMES[0]}.json",
        f"{NAMES[0]}.tar",
        "shard-000001.tar.copy",
    ]


def test_clean_up_puts_finished_repacks_in_their_place_first(tmp_path, plan):
    commit(tmp_path, plan, 0)
    waiting = tmp_path / WORK_FOLDER / "repack" / NAMES[0]
    waiting.mkdir(parents=True)
    commit(waiting, plan, 0, reasons=("duplicate",))
    (waiting / "ready").touch()
    done = scan_done(tmp_path, plan)
    assert done.totals["rejected"] == 0
    after = clean_up(tmp_path, plan, done)
    assert (after.names, after.totals["rejected"]) == ({NAMES[0]}, 1)
    assert not (tmp_path / WORK_FOLDER).exists()


def test_second_run_on_a_folder_is_refused(tmp_path):
    with (
        folder_lock(tmp_path),
        pytest.raises(FolderInUseError, match="is being written by process"),
        folder_lock(tmp_path),
    ):
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
    worker.end(Event(source="poison", verdict="failed", reasons=(), clips=0), given_up=True)
    assert worker.begin("poison") == 3
    worker.begin("good")
    worker.end(Event(source="good", verdict="kept", reasons=(), clips=2))
    assert worker.begin("good") == 0
    journal.close()
    assert list(tmp_path.iterdir()) == []


def test_journal_tells_each_event_once_with_its_times(tmp_path):
    journal, run = RunJournal.create(tmp_path)
    one, two = RunJournal(tmp_path, run), RunJournal(tmp_path, run)
    first = Event(
        source="a", verdict="failed", reasons=("x",), clips=0, kind="timeout", seconds={"pose": 1.5}
    )
    second = Event(source="b", verdict="kept", reasons=(), clips=1)
    one.end(first)
    assert journal.new_events() == [first]
    assert journal.new_events() == []
    two.end(second)
    one.end(second)
    assert journal.new_events() == [second, second]


def test_an_event_that_is_still_being_written_waits_for_its_end(tmp_path):
    journal, run = RunJournal.create(tmp_path)
    event = Event(source="a", verdict="kept", reasons=(), clips=1)
    RunJournal(tmp_path, run).end(event)
    (path,) = (journal.root / "events").iterdir()
    line = path.read_bytes()
    path.write_bytes(line + line[:20])
    assert journal.new_events() == [event]
    path.write_bytes(line + line)
    assert journal.new_events() == [event]


def test_an_attempts_folder_goes_with_the_attempt(tmp_path, plan):
    journal, _ = RunJournal.create(tmp_path)

    def fail() -> None:
        with journal.attempt(plan.shard(0)) as folder:
            (folder / "x").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert sorted(path.name for path in journal.root.iterdir()) == ["events", "started"]
