"""Repacking: the clips asked for, streamed; the old shard or the new one whenever it dies."""

import os
import random
import shutil
import signal
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines import schema, shards, spares
from pipelines.clips import ClipStore
from pipelines.curation.outcomes import ClipRuling, SourceRuling, settle
from pipelines.curation.repack import SpareClips, repack, roll_forward
from pipelines.schema import ClipRecord, ShardError, ShardRecord, SourceRecord
from tests.unit.curated_run import (
    Video,
    clip,
    clip_members,
    contents,
    dies_at,
    run,
    settings,
)

NAME = "shard-000000"
VIDEOS = {name: Video(name, (clip(), clip())) for name in "abc"}
KEEP, DROP = ClipRuling(), ClipRuling(reasons=("blurred",))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return run(tmp_path / "run", VIDEOS, settings())


def rejecting(folder: Path, *numbers: int, hashed: str = "new") -> tuple[ShardRecord, ShardRecord]:
    """The shard's record, and what it becomes when its clips of those numbers are rejected."""
    before = shards.read_record(folder / f"{NAME}.json")
    clips = iter(range(6))
    rulings = [
        SourceRuling(clips=tuple(DROP if next(clips) in numbers else KEEP for _ in source.clips))
        for source in before.sources
    ]
    return before, settle(before, rulings, hashed, SpareClips(folder, NAME).find)


def members(folder: Path) -> dict[str, bytes]:
    tar = folder / f"{NAME}.tar"
    return {name: shards.read_member(tar, *place) for name, place in shards.index_tar(tar).items()}


def test_a_shard_holds_what_its_record_keeps_and_nothing_else(folder):
    old = members(folder)
    before, after = rejecting(folder, 1, 4)
    repack(folder, before, after)
    assert shards.verify(folder).problems == ()
    record = shards.committed(folder, NAME, deep=True)
    assert record is not None
    assert record.counts["clips_kept"] == 4
    store = ClipStore(folder)
    assert store.keys == tuple(sorted(entry.key for entry in after.kept_clips))
    assert [store.meta(i)["config_hash"] for i in range(4)] == ["new"] * 4
    for name, data in members(folder).items():
        if not name.endswith(".json"):
            assert data == old[name]
    assert roll_forward(folder) == 0
    assert not (folder / ".work").exists()


def test_the_same_record_leaves_the_same_bytes(folder):
    old = contents(folder)
    before = shards.read_record(folder / f"{NAME}.json")
    repack(folder, before, before)
    assert contents(folder) == old


def test_a_tar_whose_clips_stay_is_not_written_again(folder):
    before = shards.read_record(folder / f"{NAME}.json")
    inode = (folder / f"{NAME}.tar").stat().st_ino
    repack(folder, before, replace(before, versions={"python": "9"}))
    assert (folder / f"{NAME}.tar").stat().st_ino == inode
    assert shards.read_record(folder / f"{NAME}.json").versions == {"python": "9"}


def test_new_members_come_in(folder):
    before, after = rejecting(folder, 0, 1, 2, 3, 4, 5)
    repack(folder, before, after)
    before, after = rejecting(folder, 1, 2, 3, 4, 5)
    entry = replace(before.sources[0].clips[0], num_frames=4, fps=8.0, width=32, height=32)
    new = clip_members(entry, "new")
    source = replace(before.sources[0], verdict="kept", clips=(replace(entry, verdict="kept"),))
    repack(folder, before, replace(after, sources=(source, *before.sources[1:])), new)
    assert members(folder) == new
    assert shards.verify(folder).problems == ()


def test_a_clip_that_is_nowhere_is_refused_and_nothing_changes(folder):
    before, after = rejecting(folder, 0, 1)
    repack(folder, before, after)
    old = contents(folder)
    before = shards.read_record(folder / f"{NAME}.json")
    ghost = ClipRecord(key="ghost_000", start=0, end=1, verdict="kept", num_frames=1)
    source = replace(before.sources[0], clips=(ghost,))
    with pytest.raises(ShardError, match=r"there is no ghost_000\.mp4 to keep"):
        repack(folder, before, replace(before, sources=(source,)))
    assert contents(folder) == old


def test_damage_is_not_copied_and_given_a_sum_of_its_own(folder):
    tar = folder / f"{NAME}.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    before, after = rejecting(folder, 5)
    with pytest.raises(ShardError, match="has been changed"):
        repack(folder, before, after)
    assert tar.read_bytes() == data


def test_clips_put_aside_come_back_byte_for_byte(folder):
    old = contents(folder)
    config_hash = shards.read_record(folder / f"{NAME}.json").config_hash
    repack(folder, *rejecting(folder, 0, 3), put_aside=True)
    assert shards.verify(folder).spare_clips == 2
    repack(folder, *rejecting(folder, 0, 3, 5), put_aside=True)
    assert shards.verify(folder) == shards.VerifyReport(
        shards=1,
        clips=3,
        bytes=(folder / f"{NAME}.tar").stat().st_size,
        spare_clips=3,
    )
    repack(folder, *rejecting(folder, 3), put_aside=True)
    assert shards.verify(folder).spare_clips == 1
    repack(folder, *rejecting(folder, hashed=config_hash), put_aside=True)
    assert contents(folder) == old
    assert not (folder / "spare").exists()


def test_damaged_spare_clips_are_as_if_they_were_not_there(folder):
    repack(folder, *rejecting(folder, 0), put_aside=True)
    tar = spares.spare_tar(folder, NAME)
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    assert "spare-000000.tar has been changed" in "".join(shards.verify(folder).problems)
    before, after = rejecting(folder)
    assert after.sources[0].clips[0].reasons == ("not_stored",)
    repack(folder, before, after, put_aside=True)
    assert not tar.exists()
    assert shards.verify(folder).problems == ()


@pytest.mark.parametrize("first", [(), (1,)], ids=["makes spares", "uses spares"])
def test_a_death_at_any_step_leaves_the_old_shard_or_the_new_one(tmp_path, first):
    start = run(tmp_path / "start", VIDEOS, settings())
    if first:
        repack(start, *rejecting(start, *first), put_aside=True)
    target = (0, 4) if not first else ()
    whole = shutil.copytree(start, tmp_path / "whole")
    repack(whole, *rejecting(whole, *target), put_aside=True)
    old, new = contents(start), contents(whole)
    assert old != new
    outcomes = []
    for step in range(100):
        folder = shutil.copytree(start, tmp_path / f"killed-{step}")
        before, after = rejecting(folder, *target)
        killed = dies_at(step, lambda f=folder, b=before, a=after: repack(f, b, a, put_aside=True))
        # Nor does it matter if what puts it right dies too.
        if killed and step % 3 == 0:
            dies_at(step % 5, lambda f=folder: roll_forward(f))
        roll_forward(folder)
        found = contents(folder)
        assert found in (old, new)
        assert not (folder / ".work").exists()
        outcomes.append(found == new)
        shutil.rmtree(folder)
        if not killed:
            break
    assert outcomes == sorted(outcomes)
    assert outcomes.count(False) > 5
    assert outcomes.count(True) > 5


def test_kills_at_random_moments_leave_nothing_torn(tmp_path):
    start = run(tmp_path / "start", VIDEOS, settings())
    whole = shutil.copytree(start, tmp_path / "whole")
    change = rejecting(whole, 2)
    began = time.monotonic()
    repack(whole, *change, put_aside=True)
    usual = time.monotonic() - began
    old, new = contents(start), contents(whole)
    clock = random.Random(0)
    for _ in range(25):
        folder = shutil.copytree(start, tmp_path / "killed")
        child = os.fork()
        if child == 0:
            repack(folder, *change, put_aside=True)
            os._exit(0)
        time.sleep(clock.uniform(0, 1.3 * usual))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        roll_forward(folder)
        assert contents(folder) in (old, new)
        shutil.rmtree(folder)


def test_tars_are_streamed(tmp_path):
    big = os.urandom(8 << 20)
    files, clips = {}, []
    for number in range(12):
        entry = ClipRecord(
            key=f"k_{number:03d}", start=0, end=1, verdict="kept", num_frames=4, fps=8.0
        )
        clips.append(entry)
        files |= clip_members(entry, "old") | {f"{entry.key}.mp4": big}
    source = SourceRecord(
        id="a", sha256="", bytes=0, uris=("a",), verdict="kept", clips=tuple(clips)
    )
    tar = tmp_path / ".staged"
    sizes = shards.write_tar(tar, files)
    record = ShardRecord(
        name=NAME,
        config_hash="old",
        tar_sha256=shards.sha256_file(tar),
        tar_bytes=tar.stat().st_size,
        members=sizes,
        counts={},
        sources=(source,),
    )
    shards.commit(tmp_path, tar, record)
    del files
    after = settle(record, [SourceRuling(clips=(DROP,) * 5 + (KEEP,) * 7)], "new")
    tracemalloc.start()
    try:
        repack(tmp_path, record, after, put_aside=True)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    committed = shards.committed(tmp_path, NAME, deep=True)
    assert committed is not None
    assert len(committed.members) == 7 * len(schema.CLIP_MEMBERS)
