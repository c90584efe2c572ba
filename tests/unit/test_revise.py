"""Revised thresholds: what a fresh run with them would have made, and the way back."""

import random
import shutil
from pathlib import Path

import pytest

from pipelines import shards
from pipelines.curation import ledger
from pipelines.curation.finish import finish_run
from pipelines.curation.plan import load_plan
from pipelines.curation.report import REPORT_FILE, write_report
from pipelines.curation.revise import (
    ReviseError,
    assignments_of,
    resume_revision,
    revise,
    thresholds,
)
from pipelines.overrides import ConfigError
from tests.unit.curated_run import (
    Video,
    clip,
    contents,
    dies_at,
    go_on,
    run,
    settings,
    signature,
    sources,
)

LOOSE = ("quality.min_sharpness=0", "duplicates.near=false", "faces.min_share=0")
STRICT = ("quality.min_sharpness=30", "duplicates.near=true", "faces.min_share=0.5")


def videos() -> dict[str, Video]:
    """Sources with clips of all kinds of sharpness, faces and likeness; copies and failures."""
    chance = random.Random(0)
    found = {}
    for number in range(14):
        clips = tuple(
            clip(
                signature(chance.randrange(4), chance.randrange(0, 32)),
                {"face_score": [chance.random() for _ in range(6)]},
                sharpness=round(chance.uniform(0, 60), 3),
                camera_percent_per_second=round(chance.uniform(0, 6), 3),
            )
            for _ in range(chance.randrange(1, 4))
        )
        content = f"{number % 11}"
        found[f"{number:02d}"] = found.get(f"{number - 11:02d}") or Video(
            content, clips, fails=number == 5
        )
    return found


VIDEOS = videos()


@pytest.fixture(scope="module")
def loose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stored every clip but those of moving cameras."""
    return run(tmp_path_factory.mktemp("revise") / "loose", VIDEOS, settings(*LOOSE))


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("revise") / "strict", VIDEOS, settings(*STRICT))


def of_the_run(folder: Path) -> dict[str, bytes]:
    """The files that a fresh run has."""
    return {name: data for name, data in contents(folder).items() if not name.startswith("spare/")}


def test_stricter_thresholds_make_what_a_fresh_run_with_them_makes(loose, strict, tmp_path):
    folder = shutil.copytree(loose, tmp_path / "revised")
    summary = revise(folder, STRICT)
    assert of_the_run(folder) == of_the_run(strict)
    report = shards.verify(folder)
    assert report.problems == ()
    assert report.clips == summary.clips_after < summary.clips_before
    assert report.spare_clips == summary.clips_before - summary.clips_after
    assert summary.reasons_after["blurred"] > 0
    assert summary.reasons_after["duplicate"] > 0
    assert "blurred" not in summary.reasons_before
    assert (summary.not_stored, summary.command) == (0, None)
    assert sorted(change.partition(":")[0] for change in summary.changes) == [
        "duplicates.near",
        "faces.min_share",
        "quality.min_sharpness",
    ]


def test_the_report_is_that_of_a_fresh_run_too(loose, strict, tmp_path):
    folder = shutil.copytree(loose, tmp_path / "run")
    fresh = shutil.copytree(strict, tmp_path / "fresh")
    write_report(folder)
    write_report(fresh)
    revise(folder, STRICT)
    assert (folder / REPORT_FILE).read_bytes() == (fresh / REPORT_FILE).read_bytes()


def test_pictures_of_copies_go_as_at_the_end_of_a_run(loose, tmp_path):
    folder = shutil.copytree(loose, tmp_path / "run")
    (folder / ledger.THUMBS_FOLDER).mkdir()
    found = sources(folder)
    for source in found.values():
        (folder / ledger.THUMBS_FOLDER / f"{source.id}.jpg").touch()
    revise(folder, STRICT)
    left = {path.stem for path in (folder / ledger.THUMBS_FOLDER).iterdir()}
    copies = {source.id for source in found.values() if source.duplicate_of}
    assert copies
    assert left == {source.id for source in found.values()} - copies


def test_the_way_back_needs_no_video(loose, tmp_path):
    folder = shutil.copytree(loose, tmp_path / "revised")
    revise(folder, STRICT)
    summary = revise(folder, LOOSE)
    assert summary.not_stored == 0
    assert contents(folder) == contents(loose)


def test_any_way_through_thresholds_ends_as_a_fresh_run(loose, tmp_path):
    folder = shutil.copytree(loose, tmp_path / "revised")
    chance = random.Random(1)
    for number in range(5):
        chosen = [
            f"quality.min_sharpness={chance.choice([0, 10, 25, 50])}",
            f"duplicates.near={chance.choice(['true', 'false'])}",
            f"duplicates.max_distance={chance.choice([0, 3, 6])}",
            f"faces.min_share={chance.choice([0, 0.3, 0.6])}",
            f"camera.max_percent_per_second={chance.choice([1, 2, 3])}",
        ]
        revise(folder, chosen)
        fresh = run(tmp_path / f"fresh-{number}", VIDEOS, settings(*chosen))
        assert of_the_run(folder) == of_the_run(fresh)


def test_what_was_never_stored_is_named_and_made_by_going_on(loose, strict, tmp_path):
    folder = shutil.copytree(strict, tmp_path / "revised")
    summary = revise(folder, LOOSE)
    assert summary.not_stored > 0
    assert summary.reasons_after["not_stored"] == summary.not_stored
    assert summary.command is not None
    assert summary.command.startswith(f"animator curate SOURCES --out {folder} --set ")
    assert "--set duplicates.near=false" in summary.command
    assert shards.verify(folder).problems == ()
    plan = load_plan(folder)
    done = ledger.scan_done(folder, plan)
    assert len(done.names) == plan.num_shards
    assert done.not_stored
    before = sources(folder)
    assert contents(go_on(folder, VIDEOS)) == contents(loose)
    kept = [name for name, source in before.items() if source.verdict == "kept"]
    assert kept
    assert len([name for name, source in sources(folder).items() if source.clips]) > len(kept)


def test_a_clip_that_is_not_stored_stands_for_its_repeats_all_the_same(tmp_path):
    found = {
        "a": Video("a", (clip(signature(1), sharpness=10.0),)),
        "b": Video("b", (clip(signature(1, 9), sharpness=50.0),)),
    }
    folder = run(tmp_path / "run", found, settings("quality.min_sharpness=20"))
    assert [source.verdict for source in sources(folder).values()] == ["rejected", "kept"]
    assert revise(folder, ["quality.min_sharpness=5"]).not_stored == 1
    first, second = sources(folder).values()
    assert (first.reasons, second.reasons) == (("not_stored",), ("duplicate",))
    fresh = run(tmp_path / "fresh", found, settings("quality.min_sharpness=5"))
    assert of_the_run(go_on(folder, found)) == of_the_run(fresh)
    # And back: what made room for the other is there again.
    assert revise(folder, ["quality.min_sharpness=20"]).not_stored == 0
    assert [source.verdict for source in sources(folder).values()] == ["rejected", "kept"]


def test_a_dry_run_says_the_same_and_changes_nothing(loose, tmp_path):
    folder = shutil.copytree(loose, tmp_path / "revised")
    old = contents(folder)
    foretold = revise(folder, STRICT, dry_run=True)
    assert contents(folder) == old
    assert revise(folder, STRICT) == foretold


@pytest.mark.parametrize("resume", ["revise", "curate"])
def test_a_revision_that_dies_is_gone_on_with(loose, strict, tmp_path, resume):
    expected = of_the_run(strict)
    ends = set()
    for step in range(0, 400, 31):
        folder = shutil.copytree(loose, tmp_path / "killed")
        killed = dies_at(step, lambda f=folder: revise(f, STRICT))
        pending = (folder / ".work" / "revise.json").is_file()
        ends.add((killed, pending))
        if resume == "revise":
            revise(folder, STRICT)
        else:
            # As a start of the run does, before it looks at what is done.
            resume_revision(folder)
            plan = load_plan(folder)
            done = ledger.clean_up(folder, plan, ledger.scan_done(folder, plan))
            assert len(done.names) == plan.num_shards
            finish_run(folder, plan)
        found = of_the_run(folder)
        assert found == expected or (not pending and found == of_the_run(loose))
        assert found == expected or resume == "curate"
        assert not (folder / ".work").exists()
        shutil.rmtree(folder)
        if not killed:
            break
    assert ends == {(True, False), (True, True), (False, False)}


def test_another_revision_after_a_death_ends_as_itself(loose, tmp_path):
    folder = shutil.copytree(loose, tmp_path / "killed")
    assert dies_at(60, lambda: revise(folder, STRICT))
    with pytest.raises(ReviseError, match="was interrupted"):
        revise(folder, LOOSE, dry_run=True)
    summary = revise(folder, LOOSE)
    assert summary.not_stored == 0
    assert contents(folder) == contents(loose)


def test_a_run_that_is_not_done_can_be_revised(strict, loose, tmp_path):
    folder = shutil.copytree(loose, tmp_path / "revised")
    for name in ("shard-000002.json", "shard-000002.tar"):
        (folder / name).unlink()
    summary = revise(folder, STRICT)
    assert summary.shards_left_out == 1
    assert summary.command is not None
    assert of_the_run(go_on(folder, VIDEOS)) == of_the_run(strict)


def test_only_thresholds_can_be_revised(loose, tmp_path):
    folder = shutil.copytree(loose, tmp_path / "revised")
    old = contents(folder)
    with pytest.raises(ReviseError, match=r"faces\.backend is no threshold.*another --out folder"):
        revise(folder, ["faces.min_share=0.5", "faces.backend=cascade"])
    with pytest.raises(ReviseError, match=r"give it to `animator curate`"):
        revise(folder, ["video.timeout_seconds=5"])
    with pytest.raises(ConfigError, match=r"Did you mean faces\.min_share"):
        revise(folder, ["faces.min_shar=0.5"])
    with pytest.raises(ValueError, match="expected a share from 0 to 1"):
        revise(folder, ["faces.min_share=2"])
    with pytest.raises(ConfigError, match="expected KEY=VALUE"):
        revise(folder, ["faces.min_share"])
    assert contents(folder) == old
    assert "camera.max_percent_per_second" in thresholds()
    assert "camera.backend" not in thresholds()


def test_a_folder_in_use_is_left_alone(loose, tmp_path):
    folder = shutil.copytree(loose, tmp_path / "revised")
    with ledger.folder_lock(folder), pytest.raises(ledger.FolderInUseError):
        revise(folder, STRICT)
    assert contents(folder) == contents(loose)


def test_settings_are_given_as_assignments_that_make_them():
    config = settings(
        "video.max_bytes=1000", "download.allow_hosts=a.org,b.org", "faces.store_embeddings=yes"
    )
    config = settings(*assignments_of(config))
    assert config.download.allow_hosts == ("a.org", "b.org")
    assert config.faces.store_embeddings is True
    assert assignments_of(settings()) == ["output.sources_per_shard=3"]
