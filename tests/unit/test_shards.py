"""Shards on disk: the same bytes every time, all or nothing, damage found."""

import os
import tarfile
import time

import pytest

from pipelines import schema, shards
from pipelines.schema import ShardError, ShardRecord

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
