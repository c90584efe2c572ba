"""What a run found, for people: counts, a page to look at, and agreement with labels by hand."""

import base64
import csv
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pipelines import shards
from pipelines.curation.charts import draw_charts
from pipelines.curation.filters import REASONS, camera_moves, lacks_face
from pipelines.curation.ledger import THUMBS_FOLDER
from pipelines.curation.plan import Plan, load_plan
from pipelines.schema import ShardRecord, SourceRecord
from pipelines.shards import write_atomic

REPORT_FILE = "report.html"
_TEMPLATE = "report.html.jinja"
_MAX_THUMBS = 48

# The stages a source passes, in the order people think of them, and what stops it at each.
FUNNEL = (
    ("readable", ()),
    ("single shot", ("cut",)),
    ("long and large enough", ("too_short", "too_small")),
    ("static camera", ("moving_camera",)),
    ("good face", ("no_face", "low_face_quality")),
    ("visible keypoints", ("missing_keypoints",)),
)


def summarise(plan: Plan, records: Iterable[ShardRecord]) -> dict[str, Any]:
    """Counts of a run as plain values: verdicts, reasons, funnel, clips, seconds, models."""
    records = list(records)
    sources = [source for record in records for source in record.sources]
    clips = [clip for source in sources for clip in source.clips]
    kept = [clip for clip in clips if clip.verdict == "kept"]
    verdicts = Counter(source.verdict for source in sources)
    reasons = Counter(reason for source in sources for reason in source.reasons)
    errors = Counter(source.error for source in sources if source.error)
    return {
        "shards": len(records),
        "sources": len(sources),
        "kept": verdicts["kept"],
        "rejected": verdicts["rejected"],
        "failed": verdicts["failed"],
        "clips_kept": len(kept),
        "clips_rejected": len(clips) - len(kept),
        "seconds_kept": round(sum(clip.end - clip.start for clip in kept), 3),
        "frames_kept": sum(clip.num_frames for clip in kept),
        "bytes": sum(record.tar_bytes for record in records),
        "reasons": {reason: reasons[reason] for reason in REASONS if reasons[reason]},
        "errors": dict(sorted(errors.items())),
        "funnel": [{"stage": stage, "sources": count} for stage, count in _funnel(sources)],
        "models": records[0].models if records else {},
        "config_hash": plan.config_hash,
    }


def stats(folder: Path | str) -> dict[str, Any]:
    """`summarise` for a folder that `curate` wrote.

    Raises:
        ShardError, PlanError: it is no such folder, or damaged.
    """
    return summarise(load_plan(Path(folder)), shards.read_records(Path(folder)))


def write_report(folder: Path, plan: Plan, records: Sequence[ShardRecord]) -> Path:
    """Write the one-file page `report.html`; the same shards give the same bytes."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    source = resources.files("pipelines.curation").joinpath(_TEMPLATE).read_text("utf-8")
    sources = [item for record in records for item in record.sources]
    page = environment.from_string(source).render(
        summary=summarise(plan, records),
        groups=_groups(folder, sources),
        charts=draw_charts(plan.config, sources),
        versions=records[0].versions if records else {},
        reasons=REASONS,
        config=plan.config,
    )
    path = folder / REPORT_FILE
    write_atomic(path, page.encode())
    return path


def evaluate_curation(folder: Path | str, labels_csv: Path | str) -> dict[str, Any]:
    """Agreement with labels made by hand: precision, recall and F1 of each rule.

    The CSV has the columns `file`, `camera` (static, slight, moving), `cuts` and `face` (yes, no);
    clips whose camera is `slight` do not count for the camera.

    Raises:
        ValueError: columns are missing, or no label is of a source of the folder.
    """
    folder = Path(folder)
    plan = load_plan(folder)
    labels = _read_labels(Path(labels_csv))
    sources = {
        Path(uri).name: source
        for record in shards.read_records(folder)
        for source in record.sources
        for uri in source.uris
    }
    common = sorted(labels.keys() & sources.keys())
    if not common:
        raise ValueError(
            f"{labels_csv} labels none of the {len(sources)} files of {folder}: "
            "its column `file` must hold their names."
        )
    usable = [name for name in common if sources[name].verdict != "failed"]
    moving = [name for name in usable if labels[name]["camera"] != "slight"]
    config = plan.config
    return {
        "sources": len(sources),
        "labelled": len(common),
        "labels_without_source": sorted(labels.keys() - sources.keys()),
        "failed": sorted(set(common) - set(usable)),
        "moving_camera": _agreement(
            {name: labels[name]["camera"] == "moving" for name in moving},
            {name: camera_moves(sources[name].scores, config) for name in moving},
        ),
        "cuts": _agreement(
            {name: labels[name]["cuts"] == "yes" for name in usable},
            {name: bool(sources[name].info.get("cuts")) for name in usable},
        ),
        "no_face": _agreement(
            {name: labels[name]["face"] == "no" for name in usable},
            {name: lacks_face(sources[name].scores, config) for name in usable},
        ),
    }


def _agreement(truth: dict[str, bool], found: dict[str, bool]) -> dict[str, Any]:
    hits = [name for name in truth if truth[name] and found[name]]
    missed = sorted(name for name in truth if truth[name] and not found[name])
    wrong = sorted(name for name in truth if found[name] and not truth[name])
    precision = len(hits) / max(1, len(hits) + len(wrong))
    recall = len(hits) / max(1, len(hits) + len(missed))
    return {
        "clips": len(truth),
        "positives": len(hits) + len(missed),
        "precision": round(precision, 4),
        "recall": round(recall, 4),
        "f1": round(2 * precision * recall / max(1e-9, precision + recall), 4),
        "missed": missed,
        "false_alarms": wrong,
    }


def _read_labels(path: Path) -> dict[str, dict[str, str]]:
    needed = {"file", "camera", "cuts", "face"}
    with path.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        missing = needed - set(reader.fieldnames or ())
        if missing:
            raise ValueError(
                f"{path} has no column {', '.join(sorted(missing))}; expected at least "
                f"{', '.join(sorted(needed))}."
            )
        return {row["file"]: row for row in reader}


def _score(source: SourceRecord, name: str) -> float:
    value = source.scores.get(name)
    return float(value) if isinstance(value, int | float) else 0.0


def _funnel(sources: Sequence[SourceRecord]) -> list[tuple[str, int]]:
    """How many sources have a clip that no rule up to each stage rejects."""
    counts = [("sources", len(sources))]
    readable = [source for source in sources if source.verdict != "failed"]
    stopped: set[str] = set()
    for stage, rules in FUNNEL:
        stopped.update(rules)
        passed = sum(
            any(stopped.isdisjoint(clip.reasons) for clip in source.clips) for source in readable
        )
        counts.append((stage, passed))
    counts.append(("kept", sum(source.verdict == "kept" for source in sources)))
    return counts


def _groups(folder: Path, sources: Sequence[SourceRecord]) -> list[dict[str, Any]]:
    """Sources to show: the kept ones, then those of each reason, evenly chosen where many."""
    members: dict[str, list[SourceRecord]] = {"kept": []} | {reason: [] for reason in REASONS}
    for source in sources:
        for name in source.reasons or ("kept",):
            members[name].append(source)
    groups = []
    for name, found in members.items():
        if found:
            step = math.ceil(len(found) / _MAX_THUMBS)
            cards = [_card(folder, source) for source in found[::step]]
            title = "kept" if name == "kept" else REASONS[name]
            groups.append({"name": name, "title": title, "count": len(found), "cards": cards})
    return groups


def _card(folder: Path, source: SourceRecord) -> dict[str, Any]:
    thumb = folder / THUMBS_FOLDER / f"{source.id}.jpg"
    picture = base64.b64encode(thumb.read_bytes()).decode() if thumb.is_file() else None
    facts = []
    if source.scores:
        facts = [
            f"{_score(source, 'seconds'):.1f} s",
            f"camera {_score(source, 'camera_percent_per_second'):.1f} %/s",
            f"face {_score(source, 'face_share'):.0%}",
            f"keypoints {1 - _score(source, 'pose_missing'):.0%}",
        ]
    return {
        "name": Path(source.uris[0]).name,
        "picture": picture,
        "facts": facts,
        "error": source.error,
        "reasons": source.reasons,
    }
