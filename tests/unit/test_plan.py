"""The plan: shards of sorted sources, kept in a folder that belongs to one plan; its cost."""

import json
import pickle
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.curation.config import CurationConfig
from pipelines.curation.estimate import WORKER_SECONDS_PER_VIDEO_SECOND, estimate
from pipelines.curation.plan import (
    SOURCE_SCHEMA,
    Plan,
    PlanError,
    PlannedSource,
    load_plan,
    make_plan,
    replace_config,
    save_plan,
    shard_size,
)
from pipelines.curation.plan_benchmark import measure_planning
from pipelines.overrides import apply_overrides

CONFIG = apply_overrides(CurationConfig(), ["output.sources_per_shard=2"])


def sources(*uris: str, **columns: list[str | None]) -> pa.Table:
    empty = [None] * len(uris)
    others = [columns.get(name, empty) for name in SOURCE_SCHEMA.names[1:]]
    return pa.table([list(uris), *others], schema=SOURCE_SCHEMA)


def plan_of(*uris: str, config: CurationConfig = CONFIG, **models: str) -> Plan:
    return make_plan(sources(*uris), config, models)


def test_shards_are_runs_of_rows_and_give_their_rows_alone():
    table = sources("a", "b", "c", licence=["CC0", None, None], sha256=[None, "ab" * 32, None])
    plan = make_plan(table, CONFIG)
    assert [(shard.name, shard.index) for shard in plan.shards()] == [
        ("shard-000000", 0),
        ("shard-000001", 1),
    ]
    first, second = plan.shard_rows(0)
    # The first 16 digits of the SHA-256 of the name.
    assert first == PlannedSource(id="ca978112ca1bbdca", uri="a", licence="CC0")
    assert (second.uri, second.expected_sha256) == ("b", "ab" * 32)
    assert [row.uri for row in plan.shard_rows(1)] == ["c"]
    assert plan.shard_ids(0) == [first.id, second.id]
    with pytest.raises(IndexError):
        plan.shard_rows(2)


def test_large_runs_get_larger_shards_instead_of_ever_more():
    auto, fixed = CurationConfig(), CONFIG
    assert [shard_size(count, auto) for count in (1, 100_000)] == [8, 8]
    assert all(count / shard_size(count, auto) <= 32_000 for count in (10**6, 5 * 10**6))
    assert shard_size(10**6, fixed) == 2


def test_a_plan_of_nothing_is_refused():
    with pytest.raises(PlanError, match="no sources"):
        plan_of()


def test_what_the_rows_say_counts_and_not_how_they_lie_in_memory():
    names = [f"v/{number:03d}.mp4" for number in range(100)]
    plan = plan_of(*names)
    whole = sources("first", *names)
    parts = pa.concat_tables([whole.slice(1, 30), whole.slice(31)])
    assert make_plan(parts, CONFIG, {}) == plan
    moved = sources("a", "b", title=["x", None]), sources("a", "b", title=[None, "x"])
    assert make_plan(moved[0], CONFIG) != make_plan(moved[1], CONFIG)


def test_saved_plan_is_accepted_again(tmp_path):
    plan = plan_of("a", "b", "c", face="cascade")
    saved = save_plan(tmp_path, plan)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(files) == ["plan.arrow", "plan.json"]
    assert save_plan(tmp_path, plan) == saved == load_plan(tmp_path) == plan
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    assert load_plan(tmp_path).shard_rows(1) == plan.shard_rows(1)


def test_plan_travels_as_the_name_of_its_file(tmp_path):
    names = [f"https://h.org/{number:05d}" for number in range(20_000)]
    saved = save_plan(tmp_path, plan_of(*names))
    data = pickle.dumps(saved)
    assert len(data) < 10_000
    assert pickle.loads(data).shard_rows(7_000) == saved.shard_rows(7_000)


def test_other_settings_are_refused_with_the_difference(tmp_path):
    save_plan(tmp_path, plan_of("a"))
    other = apply_overrides(CONFIG, ["pose.max_missing=0.5"])
    with pytest.raises(PlanError, match=r"pose\.max_missing: 0\.7 → 0\.5") as caught:
        save_plan(tmp_path, plan_of("a", config=other))
    assert "animator curate revise" in str(caught.value)
    other = apply_overrides(other, ["output.crf=20"])
    with pytest.raises(PlanError, match=r"output\.crf: 18 → 20") as caught:
        save_plan(tmp_path, plan_of("a", config=other))
    assert "revise" not in str(caught.value)


def test_settings_that_change_no_shard_may_differ_and_the_new_ones_count(tmp_path):
    before = save_plan(tmp_path, plan_of("a"))
    other = apply_overrides(CONFIG, ["download.retries=9", "video.timeout_seconds=60"])
    after = save_plan(tmp_path, plan_of("a", config=other))
    assert after.config_hash == before.config_hash
    assert load_plan(tmp_path).config.download.retries == 9


def test_other_sources_are_refused_with_a_few_of_their_names(tmp_path):
    save_plan(tmp_path, plan_of("a", "b", "c"))
    with pytest.raises(PlanError) as caught:
        save_plan(tmp_path, plan_of("b", *(f"n{number}" for number in range(5))))
    assert "2 sources no longer there: a, c\n" in str(caught.value)
    assert "5 sources new: n0, n1, n2, …\n" in str(caught.value)


def test_other_provenance_is_refused_with_the_column(tmp_path):
    save_plan(tmp_path, make_plan(sources("a", "b"), CONFIG))
    with pytest.raises(PlanError, match="1 source with another licence: b"):
        save_plan(tmp_path, make_plan(sources("a", "b", licence=[None, "CC0"]), CONFIG))


def test_other_models_are_refused(tmp_path):
    save_plan(tmp_path, plan_of("a", face="small"))
    with pytest.raises(PlanError, match=r"models\.face: 'small' → 'large'"):
        save_plan(tmp_path, plan_of("a", face="large"))


def test_plan_of_another_version_is_refused(tmp_path):
    (tmp_path / "plan.json").write_text('{"config": {}, "sources": [], "shards": [], "format": 1}')
    with pytest.raises(PlanError, match="has format 1, expected 2"):
        save_plan(tmp_path, plan_of("a"))


def test_damaged_plans_are_refused(tmp_path):
    with pytest.raises(PlanError, match=r"holds no plan\.json"):
        load_plan(tmp_path)
    save_plan(tmp_path, plan_of("a"))
    whole = (tmp_path / "plan.json").read_text()
    (tmp_path / "plan.arrow").write_bytes(b"ARROW1")
    with pytest.raises(PlanError, match="is damaged"):
        load_plan(tmp_path)
    (tmp_path / "plan.json").write_text(whole[:100])
    with pytest.raises(PlanError, match="cannot be read"):
        load_plan(tmp_path)


def test_shards_without_a_plan_are_refused(tmp_path):
    (tmp_path / "shard-000000.tar").touch()
    with pytest.raises(PlanError, match=r"holds shards but no plan\.json"):
        save_plan(tmp_path, plan_of("a"))


def test_a_plan_that_died_while_it_was_saved_is_saved_anew(tmp_path):
    (tmp_path / "plan.arrow").write_bytes(b"half of it")
    assert save_plan(tmp_path, plan_of("a")) == load_plan(tmp_path)


def test_replaced_settings_keep_the_sources(tmp_path):
    plan = save_plan(tmp_path, plan_of("a", "b", face="small"))
    config = apply_overrides(CONFIG, ["camera.max_percent_per_second=8"])
    replaced = replace_config(tmp_path, config)
    assert (
        replaced
        == load_plan(tmp_path)
        == save_plan(tmp_path, plan_of("a", "b", config=config, face="small"))
    )
    assert replaced.config_hash != plan.config_hash
    with pytest.raises(PlanError, match="divides the sources"):
        replace_config(tmp_path, CurationConfig())


def test_estimate_of_addresses_says_what_is_not_known(tmp_path):
    plan = plan_of("https://A.org/1", "https://a.org/2", "s3://b/3", str(tmp_path / "gone.mp4"))
    found = estimate(plan, tmp_path / "out", workers=3)
    assert found.places == {"https://a.org": 2, "files": 1, "s3://b": 1}
    assert (found.sources, found.shards, found.shards_done, found.sources_left) == (4, 2, 0, 4)
    assert (found.video_hours, found.wall_hours, found.disk_bytes) == (None, None, None)
    assert any("not known until they are fetched" in note for note in found.notes)
    assert not (tmp_path / "out").exists()


@pytest.mark.real_data
def test_estimate_of_files_rests_on_a_look_at_some_of_them(data_root, tmp_path):
    clips = sorted(map(str, (data_root / "video").glob("*.mp4")))[:6]
    found = estimate(plan_of(*clips), tmp_path, workers=2)
    assert found.source_bytes == sum(Path(clip).stat().st_size for clip in clips)
    assert found.video_hours is not None
    assert 0.001 < found.video_hours < 0.2
    assert found.cpu_hours is not None
    expected = WORKER_SECONDS_PER_VIDEO_SECOND * found.video_hours
    assert found.cpu_hours == pytest.approx(expected, abs=0.005)
    assert found.wall_hours == pytest.approx(found.cpu_hours / 2, abs=0.001)


def test_estimate_goes_by_the_times_of_the_folder(tmp_path):
    names = [f"https://h.org/{number:02d}" for number in range(40)]
    save_plan(tmp_path, plan_of(*names, face="small"))
    line = json.dumps({"source": "x", "seconds": {"decode": 54.0, "pose": 36.0}})
    (tmp_path / "timings.jsonl").write_text(f"{line}\n" * 30)
    before = sorted(path.name for path in tmp_path.iterdir())
    found = estimate(plan_of(*names), tmp_path, workers=2)
    assert (found.cpu_hours, found.wall_hours) == (1.0, 0.5)
    shared = estimate(plan_of(*names), tmp_path, workers=1, decoders=4)
    assert (shared.cpu_hours, shared.wall_hours) == (1.0, 0.25)
    assert found.stage_seconds == {"decode": 54.0, "pose": 36.0}
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    other = estimate(plan_of(*names[1:]), tmp_path)
    assert any("would be refused" in note for note in other.notes)


def test_benchmark_of_planning_measures_each_step(tmp_path):
    ours = b"\1" * (1 << 30)  # what this process holds is not the step's
    found = measure_planning(300, 5, folder=tmp_path)
    assert len(ours) == 1 << 30
    assert (found["sources"], found["shards_committed"]) == (300, 5)
    for step in ("plan_csv", "plan_parquet", "resume_first", "resume"):
        assert found[step]["seconds"] > 0
        assert 1 << 24 < found[step]["peak_bytes"] < 1 << 30
    assert list(tmp_path.iterdir()) == []
