"""Agreement of a run with labels made by hand."""

import csv
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, TypeVar

from pipelines import shards
from pipelines.curation.filters import camera_moves, lacks_face, people_class
from pipelines.curation.plan import load_plan
from pipelines.schema import SourceRecord

_T = TypeVar("_T")
_NEEDED = ("file", "camera", "cuts", "face")
_PEOPLE = ("0", "1", "2+")


def evaluate_curation(folder: Path | str, labels_csv: Path | str) -> dict[str, Any]:
    """Precision, recall and F1 of each rule, and how often the number of people is right.

    The CSV has the columns `file`, `camera` (static, slight, moving), `cuts` and `face` (yes, no),
    and may have `people` (a number). Sources whose camera is labelled `slight` do not count for the
    camera. A copy of another video counts with what was found in that one. A source that failed
    was not recognised: it counts as missed wherever its label is positive, and as a wrong number
    of people.

    Raises:
        ValueError: columns are missing, or no label is of a source of the folder.
    """
    folder = Path(folder)
    config = load_plan(folder).config
    labels = _read_labels(Path(labels_csv))
    sources = _labelled_sources(folder, labels)
    common = sorted(sources)
    if not common:
        raise ValueError(
            f"{labels_csv} labels none of the files of {folder}: its column `file` must hold "
            "their names."
        )
    # Left out, files that cannot be read would make everything look better.
    failed = {name for name in common if sources[name].verdict == "failed"}
    judged = [name for name in common if labels[name]["camera"] != "slight"]
    counted = [name for name in common if labels[name].get("people")]
    moves = {
        name: any(camera_moves(clip.scores, config) for clip in sources[name].clips)
        for name in judged
    }
    faces = {name: not lacks_face(_all_series(sources[name]), config) for name in common}
    return {
        "labelled": len(common),
        "labels_without_source": sorted(labels.keys() - sources.keys()),
        "failed": sorted(failed),
        "moving_camera": _agreement(
            {name: labels[name]["camera"] == "moving" for name in judged},
            _unless(failed, moves, False),
        ),
        "cuts": _agreement(
            {name: labels[name]["cuts"] == "yes" for name in common},
            _unless(failed, {name: bool(sources[name].info.get("cuts")) for name in common}, False),
        ),
        "face_present": _agreement(
            {name: labels[name]["face"] == "yes" for name in common}, _unless(failed, faces, False)
        ),
        "people": _accuracy(
            {name: _class_of(labels[name]["people"]) for name in counted},
            _unless(failed, {name: _most_people(sources[name]) for name in counted}, "failed"),
        ),
    }


def _unless(failed: Set[str], found: Mapping[str, _T], instead: _T) -> dict[str, _T]:
    """What was found of each source, and `instead` of those that failed."""
    return {name: instead if name in failed else value for name, value in found.items()}


def _labelled_sources(folder: Path, labels: Mapping[str, Any]) -> dict[str, SourceRecord]:
    """The labelled sources by file name; copies are stood for by what they are copies of."""
    found: dict[str, SourceRecord] = {}
    originals: dict[str, SourceRecord] = {}
    copies: dict[str, str] = {}
    for record in shards.iter_records(folder):
        for source in record.sources:
            names = [Path(uri).name for uri in source.uris if Path(uri).name in labels]
            found.update(dict.fromkeys(names, source))
            originals[source.id] = source
            if source.duplicate_of:
                copies.update(dict.fromkeys(names, source.duplicate_of))
    return found | {name: originals[first] for name, first in copies.items() if first in originals}


def _all_series(source: SourceRecord) -> dict[str, list[float]]:
    """The values of all sampled frames of a source, over its clips."""
    names = {name for clip in source.clips for name in clip.series}
    return {
        name: [value for clip in source.clips for value in clip.series.get(name, ())]
        for name in sorted(names)
    }


def _most_people(source: SourceRecord) -> str:
    """The class of the clip with the most people."""
    classes = [people_class(clip.scores) for clip in source.clips]
    return max((found for found in classes if found), key=_PEOPLE.index, default="0")


def _class_of(label: str) -> str:
    count = int(label)
    return _PEOPLE[min(count, 2)]


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


def _accuracy(truth: dict[str, str], found: dict[str, str]) -> dict[str, Any]:
    wrong = {
        name: f"labelled {truth[name]}, found {found[name]}"
        for name in sorted(truth)
        if truth[name] != found[name]
    }
    return {
        "clips": len(truth),
        "accuracy": round(1 - len(wrong) / max(1, len(truth)), 4),
        "wrong": wrong,
    }


def _read_labels(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        missing = [name for name in _NEEDED if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(
                f"{path} has no column {', '.join(missing)}; expected at least "
                f"{', '.join(_NEEDED)}."
            )
        return {row["file"]: row for row in reader}
