"""Shards on disk: the same bytes every time, all or nothing, damage found."""

import os
import tarfile
import time

import pytest

from pipelines import schema, shards
from pipelines.curation.commits import read_commit
from pipelines.schema import ClipRecord, ShardError, ShardRecord, SourceRecord
from pipelines.tars import Slice

MEMBERS = {"b_000.json": b"{}", "a_000.json": b'{"a": 1}', "a_000.pose.npz": b"x" * 700}


def commit(folder, index=0, members=MEMBERS, **changes) -> ShardRecord:
    tar = folder / f".staged-{index}.tar"
    sizes = shards.write_tar(tar, members)
    fields = {
        "name": schema.shard_name(index),
        "config_hash": "c",
        "tar_sha256": shards.sha256_file(tar),
        "tar_bytes": tar.stat().st_size,
        "members": sizes,
        "counts": {},
        "kind": "other",
    }
    record = ShardRecord(**(fields | changes))
    shards.commit(folder, tar, record)
    return record


def test_tar_bytes_depend_on_the_members_alone(tmp_path):
    path = tmp_path / "late.json"
    path.write_bytes(MEMBERS["a_000.json"])
    os.utime(path, (1, 1))
    shards.write_tar(tmp_path / "one.tar", MEMBERS)
    time.sleep(0.01)
    shards.write_tar(tmp_path / "two.tar", dict(sorted(MEMBERS.items())) | {"a_000.json": path})
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()


def test_other_tools_can_read_the_tar(tmp_path):
    shards.write_tar(tmp_path / "one.tar", MEMBERS)
    with tarfile.open(tmp_path / "one.tar") as archive:
        assert archive.getnames() == sorted(MEMBERS)
        stream = archive.extractfile("a_000.json")
        assert stream is not None
        assert stream.read() == MEMBERS["a_000.json"]


def test_index_points_at_the_bytes(tmp_path):
    shards.write_tar(tmp_path / "one.tar", MEMBERS)
    index = shards.index_tar(tmp_path / "one.tar")
    assert {
        name: shards.read_member(tmp_path / "one.tar", *place) for name, place in index.items()
    } == MEMBERS


@pytest.mark.parametrize("name", ["../a.mp4", "a b.mp4", "x/y.json"])
def test_names_outside_the_contract_are_not_written(tmp_path, name):
    with pytest.raises(ShardError):
        shards.write_tar(tmp_path / "one.tar", {name: b""})
    assert not (tmp_path / "one.tar").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE])
def test_links_and_folders_in_a_tar_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "one.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        entry = tarfile.TarInfo("a_000.json")
        entry.type, entry.linkname = kind, "/etc/passwd"
        archive.addfile(entry)
    with pytest.raises(ShardError):
        shards.index_tar(tmp_path / "one.tar")


@pytest.mark.parametrize("length", [0, 100, 512, 1500, 2600])
def test_cut_tar_is_refused(tmp_path, length):
    shards.write_tar(tmp_path / "one.tar", MEMBERS)
    os.truncate(tmp_path / "one.tar", length)
    with pytest.raises(ShardError):
        shards.index_tar(tmp_path / "one.tar")


def test_commit_can_be_read_back_and_leaves_nothing_else(tmp_path):
    record = commit(tmp_path)
    assert shards.read_records(tmp_path) == [record]
    assert shards.committed(tmp_path, record.name) == record
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "shard-000000.json",
        "shard-000000.tar",
    ]


def test_tar_that_is_not_the_recorded_one_is_not_committed(tmp_path):
    with pytest.raises(ShardError, match="SHA-256"):
        commit(tmp_path, tar_sha256="0" * 64)
    assert not list(tmp_path.glob("shard-*"))


def test_a_large_record_is_read_as_it_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr(schema, "MAX_JSON_BYTES", 2000)
    many = {f"a_{number:03d}.json": b"{}" for number in range(200)}
    record = commit(tmp_path, members=many)
    assert (tmp_path / f"{record.name}.json").stat().st_size > 2000
    assert shards.committed(tmp_path, record.name) == record
    found = read_commit(tmp_path, record.name)
    assert found is not None
    assert found.tar_sha256 == record.tar_sha256


def test_a_record_that_nobody_would_read_is_not_committed(tmp_path, monkeypatch):
    monkeypatch.setattr(schema, "MAX_RECORD_BYTES", 100)
    with pytest.raises(ShardError, match=r"output\.sources_per_shard"):
        commit(tmp_path)
    assert not list(tmp_path.glob("shard-*"))


def test_records_come_in_the_order_of_their_numbers(tmp_path):
    for index in (2, 0, 10):
        commit(tmp_path, index)
    assert [schema.shard_index(record.name) for record in shards.read_records(tmp_path)] == [
        0,
        2,
        10,
    ]


def test_verify_passes_whole_shards_and_names_every_damage(tmp_path):
    for index in range(4):
        commit(tmp_path, index, {f"k{index}_000.json": b"{}"})
    assert shards.verify(tmp_path).problems == ()

    flipped = bytearray((tmp_path / "shard-000001.tar").read_bytes())
    flipped[600] ^= 1
    (tmp_path / "shard-000001.tar").write_bytes(flipped)
    os.truncate(tmp_path / "shard-000002.tar", 700)
    (tmp_path / "shard-000003.json").unlink()
    problems = "\n".join(shards.verify(tmp_path).problems)
    assert "shard-000001.tar has been changed" in problems
    assert "shard-000002.tar has 700 bytes" in problems
    assert "shard-000003.tar has no record" in problems
    assert shards.committed(tmp_path, "shard-000000") is not None
    assert shards.committed(tmp_path, "shard-000001") is None
    assert shards.committed(tmp_path, "shard-000002") is None


def test_verify_parses_the_members(tmp_path):
    commit(tmp_path, 0, {"a_000.json": b"not json"})
    commit(tmp_path, 1, {"b_000.pose.npz": b"not arrays"})
    problems = "\n".join(shards.verify(tmp_path).problems)
    assert "a_000.json is not JSON" in problems
    assert "b_000.pose.npz is not a readable array file" in problems


def test_folder_without_shards_says_what_to_give(tmp_path):
    with pytest.raises(ShardError, match="no committed shards"):
        shards.read_records(tmp_path)


def test_a_tar_is_believed_by_its_size_unless_it_is_newer_than_its_record(tmp_path):
    record = commit(tmp_path)
    tar, path = tmp_path / f"{record.name}.tar", tmp_path / f"{record.name}.json"
    flipped = bytearray(tar.read_bytes())
    flipped[600] ^= 1
    tar.write_bytes(flipped)
    assert shards.committed(tmp_path, record.name) is None
    os.utime(tar, ns=(0, path.stat().st_mtime_ns))
    assert shards.committed(tmp_path, record.name) == record
    assert shards.committed(tmp_path, record.name, deep=True) is None


def test_records_are_read_one_at_a_time(tmp_path):
    for index in range(3):
        commit(tmp_path, index)
    (tmp_path / "shard-000002.json").write_bytes(b"{")
    records = shards.iter_records(tmp_path)
    assert [next(records).name, next(records).name] == ["shard-000000", "shard-000001"]
    with pytest.raises(ShardError, match="is not JSON"):
        next(records)


def test_verify_finds_a_clip_that_is_in_two_shards(tmp_path):
    clip = ClipRecord(key="a_000", start=0.0, end=1.0, verdict="kept", num_frames=1)
    source = SourceRecord(id="a", sha256="", bytes=0, uris=(), verdict="kept", clips=(clip,))
    for index in range(2):
        commit(tmp_path, index, {"a_000.json": b"{}"}, sources=(source,))
    problems = shards.verify(tmp_path).problems
    assert problems == ("shard-000001.tar: clip a_000 is also in shard-000000.",)


def test_a_part_of_a_file_is_a_member_like_any_other(tmp_path):
    shards.write_tar(tmp_path / "one.tar", MEMBERS)
    index = shards.index_tar(tmp_path / "one.tar")
    slices = {name: Slice(tmp_path / "one.tar", *place) for name, place in index.items()}
    shards.write_tar(tmp_path / "two.tar", slices)
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()
    too_long = Slice(tmp_path / "one.tar", 0, 1 << 20)
    with pytest.raises(ShardError, match="cut short"):
        shards.write_tar(tmp_path / "three.tar", {"a_000.json": too_long})
    assert not (tmp_path / "three.tar").exists()
