"""New thresholds for a run that is done: judged from the scores, repacked, nothing decoded.

    animator curate revise DIR --set camera.max_percent_per_second=8

Every clip is judged anew from its record, duplicates are decided anew, and each shard is repacked
with the clips that are now kept; then the folder is what a run with these thresholds would have
made, byte for byte (with `stages.stop_early`, records of clips that would have been stopped earlier
hold more scores). Clips that are taken out are put aside, so that thresholds can be changed back.
Those that were never stored are rejected as `not_stored`: curating with the new settings makes
them, and works on nothing else.

The intent is written to DIR/.work/revise.json first, then the settings to `plan.json`, then the
shards one by one: a revision that dies is gone on with by the next one, or by curating.
"""

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines import schema
from pipelines.curation import ledger
from pipelines.curation.config import CurationConfig, is_threshold, outcome
from pipelines.curation.duplicates import RunTable
from pipelines.curation.filters import REASONS, judge
from pipelines.curation.finish import Report, apply_rulings, telling
from pipelines.curation.outcomes import NOT_STORED, settle
from pipelines.curation.plan import Plan, load_plan, replace_config
from pipelines.curation.repack import SpareClips, roll_forward
from pipelines.curation.report import REPORT_FILE, write_report
from pipelines.overrides import apply_overrides, config_hash, differences, from_dict, to_dict
from pipelines.schema import ShardRecord
from pipelines.shards import read_record, write_atomic

INTENT_FILE = "revise.json"


class ReviseError(ValueError):
    """Settings that cannot be revised, or a folder that is in the middle of a revision."""


@dataclass(frozen=True, kw_only=True)
class ReviseSummary:
    """What new thresholds make of a run.

    changes: `name: before → after` for each threshold.
    clips_before, clips_after: kept.
    reasons_before, reasons_after: how many clips each reason rejects.
    not_stored: clips that would be kept but were never stored.
    damaged: shards whose tars turned out damaged and were moved into DIR/damaged/.
    shards_left_out: shards of the plan that are not there yet; they will be made by the new rules.
    command: what makes the clips that are not stored and the shards that are not there; None if
        nothing is missing.
    """

    changes: tuple[str, ...] = ()
    shards: int = 0
    clips_before: int = 0
    clips_after: int = 0
    reasons_before: dict[str, int] = field(default_factory=dict)
    reasons_after: dict[str, int] = field(default_factory=dict)
    not_stored: int = 0
    damaged: tuple[str, ...] = ()
    shards_left_out: int = 0
    command: str | None = None


def revise(
    folder: Path | str,
    assignments: Sequence[str],
    *,
    progress: Report | None = None,
    dry_run: bool = False,
) -> ReviseSummary:
    """Change thresholds of a run, such as `camera.max_percent_per_second=8`, and what follows.

    Args:
        assignments: `group.name=value`, thresholds only.
        dry_run: only find out what would become of the clips.

    Raises:
        ReviseError: a setting is no threshold.
        ConfigError: a setting does not exist or has a value of the wrong type.
        PlanError: the folder is no folder of a run.
        FolderInUseError: another run is writing into it.
    """
    folder = Path(folder)
    _refuse_others(folder, assignments)
    apply_overrides(load_plan(folder).config, assignments)
    with ledger.folder_lock(folder):
        if dry_run and _intent_file(folder).is_file():
            raise ReviseError(
                f"a revision of {folder} was interrupted: repeat it, or curate into the folder, "
                "before asking what another would do."
            )
        if not dry_run:
            resume_revision(folder, progress)
        plan = load_plan(folder)
        config = apply_overrides(plan.config, assignments)
        judged = _Judged(folder, plan, config, progress)
        changes = differences(outcome(plan.config), outcome(config))
        if not dry_run:
            _intent_file(folder).parent.mkdir(exist_ok=True)
            intent = {"config": config, "changes": changes, "before": judged.before}
            write_atomic(_intent_file(folder), schema.encode_json(intent, digits=17))
            _carry_out(folder, config, judged, progress)
        return judged.summary(folder, config, changes, judged.before)


def resume_revision(folder: Path, progress: Report | None = None) -> ReviseSummary | None:
    """Go on with a revision that was interrupted, if one was. The caller holds the folder's lock.

    To be called before anything in the folder's work folder is removed.
    """
    roll_forward(folder)
    path = _intent_file(folder)
    if not path.is_file():
        return None
    intent = schema.decode_json(path.read_bytes(), str(path))
    config = from_dict(CurationConfig, intent["config"])
    judged = _Judged(folder, load_plan(folder), config, progress)
    _carry_out(folder, config, judged, progress)
    return judged.summary(folder, config, intent["changes"], intent["before"])


def thresholds() -> list[str]:
    """The names of the settings that can be revised."""
    return [name for name, _ in _leaves(CurationConfig()) if is_threshold(name)]


def assignments_of(config: CurationConfig) -> list[str]:
    """What has to be assigned to the default settings to make these."""
    pairs = zip(_leaves(CurationConfig()), _leaves(config), strict=True)
    return [f"{name}={_text(value)}" for (name, usual), (_, value) in pairs if value != usual]


class _Judged:
    """The clips of a run, judged by new thresholds; what is made of them is counted."""

    def __init__(
        self, folder: Path, plan: Plan, config: CurationConfig, progress: Report | None
    ) -> None:
        done = ledger.scan_done(folder, plan)
        self.names = sorted(done.names | done.stale, key=schema.shard_index)
        self.num_missing = plan.num_shards - len(self.names)
        self.before: Counter[str] = Counter()
        self.after: Counter[str] = Counter()
        self.damaged: list[str] = []
        self.hash = config_hash(outcome(config))

        def judge_anew(clip: dict[str, Any]) -> Iterable[str]:
            self.before.update(clip["reasons"] or [clip["verdict"]])
            return judge(clip["scores"], clip["series"], config)

        self.table = RunTable(folder, self.names, judge_anew, telling(progress, "records"))
        self.table.decide(config.duplicates, telling(progress, "duplicates"))

    def count(self, record: ShardRecord | None, name: str) -> None:
        """Note what became of a shard."""
        if record is None:
            self.damaged.append(name)
            return
        for source in record.sources:
            self.after[NOT_STORED] += NOT_STORED in source.reasons and not source.clips
            for clip in source.clips:
                self.after.update(clip.reasons or [clip.verdict])

    def summary(
        self,
        folder: Path,
        config: CurationConfig,
        changes: Sequence[str],
        before: Mapping[str, int],
    ) -> ReviseSummary:
        """What was found; shards that were not brought to it are looked through for the counts."""
        if not self.after and not self.damaged:
            for number, name in enumerate(self.names):
                record = read_record(folder / f"{name}.json")
                spare = SpareClips(folder, name)
                self.count(settle(record, self.table.rulings(number), self.hash, spare.find), name)
        missing = self.after[NOT_STORED] or self.damaged or self.num_missing
        settings = [word for text in assignments_of(config) for word in ("--set", text)]
        command = ["animator", "curate", "SOURCES", "--out", str(folder), *settings]
        return ReviseSummary(
            changes=tuple(changes),
            shards=len(self.names),
            clips_before=before.get("kept", 0),
            clips_after=self.after["kept"],
            reasons_before={name: before[name] for name in REASONS if before.get(name)},
            reasons_after={name: self.after[name] for name in REASONS if self.after[name]},
            not_stored=self.after[NOT_STORED],
            damaged=tuple(self.damaged),
            shards_left_out=self.num_missing,
            command=shlex.join(command) if missing else None,
        )


def _carry_out(
    folder: Path, config: CurationConfig, judged: _Judged, progress: Report | None
) -> None:
    """Settings, then shards; the intent goes last. Nothing of it minds being done twice."""
    replace_config(folder, config)
    tell = telling(progress, "repack")
    for number, name in enumerate(judged.names):
        tell(number, len(judged.names))
        rulings = judged.table.rulings(number)
        judged.count(apply_rulings(folder, name, rulings, judged.hash, put_aside=True), name)
    tell(len(judged.names), len(judged.names))
    for source in judged.table.copies():
        (folder / ledger.THUMBS_FOLDER / f"{source}.jpg").unlink(missing_ok=True)
    # Of a run that has not ended, it is written then.
    if (folder / REPORT_FILE).is_file() and not judged.damaged:
        write_report(folder)
    _intent_file(folder).unlink()
    roll_forward(folder)


def _refuse_others(folder: Path, assignments: Sequence[str]) -> None:
    """Raises ReviseError unless all the settings that are assigned exist and are thresholds."""
    known = [name for name, _ in _leaves(CurationConfig())]
    for assignment in assignments:
        name = assignment.partition("=")[0].strip()
        if name not in known or is_threshold(name):
            # An unknown name is refused, with the nearest one, where it is applied.
            continue
        mend = "curate into another --out folder with it"
        if name not in _leaf_names_of_outcome():
            mend = "give it to `animator curate`, where it may differ from start to start"
        raise ReviseError(
            f"{name} is no threshold: it is not applied to scores that are recorded, so it cannot "
            f"be revised; {mend}. What can be revised in {folder}: {', '.join(thresholds())}."
        )


def _intent_file(folder: Path) -> Path:
    return folder / ledger.WORK_FOLDER / INTENT_FILE


def _leaf_names_of_outcome() -> set[str]:
    groups = outcome(CurationConfig())
    return {f"{group}.{name}" for group, settings in groups.items() for name in settings}


def _leaves(config: CurationConfig) -> Iterator[tuple[str, Any]]:
    for group, settings in to_dict(config).items():
        for name, value in settings.items():
            yield f"{group}.{name}", value


def _text(value: Any) -> str:
    """A setting's value as `apply_overrides` reads it."""
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)
