"""The end of a run: the same folder however it was come to, and nothing lost on the way."""

import os
import shutil
from pathlib import Path

import pytest

from pipelines import schema, shards
from pipelines.curation import ledger
from pipelines.curation.finish import finish_run
from pipelines.curation.plan import load_plan
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
    unfinished,
    work,
)

VIDEOS = {
    "a": Video("one", (clip(signature(1)), clip(signature(2)))),
    "b": Video("two", (clip(signature(3), sharpness=0.0),)),
    "c": Video("one", (clip(signature(1)), clip(signature(2)))),
    "d": Video("three", (clip(signature(2, 20)), clip(signature(4)))),
    "e": Video("four", fails=True),
    "f": Video("two", (clip(signature(3), sharpness=0.0),)),
    "g": Video("one", (clip(signature(1)), clip(signature(2)))),
    "h": Video("five", (clip(signature(5)),)),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("finish") / "whole", VIDEOS, settings())


def test_copies_and_near_duplicates_leave_the_shards(whole):
    assert shards.verify(whole).problems == ()
    found = sources(whole)
    assert [found[name].verdict for name in "abcdefgh"] == [
        "kept",
        "rejected",
        "rejected",
        "kept",
        "failed",
        "rejected",
        "rejected",
        "kept",
    ]
    assert [entry.verdict for entry in found["d"].clips] == ["rejected", "kept"]
    for record in shards.iter_records(whole):
        verdicts = [source.verdict for source in record.sources]
        clips = [entry.verdict for source in record.sources for entry in source.clips]
        assert record.counts == {
            "sources": len(verdicts),
            "kept": verdicts.count("kept"),
            "rejected": verdicts.count("rejected"),
            "failed": verdicts.count("failed"),
            "clips_kept": clips.count("kept"),
            "clips_rejected": clips.count("rejected"),
        }


def test_finishing_again_changes_nothing(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "again")
    summary = finish_run(folder, load_plan(folder))
    assert (summary.changed, summary.copies, summary.near_duplicates) == (0, 3, 1)
    assert contents(folder) == contents(whole)


def test_it_tells_how_far_it_is(tmp_path):
    folder = unfinished(tmp_path, VIDEOS, settings())
    states = []
    summary = finish_run(folder, load_plan(folder), states.append)
    assert summary.changed == 2
    assert [state.stage for state in states] == sorted(
        (state.stage for state in states), key=["records", "duplicates", "repack"].index
    )
    assert (states[-1].done, states[-1].total) == (2, 2)


def test_a_copy_that_was_worked_on_leaves_no_picture_behind(tmp_path):
    folder = unfinished(tmp_path, VIDEOS, settings())
    plan = load_plan(folder)
    names = {row.uri: row.id for shard in plan.shards() for row in plan.shard_rows(shard.index)}
    (folder / "thumbs").mkdir()
    for source in names.values():
        (folder / "thumbs" / f"{source}.jpg").write_bytes(b"picture")
    finish_run(folder, plan)
    left = {path.stem for path in (folder / "thumbs").iterdir()}
    assert left == {names[name] for name in "abdeh"}


def test_a_death_at_any_step_is_made_good_by_finishing_again(whole, tmp_path):
    start = unfinished(tmp_path / "start", VIDEOS, settings())
    expected = contents(whole)
    assert contents(start) != expected
    for step in range(0, 100, 5):
        folder = shutil.copytree(start, tmp_path / "killed")
        plan = load_plan(folder)
        killed = dies_at(step, lambda f=folder, p=plan: finish_run(f, p))
        finish_run(folder, plan)
        assert contents(folder) == expected
        shutil.rmtree(folder)
        if not killed:
            break
    else:
        pytest.fail("it never came to an end")


def test_what_is_put_in_place_at_the_next_start_is_done(whole, tmp_path):
    """A whole repacked shard outlives the removal of what a death left."""
    start = unfinished(tmp_path / "start", VIDEOS, settings())
    torn = 0
    for step in range(12, 40, 4):
        folder = shutil.copytree(start, tmp_path / "killed")
        plan = load_plan(folder)
        dies_at(step, lambda f=folder, p=plan: finish_run(f, p))
        torn += len(ledger.scan_done(folder, plan).names) < plan.num_shards
        done = ledger.clean_up(folder, plan, ledger.scan_done(folder, plan))
        assert len(done.names) == plan.num_shards
        finish_run(folder, plan)
        assert contents(folder) == contents(whole)
        shutil.rmtree(folder)
    assert torn > 0


def test_the_order_in_which_shards_were_made_does_not_matter(whole, tmp_path):
    folder = unfinished(tmp_path, VIDEOS, settings())
    plan = load_plan(folder)
    finish_run(folder, plan)
    # A shard that is lost after the end is made again from its sources alone.
    for name in ("shard-000001.json", "shard-000001.tar"):
        (folder / name).unlink()
    work(folder, plan, 1, VIDEOS)
    assert contents(folder) != contents(whole)
    finish_run(folder, plan)
    assert contents(folder) == contents(whole)


def test_a_source_that_succeeds_later_takes_its_place_before_its_copies(whole, tmp_path):
    broken = VIDEOS | {"a": Video("one", fails=True)}
    folder = run(tmp_path, broken, settings())
    found = sources(folder)
    assert (found["a"].verdict, found["c"].verdict) == ("failed", "kept")
    assert found["g"].duplicate_of == found["c"].id
    plan = load_plan(folder)
    previous = shards.committed(folder, schema.shard_name(0))
    work(folder, plan, 0, VIDEOS, previous)
    assert finish_run(folder, plan).again == ()
    assert contents(folder) == contents(whole)


def test_what_was_a_repeat_of_a_clip_that_gives_way_is_worked_on_again(tmp_path):
    """b repeats nothing once a is there; c, which repeated b, is then new and was never stored."""
    videos = {
        "a": Video("a", (clip(signature(1)),)),
        "b": Video("b", (clip(signature(1, 40)),)),
        "c": Video("c", (clip(turned(signature(1, 40), signature(1), 40)),)),
    }
    config = settings("output.sources_per_shard=1")
    whole = run(tmp_path / "whole", videos, config)
    assert [source.verdict for source in sources(whole).values()] == ["kept", "rejected", "kept"]

    folder = run(tmp_path / "folder", videos | {"a": Video("a", fails=True)}, config)
    assert [source.verdict for source in sources(folder).values()] == ["failed", "kept", "rejected"]
    plan = load_plan(folder)
    work(folder, plan, 0, videos, shards.committed(folder, schema.shard_name(0)))
    assert finish_run(folder, plan).again == ("shard-000002",)
    assert sources(folder)["c"].reasons == ("not_stored",)
    assert ledger.scan_done(folder, plan).not_stored == ("shard-000002",)
    assert contents(go_on(folder, videos)) == contents(whole)


def turned(text: str, away_from: str, count: int) -> str:
    """The signature with `count` more bits turned, all of which it shares with the other."""
    one, other = int(text, 16), int(away_from, 16)
    same = [place for place in range(512) if not (one ^ other) >> place & 1]
    return f"{one ^ sum(1 << place for place in same[:count]):0128x}"


def test_a_copy_whose_original_is_no_more_is_worked_on_itself(tmp_path):
    videos = {name: Video("same", (clip(),)) for name in "abcd"}
    config = settings("output.sources_per_shard=2")
    folder = run(tmp_path, videos, config)
    plan = load_plan(folder)
    gone = videos | {"a": Video("same", fails=True), "b": Video("same", fails=True)}
    for name in ("shard-000000.json", "shard-000000.tar"):
        (folder / name).unlink()
    work(folder, plan, 0, gone)
    assert finish_run(folder, plan).again == ("shard-000001",)
    found = sources(folder)
    assert found["c"].reasons == ("not_stored",)
    assert found["d"].duplicate_of == found["c"].id
    go_on(folder, gone)
    found = sources(folder)
    assert [found[name].verdict for name in "abcd"] == ["failed", "failed", "kept", "rejected"]


def test_a_damaged_shard_is_taken_away_and_asked_for_again(whole, tmp_path):
    folder = unfinished(tmp_path, VIDEOS, settings())
    plan = load_plan(folder)
    tar = folder / "shard-000001.tar"
    seen = tar.stat()
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    os.utime(tar, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert finish_run(folder, plan).again == ("shard-000001",)
    assert not tar.exists()
    assert (folder / "damaged" / tar.name).read_bytes() == data
    shutil.rmtree(folder / "damaged")
    assert contents(go_on(folder, VIDEOS)) == contents(whole)
