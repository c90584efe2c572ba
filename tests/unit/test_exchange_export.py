"""Shards become the folders that the predecessor's trainer reads, and come back as they were."""

import json
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from animator.skeleton import draw_pose
from pipelines.clips import ClipStore
from pipelines.curation.ledger import FolderInUseError, folder_lock
from pipelines.exchange.exporting import export_shards, group_of
from pipelines.exchange.face_masks import draw_mask, mask_boxes
from pipelines.exchange.frame_folder import ExchangeError
from pipelines.exchange.importing import import_shards
from pipelines.shards import verify
from pipelines.video import encode, iter_frames, probe
from tests.unit.foreign_layouts import (
    FACE,
    HEIGHT,
    NUM_FRAMES,
    WIDTH,
    psnr,
    write_set,
)

pytestmark = pytest.mark.usefixtures("no_models")
GROUP = group_of(HEIGHT, WIDTH)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Shards of three clips, 48x64."""
    import_shards(write_set(tmp_path / "set", 3), tmp_path / "shards", jobs=0)
    return tmp_path / "shards"


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_what_is_exported_comes_back_the_same(folder: Path, tmp_path: Path) -> None:
    export_shards(folder, tmp_path / "out")
    summary = import_shards(tmp_path / "out", tmp_path / "back", jobs=0)
    assert (summary.layout, summary.kept, summary.notes) == ("stableanimator", 3, ())
    assert verify(tmp_path / "back").problems == ()
    before, after = ClipStore(folder), ClipStore(tmp_path / "back")
    assert sorted(before.keys) == sorted(after.keys)
    for i, key in enumerate(before.keys):
        j = after.index(key)
        every = range(before.num_frames(i))
        assert (before.fps(i), before.size(i)) == (after.fps(j), after.size(j))
        assert psnr(before.frames(i, every), after.frames(j, every)) > 35
        np.testing.assert_array_equal(before.pose(i).keypoints, after.pose(j).keypoints)
        np.testing.assert_array_equal(before.pose(i).score, after.pose(j).score)
        np.testing.assert_array_equal(before.faces(i).boxes, after.faces(j).boxes)
        assert after.meta(j)["provenance"]["exported"]["key"] == key


def test_pictures_are_those_that_the_trainer_reads(folder: Path, tmp_path: Path) -> None:
    export_shards(folder, tmp_path / "out")
    store = ClipStore(folder)
    clip = tmp_path / "out" / GROUP / store.keys[0]
    names = {f"frame_{index}.png" for index in range(NUM_FRAMES)}
    for part, mode in (("images", "RGB"), ("poses", "RGB"), ("faces", "L")):
        assert {path.name for path in (clip / part).iterdir()} == names
        with Image.open(clip / part / "frame_0.png") as image:
            assert (image.mode, image.size) == (mode, (WIDTH, HEIGHT))
    np.testing.assert_array_equal(read(clip / "images" / "frame_3.png"), store.frames(0, [3])[0])
    pose = store.pose(0)
    drawn = draw_pose(pose.keypoints[3], pose.score[3], HEIGHT, WIDTH, style="published")
    assert drawn.any()
    np.testing.assert_array_equal(read(clip / "poses" / "frame_3.png"), drawn)
    mask = read(clip / "faces" / "frame_0.png")
    left, top, right, bottom = FACE
    assert (mask[top:bottom, left:right] == 255).all()
    assert mask.sum() == 255 * (right - left) * (bottom - top)
    # Where no face was found, the trainer expects a white mask.
    assert (read(clip / "faces" / f"frame_{NUM_FRAMES - 1}.png") == 255).all()


def test_lists_name_every_complete_folder(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_shards(folder, out, limit=1)
    assert len((out / "video_path.txt").read_text().splitlines()) == 1
    summary = export_shards(folder, out)
    assert (summary.written, summary.skipped, summary.clips) == (2, 1, 3)
    lines = (out / f"video_{GROUP}_path.txt").read_text().splitlines()
    assert lines == [str(out.resolve() / GROUP / key) for key in ClipStore(folder).keys]
    assert (out / "video_path.txt").read_text().splitlines() == lines
    assert (out / "video_rec_path.txt").read_text() == ""


def test_an_export_that_died_goes_on(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_shards(folder, out)
    keys = ClipStore(folder).keys
    (out / GROUP / keys[0] / "poses" / "frame_2.png").unlink()
    shutil.rmtree(out / GROUP / keys[1])
    (out / ".work" / keys[1] / "images").mkdir(parents=True)
    kept = (out / GROUP / keys[2] / "images" / "frame_0.png").stat().st_mtime_ns
    summary = export_shards(folder, out, jobs=2)
    assert (summary.written, summary.skipped) == (2, 1)
    assert (out / GROUP / keys[0] / "poses" / "frame_2.png").is_file()
    assert (out / GROUP / keys[1] / "clip.json").is_file()
    assert (out / GROUP / keys[2] / "images" / "frame_0.png").stat().st_mtime_ns == kept
    assert not (out / ".work").exists()


def test_a_clip_that_changed_in_the_shards_is_written_again(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_shards(folder, out)
    card = out / GROUP / ClipStore(folder).keys[0] / "clip.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"mp4_sha256": "of another video"}))
    assert export_shards(folder, out).written == 1


def test_other_peoples_files_are_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").write_text("mine")
    with pytest.raises(ExchangeError, match="not empty"):
        export_shards(folder, tmp_path / "theirs")
    with pytest.raises(ExchangeError, match="folder of shards itself"):
        export_shards(folder, folder)
    key = ClipStore(folder).keys[0]
    out = tmp_path / "out"
    export_shards(folder, out, limit=1)
    shutil.rmtree(out / GROUP / key)
    (out / GROUP / key).symlink_to(tmp_path / "theirs")
    summary = export_shards(folder, out)
    assert summary.failures is not None
    assert "no export of" in summary.failures[key]
    assert summary.written == 2
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["notes.txt"]


def test_two_exports_into_one_folder_refuse_each_other(folder: Path, tmp_path: Path) -> None:
    export_shards(folder, tmp_path / "out", limit=1)
    with folder_lock(tmp_path / "out"), pytest.raises(FolderInUseError):
        export_shards(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("size", "group"),
    [((512, 512), "rec"), ((1024, 576), "vec"), ((720, 1280), "rec"), ((1920, 1080), "vec")],
)
def test_clips_lie_with_the_size_they_are_nearest_to(size: tuple[int, int], group: str) -> None:
    assert group_of(*size) == group


def test_masks_say_where_faces_are() -> None:
    boxes = np.array([[0.1, 0.2, 0.3, 0.5], [0.6, 0.5, 0.9, 1.0], [0, 0, 0, 0]], np.float32)
    found = mask_boxes(draw_mask(boxes, 100, 200))
    np.testing.assert_allclose(found, boxes[[1, 0]], atol=1e-6)
    assert len(mask_boxes(draw_mask(boxes[2:], 100, 200))) == 0
    assert len(mask_boxes(np.zeros((20, 20), np.uint8))) == 0


@pytest.mark.real_data
def test_a_real_video_with_dwpose_goes_there_and_back(
    data_root: Path, models_env: Path, tmp_path: Path
) -> None:
    (tmp_path / "set").mkdir()
    video = data_root / "pose2d" / "ubc_91BjuE6irxS.mp4"
    shutil.copy(video.with_suffix(".dwpose.npz"), tmp_path / "set")
    second = islice(iter_frames(video), 30)
    encode(tmp_path / "set" / video.name, second, fps=probe(video).fps, crf=10)
    assert import_shards(tmp_path / "set", tmp_path / "shards", jobs=0).kept == 1
    export_shards(tmp_path / "shards", tmp_path / "out")
    assert import_shards(tmp_path / "out", tmp_path / "back", jobs=0).kept == 1
    before, after = ClipStore(tmp_path / "shards"), ClipStore(tmp_path / "back")
    assert before.keys == after.keys
    some = range(0, before.num_frames(0), 9)
    assert psnr(before.frames(0, some), after.frames(0, some)) > 45
    np.testing.assert_array_equal(before.pose(0).keypoints, after.pose(0).keypoints)
    assert before.faces(0).score.any()
