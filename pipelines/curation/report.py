"""What a run found, for people: counts, and a page to look at that needs nothing beside it."""

import base64
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pipelines import shards
from pipelines.curation.charts import draw_charts
from pipelines.curation.filters import REASONS
from pipelines.curation.ledger import THUMBS_FOLDER
from pipelines.curation.plan import Plan, load_plan
from pipelines.curation.tally import Tally, tally
from pipelines.curation.timings import read_timings
from pipelines.schema import ShardRecord, SourceRecord
from pipelines.shards import write_atomic

REPORT_FILE = "report.html"
_TEMPLATE = "report.html.jinja"
_MAX_ERRORS = 12


def summarise(plan: Plan, records: Iterable[ShardRecord]) -> dict[str, Any]:
    """Counts of a run as plain values: verdicts, reasons, funnel, clips, seconds, models."""
    counted = tally(plan.config, records, examples=False)
    return counted.summary() | {"config_hash": plan.config_hash}


def stats(folder: Path | str) -> dict[str, Any]:
    """`summarise` for a folder that `curate` wrote.

    Raises:
        ShardError, PlanError: it is no such folder, or damaged.
    """
    folder = Path(folder)
    return summarise(load_plan(folder), shards.iter_records(folder))


def write_report(folder: Path | str) -> dict[str, Any]:
    """Write `report.html` of a folder; returns what it says, without the pictures.

    Counts, the funnel, distributions with their thresholds, stage times, licences. Records are read
    one at a time; of large runs an even sample of clips is drawn.

    Raises:
        ShardError, PlanError: it is no folder of a run, or damaged.
    """
    folder = Path(folder)
    plan = load_plan(folder)
    timings = read_timings(folder)
    counted = tally(plan.config, shards.iter_records(folder), examples=True)
    content = {
        "summary": counted.summary() | {"config_hash": plan.config_hash},
        "charts": draw_charts(counted),
        "timings": timings,
        "versions": counted.versions,
    }
    write_atomic(folder / REPORT_FILE, _page(content, _groups(folder, counted)).encode())
    return content


def _page(content: dict[str, Any], groups: Sequence[dict[str, Any]]) -> str:
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    source = resources.files("pipelines.curation").joinpath(_TEMPLATE).read_text("utf-8")
    errors = content["summary"]["errors"]
    common = sorted(errors.items(), key=lambda item: (-item[1], item[0]))[:_MAX_ERRORS]
    return environment.from_string(source).render(
        **content, groups=groups, reasons=REASONS, errors=common, num_errors=len(errors)
    )


def _groups(folder: Path, counted: Tally) -> list[dict[str, Any]]:
    """Sources to show: the kept ones, then those of each reason, an even sample where many."""
    groups = []
    for name, sample in counted.groups.items():
        if sample.seen:
            groups.append(
                {
                    "name": name,
                    "title": "kept" if name == "kept" else REASONS[name],
                    "count": sample.seen,
                    "cards": [_card(folder, source) for source in sample.items],
                }
            )
    return groups


def _card(folder: Path, source: SourceRecord) -> dict[str, Any]:
    thumb = folder / THUMBS_FOLDER / f"{source.id}.jpg"
    picture = base64.b64encode(thumb.read_bytes()).decode() if thumb.is_file() else None
    return {
        "name": Path(source.uris[0]).name or source.uris[0],
        "uri": source.uris[0],
        "picture": picture,
        "facts": _facts(source),
        "error": source.error,
        "reasons": source.reasons,
        "copy_of": source.duplicate_of,
    }


def _facts(source: SourceRecord) -> list[str]:
    """What is known of a source in a few words; what was not measured is left out."""
    wanted = (
        ("seconds", "{:.1f} s"),
        ("camera_percent_per_second", "camera {:.1f} %/s"),
        ("face_share", "face {:.0%}"),
        ("pose_missing", "missing {:.0%}"),
        ("people", "people {:.0f}"),
    )
    facts = []
    for name, form in wanted:
        value = source.scores.get(name)
        if isinstance(value, int | float):
            facts.append(form.format(value))
    return facts
