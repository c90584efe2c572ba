"""Curation from end to end on Ray: verdicts, resuming, killed processes, poisoned input.

The videos are made here from a public-domain portrait with its keypoints beside it, so nothing
but the embedded models is needed.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
from skimage import data

from infra.cli import main
from pipelines import shards
from pipelines.clips import ClipStore
from pipelines.curation.config import CurationConfig
from pipelines.curation.evaluation import evaluate_curation
from pipelines.curation.isolation import NAME
from pipelines.curation.ledger import FolderInUseError, folder_lock
from pipelines.curation.pipeline import Progress, RunSummary, curate
from pipelines.curation.plan import PlanError
from pipelines.curation.report import stats
from pipelines.curation.thumbnails import contact_sheet
from pipelines.overrides import apply_overrides, to_dict
from pipelines.schema import SourceRecord
from pipelines.video import encode

SIDE, FPS, FRAMES = 256, 10, 16
HEAD = (0.44, 0.22)  # where the portrait's face is
# What tells when things happened, not what came of them.
UNEQUAL = {".lock", "timings.jsonl", "commits.jsonl", "report.html"}
SETTINGS = [
    "faces.backend=cascade",
    "pose.backend=file",
    "output.sources_per_shard=2",
    "output.preset=ultrafast",
    "samples.fps=4",
    "samples.side=256",
]
CONFIG = apply_overrides(CurationConfig(), SETTINGS)


def portrait(shift: float = 0.0, bright: int = 0) -> np.ndarray:
    """The portrait, moved to the left by `shift` pixels."""
    image = cv2.resize(data.astronaut(), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    matrix = np.array([[1, 0, -shift], [0, 1, 0]], np.float32)
    moved = cv2.warpAffine(image, matrix, (SIDE, SIDE), borderMode=cv2.BORDER_REFLECT)
    return np.clip(moved.astype(np.int16) + bright, 0, 255).astype(np.uint8)


def stripes(turned: bool) -> np.ndarray:
    """Coloured stripes: something to track, nothing like a face."""
    row = np.random.default_rng(0).integers(0, 255, (1, 16, 3), dtype=np.uint8)
    image = cv2.resize(row, (SIDE, SIDE), interpolation=cv2.INTER_NEAREST)
    return np.ascontiguousarray(image.swapaxes(0, 1)) if turned else image


def add_keypoints(video: Path, visible: int = 18) -> None:
    keypoints = np.broadcast_to(np.array(HEAD, np.float32), (FRAMES, 1, 18, 2))
    score = np.zeros((FRAMES, 1, 18), np.float32)
    score[..., :visible] = 0.9
    np.savez(video.with_suffix(".pose.npz"), keypoints=keypoints, score=score, fps=FPS)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    runs = {
        "good": [portrait(bright=index) for index in range(FRAMES)],
        "better": [np.fliplr(portrait(bright=-2 * index)) for index in range(FRAMES)],
        "pan": [portrait(shift=6.0 * index) for index in range(FRAMES)],
        "cut": [portrait()] * (FRAMES - 4) + [stripes(turned=True)] * 12,
        "faceless": [stripes(turned=False)] * FRAMES,
        "hidden": [portrait(bright=20)] * FRAMES,
    }
    for name, frames in runs.items():
        encode(folder / f"{name}.mp4", frames, fps=FPS)
        add_keypoints(folder / f"{name}.mp4", visible=4 if name == "hidden" else 18)
    for copy in ("good_again", "same_as_good"):  # in its shard, and in another
        shutil.copy(folder / "good.mp4", folder / f"{copy}.mp4")
        add_keypoints(folder / f"{copy}.mp4")
    (folder / "poison.mp4").write_bytes(b"this is no video" * 100)
    (folder / "cut_off.mp4").write_bytes((folder / "good.mp4").read_bytes()[:9000])
    (folder / "void.mp4").write_bytes(b"")
    return folder


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    import ray

    # Not a cluster that happens to run on this machine.
    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    ray.init("local", num_cpus=4, **options)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def whole(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunSummary]:
    """An undisturbed run over all videos, which the others are compared with."""
    out = tmp_path_factory.mktemp("whole")
    states: list[Progress] = []
    summary = curate([str(videos)], out, CONFIG, workers=2, progress=states.append)
    last = [state for state in states if state.stage == "work"][-1]
    assert (last.done, last.total) == (11, 11)
    assert (last.kept, last.rejected, last.failed, last.clips) == (3, 5, 3, 3)
    assert last.video_seconds > 10
    assert last.videos_per_hour is not None
    return out, summary


def sources_of(out: Path) -> dict[str, SourceRecord]:
    return {
        Path(uri).stem: source
        for record in shards.read_records(out)
        for source in record.sources
        for uri in source.uris
    }


def contents(out: Path) -> dict[str, bytes]:
    """All that a run's sources and settings decide."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in UNEQUAL
    }


def test_every_source_gets_its_verdict_and_reason(whole):
    sources = sources_of(whole[0])
    assert {name: (source.verdict, source.reasons) for name, source in sources.items()} == {
        "good": ("kept", ()),
        "good_again": ("rejected", ("duplicate",)),
        "same_as_good": ("rejected", ("duplicate",)),
        "better": ("kept", ()),
        "pan": ("rejected", ("moving_camera",)),
        "cut": ("rejected", ("cut", "no_face")),
        "faceless": ("rejected", ("no_face",)),
        "hidden": ("rejected", ("missing_keypoints",)),
        "poison": ("failed", ("unreadable",)),
        "cut_off": ("failed", ("unreadable",)),
        "void": ("failed", ("unreadable",)),
    }
    assert whole[1].totals["sources"] == 11


def test_rejected_sources_keep_all_their_scores(whole):
    sources = sources_of(whole[0])
    names = sources["good"].clips[0].scores.keys()
    for name in ("pan", "cut", "faceless", "hidden"):
        assert sources[name].clips[0].scores.keys() == names
    assert sources["cut"].clips[0].scores["face_detected"] == 1.0
    assert sources["pan"].scores["camera_percent_per_second"] == pytest.approx(23.4, rel=0.2)


def test_failed_sources_say_why_in_one_sentence(whole):
    sources = sources_of(whole[0])
    for name in ("poison", "cut_off", "void"):
        error = sources[name].error
        assert error is not None
        assert "Traceback" not in error
        assert str(Path.cwd()) not in error
        assert sources[name].info["failure"] == "permanent"
    assert "empty" in str(sources["void"].error)


def test_one_content_under_two_names_is_one_clip(whole):
    sources = sources_of(whole[0])
    for copy in ("good_again", "same_as_good"):
        assert sources[copy].duplicate_of == sources["good"].id
        assert sources[copy].sha256 == sources["good"].sha256
        assert sources[copy].clips == ()
    assert len(ClipStore(whole[0])) == 2


def test_kept_clips_can_be_read(whole):
    store = ClipStore(whole[0])
    assert shards.verify(whole[0]).problems == ()
    i = store.index(sources_of(whole[0])["good"].clips[0].key)
    assert (store.num_frames(i), store.fps(i), store.size(i)) == (FRAMES, FPS, (SIDE, SIDE))
    frames = store.frames(i, [0, FRAMES - 1])
    assert np.abs(frames[0].astype(int) - portrait()).mean() < 6
    pose, faces = store.pose(i), store.faces(i)
    np.testing.assert_allclose(pose.main()[0], np.broadcast_to(HEAD, (FRAMES, 18, 2)), atol=1e-6)
    assert (faces.score[:, 0] > 0).all()
    centre = (faces.boxes[:, 0, :2] + faces.boxes[:, 0, 2:]) / 2
    np.testing.assert_allclose(centre, [HEAD] * FRAMES, atol=0.08)
    assert faces.embeddings.size == 0
    meta = store.meta(i)
    assert meta["provenance"]["licence"] == "unknown"
    assert meta["models"]["face"]["name"] == "cascade"


def test_report_and_statistics_describe_the_run(whole):
    out, summary = whole
    page = (out / "report.html").read_text()
    assert "poison.mp4" in page
    assert page.count("data:image/jpeg;base64,") >= 6
    assert "http" not in page
    assert stats(out) == summary.totals
    funnel = {step["stage"]: step["sources"] for step in summary.totals["funnel"]}
    counts = list(funnel.values())
    assert counts == sorted(counts, reverse=True)
    assert (funnel["sources"], funnel["readable"], counts[-1]) == (11, 8, 2)
    assert funnel["static camera"] - funnel["single shot"] == -1


def test_contact_sheet_shows_a_clip(whole, tmp_path):
    path = contact_sheet(whole[0], ClipStore(whole[0]).keys[0], tmp_path / "sheet.png")
    image = cv2.imread(str(path))
    assert image is not None
    assert min(image.shape[:2]) > 400


def test_labels_are_compared_with_what_was_found(whole, tmp_path):
    labels = tmp_path / "labels.csv"
    labels.write_text(
        "file,face,camera,cuts\n"
        "good.mp4,yes,static,no\npan.mp4,yes,moving,no\nbetter.mp4,yes,moving,no\n"
        "cut.mp4,yes,slight,yes\nfaceless.mp4,no,static,no\npoison.mp4,yes,static,no\n"
        "elsewhere.mp4,yes,static,no\n"
    )
    result = evaluate_curation(whole[0], labels)
    assert result["failed"] == ["poison.mp4"]
    assert result["labels_without_source"] == ["elsewhere.mp4"]
    camera = result["moving_camera"]
    assert (camera["precision"], camera["recall"], camera["missed"]) == (1.0, 0.5, ["better.mp4"])
    assert camera["clips"] == 5
    assert result["cuts"]["f1"] == 1.0
    assert result["face_present"]["missed"] == ["poison.mp4"], "its face was not found"


def test_finished_run_has_nothing_left_to_do(videos, whole):
    before = contents(whole[0])
    summary = curate([str(videos)], whole[0], CONFIG)
    assert (summary.shards_done, summary.shards_resumed) == (0, 6)
    assert contents(whole[0]) == before


def test_damaged_shard_is_made_again_with_the_same_bytes(videos, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    tars = sorted(out.glob("shard-*.tar"), key=lambda path: -path.stat().st_size)
    os.truncate(tars[0], 2000)
    tars[-1].with_suffix(".json").unlink()
    (out / ".work" / "dead" / "shard-000000.1").mkdir(parents=True)
    summary = curate([str(videos)], out, CONFIG, workers=2)
    assert (summary.shards_done, summary.shards_resumed) == (2, 4)
    # What was damaged is never thrown away: it may be whole tomorrow.
    damaged = {path.name for path in (out / "damaged").iterdir()}
    assert damaged == {tars[0].name, tars[0].with_suffix(".json").name}
    assert any("1 damaged shard lies" in note for note in summary.notes)
    shutil.rmtree(out / "damaged")
    assert contents(out) == contents(whole[0])


def test_killed_decoder_is_replaced_and_the_run_is_whole(videos, whole, tmp_path):
    out = tmp_path / "out"
    killed = []

    def kill_once(state: Progress) -> None:
        if state.stage == "work" and 0 < state.done < 6 and not killed:
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    if NAME in " ".join(child.cmdline()):
                        child.kill()
                        killed.append(child.pid)

    curate([str(videos)], out, CONFIG, workers=1, progress=kill_once)
    assert killed
    assert contents(out) == contents(whole[0])


def test_source_that_takes_too_long_is_given_up_and_can_be_tried_again(videos, tmp_path):
    out, source = tmp_path / "out", [str(videos / "good.mp4")]
    limits = ["video.timeout_seconds=0.01", "video.seconds_per_video_second=0"]
    hasty = apply_overrides(CONFIG, limits)
    summary = curate(source, out, hasty, workers=1)
    assert summary.totals["failed"] == 1
    record = sources_of(out)["good"]
    assert record.error is not None
    assert record.error.startswith("took longer than 0.01 s")
    assert record.info["failure"] == "timeout"

    assert curate(source, out, CONFIG).shards_done == 0
    summary = curate(source, out, CONFIG, workers=1, retry_failed=True)
    assert (summary.shards_done, summary.totals["kept"], summary.totals["failed"]) == (1, 1, 0)
    patient = tmp_path / "patient"
    curate(source, patient, CONFIG, workers=1)
    assert contents(out) == contents(patient) | {"plan.json": (out / "plan.json").read_bytes()}


def test_retry_works_on_failed_sources_alone(videos, whole, tmp_path):
    """The poison becomes a video meanwhile; its neighbour in the shard is taken over."""
    folder, out = tmp_path / "videos", tmp_path / "out"
    shutil.copytree(videos, folder)
    curate([str(folder)], out, CONFIG, workers=1)
    shutil.copy(folder / "good.mp4", folder / "poison.mp4")
    add_keypoints(folder / "poison.mp4")
    # In the poison's shard, but it did not fail: nobody looks at it again.
    (folder / "same_as_good.mp4").write_bytes(b"no video any more")
    curate([str(folder)], out, CONFIG, workers=1, retry_failed=True)
    sources = sources_of(out)
    assert sources["poison"].reasons == ("duplicate",)
    assert sources["same_as_good"].reasons == ("duplicate",)
    assert shards.verify(out).problems == ()


def test_first_so_many_sources_can_be_taken_alone(videos, tmp_path):
    summary = curate([str(videos)], tmp_path / "out", CONFIG, workers=1, limit=1)
    assert list(sources_of(tmp_path / "out")) == ["better"]
    assert summary.totals["sources"] == 1


def test_rejected_early_saves_the_models(videos, tmp_path):
    config = apply_overrides(CONFIG, ["stages.stop_early=true"])
    curate([str(videos / "pan.mp4"), str(videos / "good.mp4")], tmp_path / "out", config)
    sources = sources_of(tmp_path / "out")
    assert sources["pan"].reasons == ("moving_camera",)
    assert "face_detected" not in sources["pan"].clips[0].scores
    assert sources["good"].verdict == "kept"


def test_split_makes_a_clip_of_each_long_enough_shot(videos, tmp_path):
    config = apply_overrides(CONFIG, ["shots.on_cut=split"])
    curate([str(videos / "cut.mp4")], tmp_path / "out", config, workers=1)
    source = sources_of(tmp_path / "out")["cut"]
    assert [clip.verdict for clip in source.clips] == ["kept", "rejected"]
    assert source.clips[1].reasons == ("no_face",)
    assert source.verdict == "kept"
    assert source.clips[0].num_frames == FRAMES - 4


def test_other_settings_on_a_folder_are_refused(videos, whole):
    before = contents(whole[0])
    config = apply_overrides(CONFIG, ["camera.max_percent_per_second=9"])
    with pytest.raises(PlanError, match=r"camera\.max_percent_per_second: 3\.0 → 9\.0"):
        curate([str(videos)], whole[0], config)
    assert contents(whole[0]) == before


def test_two_runs_on_a_folder_refuse_each_other(videos, tmp_path):
    with folder_lock(tmp_path), pytest.raises(FolderInUseError, match=str(os.getpid())):
        curate([str(videos)], tmp_path, CONFIG)


def test_summary_can_be_written_as_json(whole):
    assert to_dict(whole[1])["totals"]["kept"] == 2


def test_thresholds_are_revised_and_reported_from_the_command_line(whole, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    before = contents(out)
    strict = ["curate", "revise", str(out), "--set", "faces.min_sharpness=100000"]
    run_verb(*strict, "--dry-run", "--json")
    told = json.loads(capsys.readouterr().out)
    assert (told["clips_before"], told["clips_after"]) == (2, 0)
    assert shard_files(contents(out)) == shard_files(before)
    run_verb(*strict)
    assert "kept" in capsys.readouterr().out
    run_verb("curate", "report", str(out), "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["summary"]["clips_kept"] == 0
    assert report["summary"]["reasons"]["low_face_quality"] >= 2
    default = CurationConfig().faces.min_sharpness
    run_verb("curate", "revise", str(out), "--set", f"faces.min_sharpness={default}")
    assert shard_files(contents(out)) == shard_files(before)


def run_verb(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert not ended.value.code


def shard_files(found: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in found.items() if name.startswith("shard-")}
