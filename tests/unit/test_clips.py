"""Random access to clips: the right frames, the right arrays, damage refused."""

import os
from pathlib import Path

import numpy as np
import pytest

from pipelines import schema, shards
from pipelines.clips import ClipStore
from pipelines.schema import ClipRecord, ShardError, ShardRecord, SourceRecord
from pipelines.video import encode

FPS, HEIGHT, WIDTH = 12.5, 48, 64


def level(frame: int) -> int:
    """A brightness that differs by more than the coding error from frame to frame."""
    return 20 + 37 * frame % 210


def clip_members(
    folder: Path, key: str, num_frames: int, num_keypoints: int = 18
) -> dict[str, bytes | Path]:
    frames = [np.full((HEIGHT, WIDTH, 3), level(frame), np.uint8) for frame in range(num_frames)]
    video = folder / f"{key}.mp4"
    encode(video, frames, fps=FPS)
    pose = {
        "keypoints": np.full((num_frames, 2, num_keypoints, 2), 0.5, np.float32),
        "score": np.ones((num_frames, 2, num_keypoints), np.float32),
        "boxes": np.zeros((num_frames, 2, 4), np.float32),
    }
    face = {
        "boxes": np.zeros((num_frames, 1, 4), np.float32),
        "landmarks": np.zeros((num_frames, 1, 5, 2), np.float32),
        "score": np.ones((num_frames, 1), np.float32),
        "model": np.array("test"),
    }
    return {
        f"{key}.mp4": video,
        f"{key}.pose.npz": schema.pack_arrays(pose),
        f"{key}.face.npz": schema.pack_arrays(face),
        f"{key}.json": schema.encode_json({"key": key}),
    }


def write_shard(
    folder: Path, work: Path, index: int, clips: dict[str, int], num_keypoints: int = 18
) -> None:
    members: dict[str, bytes | Path] = {}
    records = []
    for key, num_frames in clips.items():
        members |= clip_members(work, key, num_frames, num_keypoints)
        records.append(
            ClipRecord(
                key=key,
                start=0.0,
                end=num_frames / FPS,
                verdict="kept",
                num_frames=num_frames,
                fps=FPS,
                width=WIDTH,
                height=HEIGHT,
            )
        )
    rejected = ClipRecord(key=f"no{index}_000", start=0, end=1, verdict="rejected")
    source = SourceRecord(
        id="a", sha256="a", bytes=1, uris=("a",), verdict="kept", clips=(*records, rejected)
    )
    tar = work / "staged.tar"
    sizes = shards.write_tar(tar, members)
    record = ShardRecord(
        name=schema.shard_name(index),
        config_hash="c",
        tar_sha256=shards.sha256_file(tar),
        tar_bytes=tar.stat().st_size,
        members=sizes,
        counts={},
        sources=(source,),
    )
    shards.commit(folder, tar, record)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "shards"
    root.mkdir()
    write_shard(root, tmp_path, 0, {"bb_000": 60, "aa_000": 5})
    write_shard(root, tmp_path, 1, {"cc_000": 9})
    return root


def test_store_numbers_the_kept_clips_and_describes_them(folder):
    store = ClipStore(folder)
    assert store.keys == ("aa_000", "bb_000", "cc_000")
    assert len(store) == 3
    assert [store.num_frames(i) for i in range(3)] == [5, 60, 9]
    assert store.fps(1) == FPS
    assert store.size(1) == (HEIGHT, WIDTH)
    assert store.meta(2) == {"key": "cc_000"}
    assert store.index("bb_000") == 1


def test_store_gives_exactly_the_frames_asked_for(folder):
    indices = [59, 0, 13, 12, 58, 12]
    frames = ClipStore(folder).frames(1, indices)
    assert frames.shape == (6, HEIGHT, WIDTH, 3)
    assert frames.dtype == np.uint8
    found = frames.reshape(6, -1).mean(axis=1)
    np.testing.assert_allclose(found, [level(index) for index in indices], atol=6)


def test_every_frame_of_a_clip_is_there(folder):
    frames = ClipStore(folder).frames(1, range(60))
    found = frames.reshape(60, -1).mean(axis=1)
    np.testing.assert_allclose(found, [level(index) for index in range(60)], atol=6)


def test_frames_can_be_scaled(folder):
    assert ClipStore(folder).frames(0, [4], size=(24, 40)).shape == (1, 24, 40, 3)


def test_pose_and_faces_have_the_clips_length(folder):
    store = ClipStore(folder)
    assert store.pose(1).keypoints.shape == (60, 2, 18, 2)
    assert store.faces(1).landmarks.shape == (60, 1, 5, 2)
    assert store.faces(1).model == "test"


def test_bodies_and_whole_bodies_may_lie_in_one_folder(folder, tmp_path):
    write_shard(folder, tmp_path, 2, {"dd_000": 4}, num_keypoints=128)
    store = ClipStore(folder)
    assert [store.pose(i).keypoints.shape[2] for i in range(4)] == [18, 18, 18, 128]
    assert shards.verify(folder).problems == ()


@pytest.mark.parametrize("indices", [[60], [-1], []])
def test_frames_outside_the_clip_are_refused(folder, indices):
    with pytest.raises(IndexError, match="from 0 to 59"):
        ClipStore(folder).frames(1, indices)


def test_fingerprint_is_of_the_data_not_of_the_place(folder, tmp_path):
    before = ClipStore(folder).fingerprint
    moved = folder.rename(tmp_path / "elsewhere")
    assert ClipStore(moved).fingerprint == before
    (moved / "shard-000001.json").unlink()
    assert ClipStore(moved).fingerprint != before


def test_uncommitted_tar_is_no_part_of_the_store(folder):
    (folder / "shard-000001.json").unlink()
    assert ClipStore(folder).keys == ("aa_000", "bb_000")


def test_cut_shard_is_refused_when_the_store_opens(folder):
    os.truncate(folder / "shard-000000.tar", 5000)
    with pytest.raises(ShardError, match=r"shard-000000\.tar has 5000 bytes"):
        ClipStore(folder)


@pytest.mark.parametrize(
    ("old", "new"),
    [('"num_frames":9', '"num_frames":-9'), ('"fps":12.5', '"fps":0'), ("cc_000", "../cc")],
)
def test_records_that_cannot_be_are_refused(folder, old, new):
    path = folder / "shard-000001.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ShardError):
        ClipStore(folder)


def test_damaged_clip_is_an_error_that_names_it(folder):
    tar = folder / "shard-000001.tar"
    offset, size = shards.index_tar(tar)["cc_000.mp4"]
    data = bytearray(tar.read_bytes())
    data[offset : offset + size] = bytes(size)
    tar.write_bytes(data)
    with pytest.raises(ShardError, match=r"cc_000\.mp4 does not decode"):
        ClipStore(folder).frames(2, [0])


def test_verify_accepts_good_clips_and_counts_them(folder):
    report = shards.verify(folder)
    assert report.problems == ()
    assert (report.shards, report.clips) == (2, 3)
