"""A run's report: exact counts, thresholds where they are, and a page of any size of run."""

from pathlib import Path

import pytest

from infra.verbs.shards import totals
from pipelines.curation.charts import draw_charts
from pipelines.curation.config import CurationConfig
from pipelines.curation.tally import MAX_CARDS, MAX_KINDS, EvenSample, tally
from pipelines.curation.timings import append_timings, iter_timings, read_timings
from pipelines.schema import ClipRecord, ShardRecord, SourceRecord

CONFIG = CurationConfig()


def clip(key: str, *reasons: str, camera: float = 1.0) -> ClipRecord:
    return ClipRecord(
        key=key,
        start=0.0,
        end=4.0,
        verdict="rejected" if reasons else "kept",
        reasons=reasons,
        scores={
            "camera_percent_per_second": camera,
            "camera_tracked_share": 1.0,
            "camera_kind": "static" if camera < 3 else "pan",
            "people": 1,
        },
        num_frames=0 if reasons else 100,
    )


def source(name: str, *clips: ClipRecord, **fields) -> SourceRecord:
    kept = any(one.verdict == "kept" for one in clips)
    reasons = () if kept else tuple(dict.fromkeys(r for one in clips for r in one.reasons))
    fields = {"verdict": "kept" if kept else "rejected", "reasons": reasons} | fields
    return SourceRecord(id=name, sha256=name, bytes=1, uris=(f"{name}.mp4",), clips=clips, **fields)


def record(number: int, *sources: SourceRecord) -> ShardRecord:
    return ShardRecord(
        name=f"shard-{number:06d}",
        config_hash="0",
        tar_sha256="",
        tar_bytes=10,
        members={},
        counts={},
        sources=sources,
    )


RECORDS = [
    record(
        0,
        source("a", clip("a_0")),
        source("b", clip("b_0", "moving_camera", camera=9.0), clip("b_1", "no_face")),
        source("c", verdict="failed", reasons=("unreadable",), error="cut off"),
    ),
    record(
        1,
        source("d", clip("d_0", "cut", "no_face")),
        source("e", verdict="rejected", reasons=("duplicate",), duplicate_of="a"),
        source("f", clip("f_0"), clip("f_1", "duplicate"), provenance={"licence": "CC BY"}),
    ),
]


def test_counts_are_of_every_source_and_clip() -> None:
    found = tally(CONFIG, RECORDS, examples=False).summary()
    assert (found["sources"], found["kept"], found["rejected"], found["failed"]) == (6, 2, 3, 1)
    assert (found["clips_kept"], found["clips_rejected"], found["frames_kept"]) == (2, 4, 200)
    assert found["seconds_kept"] == 8.0
    assert found["errors"] == {"cut off": 1}
    assert found["licences"] == {"unknown": 5, "CC BY": 1}
    assert found["kinds"]["camera"] == {"static": 5, "pan": 1}


def test_funnel_follows_the_best_clip_of_each_source() -> None:
    steps = {
        step["stage"]: step["sources"]
        for step in tally(CONFIG, RECORDS, examples=False).summary()["funnel"]
    }
    # b falls at the face (one of its clips passes the camera), e as a copy.
    assert (steps["sources"], steps["readable"], steps["single shot"]) == (6, 5, 4)
    assert (steps["static camera"], steps["good face"], steps["not seen before"]) == (4, 3, 2)
    assert list(steps.values()) == sorted(steps.values(), reverse=True)


def test_charts_draw_every_clip_and_the_threshold() -> None:
    charts = {
        chart["reason"]: chart for chart in draw_charts(tally(CONFIG, RECORDS, examples=True))
    }
    camera = charts["moving_camera"]
    assert camera["clips"] == 6
    assert [line["value"] for line in camera["thresholds"]] == [3.0]
    line = camera["thresholds"][0]["line"]
    left = [bar for bar in camera["bars"] if bar["x"] < line]
    assert [bar["label"] for bar in left] == ["2 kept, 3 rejected"]
    assert "blurred" not in charts, "a score that nobody measured has no chart"


def test_a_large_run_shows_an_even_sample() -> None:
    records = [record(n, source(f"s{n}", clip(f"s{n}_0"))) for n in range(500)]
    counted = tally(CONFIG, records, examples=True)
    shown = [one.id for one in counted.groups["kept"].items]
    assert (len(shown), counted.groups["kept"].seen) == (MAX_CARDS, 500)
    assert max(int(name[1:]) for name in shown) > 300
    again = tally(CONFIG, records, examples=True).groups["kept"].items
    assert [one.id for one in again] == shown


def test_even_sample_favours_nobody() -> None:
    counts = [0] * 10
    for repeat in range(300):
        sample = EvenSample(3)
        sample._random.seed(repeat)
        for number in range(10):
            sample.add(number)
        for number in sample.items:
            counts[number] += 1
    assert min(counts) > 60
    assert max(counts) < 120


def test_stage_times_add_up_and_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    append_timings(tmp_path, [("a", {"decode": 1.0, "models": 3.0}), ("b", {"decode": 2.0})])
    append_timings(tmp_path, [("c", {"decode": 9.0})])
    with (tmp_path / "timings.jsonl").open("a") as stream:
        stream.write('{"source": "d", "seco')
    found = read_timings(tmp_path)
    assert len(list(iter_timings(tmp_path))) == 3
    assert found["seconds"] == 15.0
    assert found["stages"][0] == {"stage": "decode", "seconds": 12.0, "share": 0.8}
    assert found["slowest"][0] == {"source": "c", "seconds": 9.0, "stage": "decode"}


def test_no_times_are_no_error(tmp_path: Path) -> None:
    assert read_timings(tmp_path)["stages"] == []


def test_funnel_knows_every_reason() -> None:
    from pipelines.curation.filters import REASONS
    from pipelines.curation.tally import FUNNEL

    assert {reason for _, stops in FUNNEL for reason in stops} == set(REASONS)


@pytest.mark.parametrize("direction", ["min", "max"])
def test_every_rule_has_a_chart_where_it_was_measured(direction: str) -> None:
    from pipelines.curation.filters import RULES

    scores = {rule.score: 0.5 for rule in RULES} | {"width": 500, "height": 400}
    scores |= {"camera_tracked_share": 1.0}
    series = {"face_score": [0.9], "pose_missing": [0.1]}
    one = ClipRecord(key="k", start=0, end=1, verdict="kept", scores=scores, series=series)
    drawn = draw_charts(tally(CONFIG, [record(0, source("a", one))], examples=True))
    titles = {chart["title"] for chart in drawn}
    wanted = {rule.title for rule in RULES if rule.direction == direction}
    first = {rule.score: rule.title for rule in reversed(RULES)}
    assert {first[rule.score] for rule in RULES if rule.title in wanted} <= titles


def test_a_million_addresses_that_fail_alike_are_one_line() -> None:
    failed = [
        source(
            f"s{number}",
            verdict="failed",
            reasons=("unreadable",),
            error=f"https://example.org/{number}.mp4 is not there (HTTP 404): check the address.",
        )
        for number in range(50)
    ]
    failed.append(
        source("x", verdict="failed", reasons=("unreadable",), error="x.mp4 cannot be read.")
    )
    found = tally(CONFIG, [record(0, *failed)], examples=False).summary()
    assert found["errors"] == {
        "is not there (HTTP 404): check the address.": 50,
        "cannot be read.": 1,
    }


def test_errors_of_endless_kinds_flood_neither_report_nor_terminal() -> None:
    failed = [
        source(
            f"s{number}",
            verdict="failed",
            reasons=("unreadable",),
            error=f"says {number % 3000}",
            provenance={"licence": f"licence {number}"},
        )
        for number in range(5000)
    ]
    found = tally(CONFIG, [record(0, *failed)], examples=False).summary()
    assert sum(found["errors"].values()) == sum(found["licences"].values()) == 5000
    assert (len(found["errors"]), len(found["licences"])) == (MAX_KINDS + 1, MAX_KINDS + 1)
    lines = totals(found)
    assert len(lines) < 20
    assert lines[-1].endswith(f"and {MAX_KINDS - 11} more kinds of errors")
