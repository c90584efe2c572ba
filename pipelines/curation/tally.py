"""What a run found, counted record by record, so that a run of any size fits into little memory.

Counts are exact. Distributions and pictures of large runs are of an even sample, drawn with a fixed
seed: the same records give the same report.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from pipelines.curation.config import CurationConfig
from pipelines.curation.filters import REASONS, RULES, measures
from pipelines.schema import ClipRecord, ShardRecord, SourceRecord

MAX_VALUES = 50_000
MAX_CARDS = 48
# Of texts that strangers may have written; what is above is counted as OTHER.
MAX_KINDS = 1_000
OTHER = "other"
_ADDRESS = re.compile(r"\S+://\S+")
_NUMBER = re.compile(r"\b[0-9a-f]{16,}\b|\d{5,}")

# The stages a source passes, in the order people think of them, and what stops it at each.
FUNNEL = (
    ("readable", ("unreadable",)),
    ("single shot", ("cut",)),
    ("long and large enough", ("too_short", "too_small")),
    ("static camera", ("moving_camera",)),
    ("clear picture", ("dark_or_bright", "blurred", "black_bars", "burnt_in_text")),
    ("good face", ("no_face", "low_face_quality", "person_changes")),
    ("visible keypoints", ("missing_keypoints", "missing_hands", "missing_face_points")),
    ("right people", ("wrong_people_count", "small_person", "people_cross")),
    ("not seen before", ("duplicate",)),
    ("stored", ("not_stored",)),
)
_STAGE_OF = {reason: number for number, (_, stops) in enumerate(FUNNEL) for reason in stops}


class EvenSample:
    """At most `size` of the items that are added, each as likely as any other (Vitter's R)."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.seen = 0
        self._random = random.Random(0)
        self._items: list[tuple[int, Any]] = []

    def add(self, item: Any) -> None:
        """Offer an item."""
        number, self.seen = self.seen, self.seen + 1
        if len(self._items) < self.size:
            self._items.append((number, item))
            return
        place = self._random.randrange(self.seen)
        if place < self.size:
            self._items[place] = (number, item)

    @property
    def items(self) -> list[Any]:
        """The sample, in the order in which it was added."""
        return [item for _, item in sorted(self._items, key=lambda pair: pair[0])]


class Tally:
    """Counts, distributions and examples of a run, from its records one at a time."""

    def __init__(self, config: CurationConfig, *, examples: bool = False) -> None:
        self.config = config
        self.examples = examples
        self.shards = self.bytes = self.clips = self.clips_kept = self.frames_kept = 0
        self.seconds = self.seconds_kept = 0.0
        self.verdicts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.clip_reasons: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.kinds: dict[str, Counter[str]] = {"camera": Counter(), "people": Counter()}
        self.licences: Counter[str] = Counter()
        self.stopped_at: Counter[int] = Counter()
        self.models: dict[str, Any] = {}
        self.versions: dict[str, str] = {}
        self.values = {rule.score: EvenSample(MAX_VALUES) for rule in RULES}
        self.groups = {name: EvenSample(MAX_CARDS) for name in ("kept", *REASONS)}

    def add(self, record: ShardRecord) -> None:
        """Count one shard."""
        self.shards += 1
        self.bytes += record.tar_bytes
        self.models = self.models or dict(record.models)
        self.versions = self.versions or dict(record.versions)
        for source in record.sources:
            self._add_source(source)

    def _add_source(self, source: SourceRecord) -> None:
        self.verdicts[source.verdict] += 1
        self.reasons.update(source.reasons)
        if source.error:
            _count(self.errors, error_kind(source.error, source.uris))
        _count(self.licences, str(source.provenance.get("licence") or "unknown"))
        self.stopped_at[_last_stage(source)] += 1
        for clip in source.clips:
            self._add_clip(clip)
        if self.examples:
            for name in source.reasons or ("kept",):
                self.groups[name].add(source)

    def _add_clip(self, clip: ClipRecord) -> None:
        kept = clip.verdict == "kept"
        self.clips += 1
        self.clips_kept += kept
        self.seconds += clip.end - clip.start
        self.clip_reasons.update(clip.reasons)
        if kept:
            self.seconds_kept += clip.end - clip.start
            self.frames_kept += clip.num_frames
        for name, score in (("camera", "camera_kind"), ("people", "people")):
            if (value := clip.scores.get(score)) is not None:
                self.kinds[name][f"{value:g}" if isinstance(value, float) else str(value)] += 1
        if self.examples:
            measured = measures(clip.scores, clip.series, self.config)
            for name, sample in self.values.items():
                if (number := measured.get(name)) is not None:
                    sample.add((number, kept))

    def summary(self) -> dict[str, Any]:
        """Counts as plain values: verdicts, reasons, funnel, clips, seconds, models, licences."""
        return {
            "shards": self.shards,
            "sources": self.verdicts.total(),
            "kept": self.verdicts["kept"],
            "rejected": self.verdicts["rejected"],
            "failed": self.verdicts["failed"],
            "clips_kept": self.clips_kept,
            "clips_rejected": self.clips - self.clips_kept,
            "seconds_seen": round(self.seconds, 3),
            "seconds_kept": round(self.seconds_kept, 3),
            "frames_kept": self.frames_kept,
            "bytes": self.bytes,
            "reasons": {name: self.reasons[name] for name in REASONS if self.reasons[name]},
            "clip_reasons": {
                name: self.clip_reasons[name] for name in REASONS if self.clip_reasons[name]
            },
            "errors": dict(sorted(self.errors.items())),
            "funnel": self._funnel(),
            "kinds": {name: dict(found.most_common()) for name, found in self.kinds.items()},
            "licences": dict(self.licences.most_common()),
            "models": self.models,
        }

    def _funnel(self) -> list[dict[str, Any]]:
        """How many sources have a clip that no rule up to each stage rejects."""
        total = self.verdicts.total()
        steps = [{"stage": "sources", "sources": total}]
        for number, (stage, _) in enumerate(FUNNEL):
            passed = sum(count for at, count in self.stopped_at.items() if at > number)
            steps.append({"stage": stage, "sources": passed})
        return steps


def tally(config: CurationConfig, records: Iterable[ShardRecord], *, examples: bool) -> Tally:
    """Count all records; with `examples`, distributions and sources to show are kept too."""
    counted = Tally(config, examples=examples)
    for record in records:
        counted.add(record)
    return counted


def error_kind(error: str, uris: Iterable[str]) -> str:
    """An error without the source that it is of, and without what else differs from one to another.

    A million failures of one kind are one line of the report.
    """
    for uri in uris:
        error = error.removeprefix(f"{uri} ")
    error = _ADDRESS.sub("…", error).removeprefix("… ")
    return _NUMBER.sub("…", error)


def _count(counter: Counter[str], kind: str) -> None:
    counter[kind if kind in counter or len(counter) < MAX_KINDS else OTHER] += 1


def _last_stage(source: SourceRecord) -> int:
    """The stage of FUNNEL that stops the source; its length for a kept one."""
    if source.verdict == "failed":
        return 0
    if not source.clips:
        return _stage(source.reasons)
    return max(_stage(clip.reasons) for clip in source.clips)


def _stage(reasons: Iterable[str]) -> int:
    return min((_STAGE_OF[reason] for reason in reasons), default=len(FUNNEL))
