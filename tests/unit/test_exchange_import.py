"""Other layouts become shards: right frames and people, the same bytes, nothing else read."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import schema
from pipelines.clips import ClipStore
from pipelines.curation.ledger import FolderInUseError, folder_lock
from pipelines.exchange.frame_folder import ExchangeError
from pipelines.exchange.import_config import ImportConfig
from pipelines.exchange.import_pool import ImportPool
from pipelines.exchange.importing import import_shards
from pipelines.exchange.layouts import list_source
from pipelines.schema import SourceRecord
from pipelines.shards import read_records, verify
from pipelines.video import encode
from tests.unit.foreign_layouts import (
    FACE,
    HEIGHT,
    NUM_FRAMES,
    WIDTH,
    keypoints,
    link,
    picture,
    psnr,
    shard_bytes,
    write_clip,
    write_frames,
    write_set,
)

pytestmark = pytest.mark.usefixtures("no_models")


def take(source: Path, out: Path, **options):
    return import_shards(source, out, jobs=0, **options)


def records(out: Path) -> dict[str, SourceRecord]:
    return {source.uris[0]: source for shard in read_records(out) for source in shard.sources}


def test_a_clip_of_the_predecessor_comes_over_with_frames_people_and_faces(tmp_path: Path) -> None:
    source = write_set(tmp_path / "animation_data", 1)
    summary = take(source, tmp_path / "out")
    assert (summary.layout, summary.kept, summary.failed) == ("stableanimator", 1, 0)
    assert verify(tmp_path / "out").problems == ()
    store = ClipStore(tmp_path / "out")
    assert (store.fps(0), store.size(0), store.num_frames(0)) == (30.0, (HEIGHT, WIDTH), NUM_FRAMES)
    wanted = np.stack([picture(index, 1) for index in range(NUM_FRAMES)])
    assert psnr(store.frames(0, range(NUM_FRAMES)), wanted) > 33
    np.testing.assert_array_equal(store.pose(0).keypoints, keypoints()["keypoints"])
    faces = store.faces(0)
    expected = np.array(FACE) / (WIDTH, HEIGHT, WIDTH, HEIGHT)
    np.testing.assert_allclose(faces.boxes[0, 0], expected, atol=1e-6)
    assert faces.score[:, 0].tolist() == [1.0] * (NUM_FRAMES - 1) + [0.0]


def test_the_record_says_where_everything_is_from(tmp_path: Path) -> None:
    take(write_set(tmp_path / "set", 1), tmp_path / "out")
    record = records(tmp_path / "out")["rec/00001"]
    assert record.provenance["keypoints_from"] == "00001.pose.npz"
    assert record.provenance["faces_from"] == "masks in faces/"
    assert record.provenance["pose_pictures"] == f"{NUM_FRAMES} in poses/, not read"
    assert record.provenance["fps_from"] == "given for all"
    assert record.info["pictures"] == NUM_FRAMES
    meta = ClipStore(tmp_path / "out").meta(0)
    assert meta["provenance"]["uris"] == ["rec/00001"]
    assert (tmp_path / "out" / "thumbs" / f"{record.id}.jpg").is_file()


def test_frames_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = ["frame_2.png", "frame_9.png", "frame_10.png", "frame_100.png"]
    write_frames(tmp_path / "set" / "a" / "images", names)
    np.savez(tmp_path / "set" / "a.pose.npz", **keypoints(4))
    take(tmp_path / "set", tmp_path / "out")
    frames = ClipStore(tmp_path / "out").frames(0, range(4))
    for index in range(4):
        assert psnr(frames[index], picture(index)) > 30
    assert records(tmp_path / "out")["a"].info["missing_numbers"] == 95


@pytest.mark.parametrize("inside", ["images", "."])
def test_tiktok_frames_are_played_at_the_rate_that_is_given(tmp_path: Path, inside: str) -> None:
    clip = tmp_path / "set" / "00001"
    write_frames(clip / inside, [f"{index:04d}.png" for index in range(1, 7)])
    write_frames(clip / "masks", [f"{index:04d}.png" for index in range(1, 7)])
    np.savez(tmp_path / "set" / "00001.dwpose.npz", **keypoints())
    summary = take(tmp_path / "set", tmp_path / "out", config=ImportConfig(fps=12.5))
    assert (summary.layout, summary.items, summary.kept) == ("tiktok", 1, 1)
    assert ClipStore(tmp_path / "out").fps(0) == 12.5


def test_an_odd_size_keeps_people_in_their_place(tmp_path: Path) -> None:
    folder = tmp_path / "set" / "a" / "images"
    folder.mkdir(parents=True)
    for index in range(NUM_FRAMES):
        Image.fromarray(picture(index, size=(63, 47))).save(folder / f"{index}.png")
    np.savez(tmp_path / "set" / "a.pose.npz", **keypoints())
    take(tmp_path / "set", tmp_path / "out")
    store = ClipStore(tmp_path / "out")
    assert store.size(0) == (64, 48)
    pixels = store.pose(0).keypoints * (48, 64)
    np.testing.assert_allclose(pixels, keypoints()["keypoints"] * (47, 63), atol=1e-3)


def test_videos_find_keypoints_beside_them_and_elsewhere(tmp_path: Path) -> None:
    source = tmp_path / "set"
    (source / "keys").mkdir(parents=True)
    frames = [picture(index) for index in range(NUM_FRAMES)]
    for name in ("beside", "elsewhere", "alone"):
        encode(source / f"{name}.mp4", frames, fps=10 if name == "beside" else 20)
    arrays = keypoints()
    subset = np.where(np.ones((NUM_FRAMES, 1, 18)), np.arange(18), -1).astype(np.float32)
    # DWPose's own arrays: points of all people, and which of them are whose.
    np.savez(
        source / "beside.dwpose.npz",
        candidate=arrays["keypoints"].reshape(-1, 18, 2),
        subset=subset,
    )
    np.savez(source / "keys" / "elsewhere.npz", **arrays)
    np.savez(source / "keys" / "nobody.pose.npz", **arrays)
    summary = take(source, tmp_path / "out")
    assert (summary.layout, summary.kept, summary.failed) == ("dwpose", 2, 2)
    assert summary.failures == {
        "alone.mp4": "no keypoints (.npz) of its name were found",
        "keys/nobody.pose.npz": "keypoints without a video of their name",
    }
    store = ClipStore(tmp_path / "out")
    for i in range(2):
        np.testing.assert_allclose(store.pose(i).keypoints, arrays["keypoints"], atol=1e-6)
    assert sorted(store.fps(i) for i in range(2)) == [10.0, 20.0]


def test_lists_choose_the_clips_and_lead_nowhere_else(tmp_path: Path) -> None:
    source = write_set(tmp_path / "set", 3)
    (source / "video_rec_path.txt").write_text(
        "/other/machine/animation_data/rec/00001\n../../rec/00003\n/other/rec/00009\n../../etc\n"
    )
    listing = list_source(source)
    found = {item.uri: item.error for item in listing.items}
    assert found.keys() == {"rec/00001", "rec/00003", "rec/00009", "../etc"}
    assert found["rec/00001"] is None
    assert found["rec/00003"] is None
    assert "not there" in (found["rec/00009"] or "")
    assert "not there" in (found["../etc"] or "")
    assert listing.notes == ("1 folders of clips are in no list, and are left out",)


def test_the_same_clips_give_the_same_bytes_wherever_they_lie(tmp_path: Path) -> None:
    write_set(tmp_path / "one", 3)
    shutil.copytree(tmp_path / "one", tmp_path / "other" / "place")
    (tmp_path / "one" / "bad" / "images").mkdir(parents=True)
    (tmp_path / "other" / "place" / "bad" / "images").mkdir(parents=True)
    config = ImportConfig(clips_per_shard=2)
    take(tmp_path / "one", tmp_path / "out1", config=config)
    import_shards(tmp_path / "other" / "place", tmp_path / "out2", config=config, jobs=2)
    assert shard_bytes(tmp_path / "out1") == shard_bytes(tmp_path / "out2")


def test_an_import_that_died_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    source, out = write_set(tmp_path / "set", 3), tmp_path / "out"
    config = ImportConfig(clips_per_shard=1)
    take(source, out, config=config)
    before = shard_bytes(out)
    untouched = (out / "shard-000000.tar").stat().st_mtime_ns
    (out / "shard-000001.json").unlink()
    (out / "shard-000002.tar").write_bytes(b"torn")
    (out / ".shard-000002.tar.1.tmp").write_bytes(b"half")
    (out / ".work" / "import" / "0").mkdir(parents=True)
    summary = take(source, out, config=config)
    assert (summary.shards_done, summary.shards_resumed, summary.kept) == (2, 1, 3)
    assert (out / "damaged" / "shard-000002.tar").read_bytes() == b"torn"
    assert "1 damaged shard lies in" in summary.notes[-1]
    shutil.rmtree(out / "damaged")
    assert shard_bytes(out) == before
    assert (out / "shard-000000.tar").stat().st_mtime_ns == untouched


def test_a_clip_that_ends_its_process_is_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    write_set(tmp_path / "set", 1)
    (tmp_path / "set" / "rec" / "00000" / "images").mkdir(parents=True)
    # Nothing can be done in this time, so every process that tries is ended.
    config = ImportConfig(timeout_seconds=1e-6)
    summary = import_shards(tmp_path / "set", tmp_path / "out", config=config, jobs=1)
    assert summary.failed == 2
    assert "ended its process twice" in summary.failures["rec/00001"]
    assert "no numbered pictures" in summary.failures["rec/00000"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts what is mapped as data")
def test_a_clip_that_takes_too_much_memory_is_recorded(tmp_path: Path) -> None:
    write_set(tmp_path / "set", 1)
    config = ImportConfig(max_memory=1 << 30, pose="file", face="cascade")
    before = ImportConfig(pose="file", face="cascade")
    assert before.outcome() == config.outcome()
    with ImportPool(tmp_path / "set", config, 1) as pool:
        assert pool._pool is not None
        with pytest.raises(MemoryError):
            pool._pool.submit(bytearray, 2 << 30).result()


def test_two_imports_into_one_folder_refuse_each_other(tmp_path: Path) -> None:
    source, out = write_set(tmp_path / "set", 1), tmp_path / "out"
    out.mkdir()
    with folder_lock(out), pytest.raises(FolderInUseError, match="out"):
        take(source, out)


def test_other_settings_and_other_clips_are_refused_with_the_difference(tmp_path: Path) -> None:
    source, out = write_set(tmp_path / "set", 1), tmp_path / "out"
    take(source, out)
    with pytest.raises(ExchangeError, match=r"fps: 30\.0 → 24\.0"):
        take(source, out, config=ImportConfig(fps=24))
    write_clip(source / "rec" / "00007")
    with pytest.raises(ExchangeError, match="new: rec/00007"):
        take(source, out)
    curated = tmp_path / "curated"
    shutil.copytree(out, curated)
    os.rename(curated / "import.json", curated / "plan.json")
    with pytest.raises(ExchangeError, match="another run"):
        take(source, curated)


def test_the_same_pictures_twice_are_one_clip(tmp_path: Path) -> None:
    write_clip(tmp_path / "set" / "rec" / "a", seed=1)
    write_clip(tmp_path / "set" / "vec" / "b", seed=1)
    summary = take(tmp_path / "set", tmp_path / "out", config=ImportConfig(clips_per_shard=1))
    assert (summary.kept, summary.rejected) == (1, 1)
    found = records(tmp_path / "out")
    assert found["vec/b"].reasons == ("duplicate",)
    assert found["vec/b"].duplicate_of == found["rec/a"].id
    assert len(ClipStore(tmp_path / "out")) == 1


def test_a_key_that_two_clips_claim_is_the_first_ones(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b")):
        clip = write_clip(tmp_path / "set" / name, seed=number)
        (clip / "clip.json").write_bytes(schema.encode_json({"key": "mine", "fps": 15.0}))
    take(tmp_path / "set", tmp_path / "out")
    store = ClipStore(tmp_path / "out")
    assert "mine" in store.keys
    assert len(set(store.keys)) == 2
    assert store.fps(0) == 15.0


def test_hostile_clips_are_recorded_and_never_stop_the_import(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", 1)
    secret = write_frames(tmp_path / "secret" / "images")
    link(root / "linked", secret.parent)
    link(root / "linked_images" / "images", secret)
    write_frames(root / "linked_picture" / "images")
    (root / "linked_picture" / "images" / "frame_3.png").unlink()
    link(root / "linked_picture" / "images" / "frame_3.png", secret / "frame_3.png")
    write_frames(root / "many" / "images", [f"{index}.png" for index in range(9)])
    write_frames(root / "same_number" / "images", ["1.png", "0001.png"])
    junk = write_frames(root / "junk" / "images")
    (junk / "frame_2.png").write_bytes(b"\x89PNG\r\n\x1a\n of a kind")
    sizes = write_frames(root / "sizes" / "images")
    Image.new("RGB", (WIDTH, 30)).save(sizes / "frame_2.png")
    bomb = write_frames(root / "bomb" / "images", ["frame_0.png"])
    Image.new("1", (4000, 4000)).save(bomb / "frame_0.png")
    write_clip(root / "other_length", seed=5)
    np.savez(root / "other_length.pose.npz", **keypoints(4))
    write_clip(root / "pickled", seed=6)
    np.savez(root / "pickled.pose.npz", keypoints=np.array([{}], object), score=np.zeros(1))
    write_frames(root / "odd\x1b[2Jname" / "images")
    summary = take(root, tmp_path / "out", config=ImportConfig(max_frames=8, max_pixels=1_000_000))
    assert summary.kept == 1
    expected = {
        "linked": "links are not followed",
        "linked_images": "links are not followed",
        "linked_picture": "links are not followed",
        "many": "more than 8 pictures",
        "same_number": "have one number",
        "junk": "cannot be read",
        "sizes": "expected one size",
        "bomb": "expected at most 1000000 pixels",
        "other_length": "keypoints of 4 frames",
        "pickled": "not a keypoints file",
        "odd\\x1b[2Jname": "cannot be shown",
    }
    assert summary.failures.keys() == expected.keys()
    for name, phrase in expected.items():
        assert phrase in summary.failures[name], name
        assert str(tmp_path) not in summary.failures[name]
    assert not (tmp_path / "out" / ".work").exists()


def test_a_card_that_is_nested_to_break_things_is_not_read(tmp_path: Path) -> None:
    clip = write_set(tmp_path / "set", 1) / "rec" / "00001"
    nested = b'{"key": "mine", "provenance": ' + b"[" * 400 + b"]" * 400 + b"}"
    (clip / "clip.json").write_bytes(nested)
    assert take(tmp_path / "set", tmp_path / "out").kept == 1
    assert "mine" not in ClipStore(tmp_path / "out").keys


def test_without_any_way_to_find_people_nothing_is_begun(tmp_path: Path) -> None:
    write_clip(tmp_path / "set" / "a", with_keypoints=False)
    with pytest.raises(ExchangeError, match="no pose model was found"):
        take(tmp_path / "set", tmp_path / "out")
    assert not (tmp_path / "out" / "import.json").exists()


def test_clips_without_people_are_rejected_not_lost(tmp_path: Path) -> None:
    write_set(tmp_path / "set", 1)
    write_clip(tmp_path / "set" / "rec" / "nobody", seed=4, with_keypoints=False)
    summary = take(tmp_path / "set", tmp_path / "out")
    assert (summary.kept, summary.rejected) == (1, 1)
    assert records(tmp_path / "out")["rec/nobody"].reasons == ("missing_keypoints",)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "is no folder"),
        (lambda root: root.mkdir(), "holds no clips; expected"),
        (lambda root: encode_in(root), "give it to `animator curate`"),
        (lambda root: write_frames(root / "poses"), "holds no clips; expected"),
    ],
)
def test_what_cannot_be_imported_is_named(tmp_path: Path, make, message: str) -> None:
    make(tmp_path / "set")
    with pytest.raises(ExchangeError, match=message):
        take(tmp_path / "set", tmp_path / "out")


def test_the_output_may_not_lie_in_the_source(tmp_path: Path) -> None:
    source = write_set(tmp_path / "set", 1)
    with pytest.raises(ExchangeError, match="outside of it"):
        take(source, source / "out")


def encode_in(root: Path) -> None:
    root.mkdir()
    encode(root / "a.mp4", [picture(0)], fps=10)
