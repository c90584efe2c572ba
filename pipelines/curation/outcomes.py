"""What becomes of a shard's record when others than the scores have a say: copies and storage.

A record says the same however its clips came to their verdicts: what was kept and is now rejected
looks as if it had never been stored, and a copy as if it had never been looked at.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from pipelines.schema import ClipRecord, ShardRecord, SourceRecord

DUPLICATE, NOT_STORED = "duplicate", "not_stored"


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What a record says of a clip that is stored: its frames, rate and size in pixels."""

    num_frames: int
    fps: float
    width: int
    height: int


_NOTHING = Stored(num_frames=0, fps=0.0, width=0, height=0)


@dataclass(frozen=True)
class ClipRuling:
    """What is to become of a clip: its own reasons, else the key of the clip that it repeats."""

    reasons: tuple[str, ...] = ()
    duplicate_of: str | None = None


@dataclass(frozen=True)
class SourceRuling:
    """What is to become of a source.

    original: the id of the source of which it is a copy.
    is_orphan: it was a copy of a source that is no more, and must be worked on itself.
    clips: what is to become of its clips, in order.
    """

    original: str | None = None
    is_orphan: bool = False
    clips: tuple[ClipRuling, ...] = ()


def own_reasons(reasons: Iterable[str]) -> tuple[str, ...]:
    """The reasons that a clip's own scores gave; not those that other clips and storage give."""
    return tuple(reason for reason in reasons if reason not in (DUPLICATE, NOT_STORED))


def settle(
    record: ShardRecord,
    rulings: Sequence[SourceRuling],
    config_hash: str,
    find_spare: Callable[[str], Stored | None] = lambda key: None,
) -> ShardRecord:
    """A shard's record after the rulings; what its tar then holds is `repack`'s to say.

    Args:
        find_spare: what is stored of the clip with a key outside the shard's tar, if anything.
    """
    sources = [
        _settle_source(source, ruling, record.members, find_spare)
        for source, ruling in zip(record.sources, rulings, strict=True)
    ]
    return replace(
        record, config_hash=config_hash, sources=tuple(sources), counts=count_verdicts(sources)
    )


def copy_of(source: SourceRecord, original: str) -> SourceRecord:
    """The source as one whose bytes the source with the id `original` had before it."""
    return replace(
        source,
        verdict="rejected",
        reasons=(DUPLICATE,),
        error=None,
        info={},
        scores={},
        clips=(),
        duplicate_of=original,
    )


def is_wanted(source: SourceRecord) -> bool:
    """Whether the source has to be worked on again for what would be kept but was never stored."""
    return any(NOT_STORED in entry.reasons for entry in (source, *source.clips))


def count_verdicts(sources: Iterable[SourceRecord]) -> dict[str, int]:
    """The counts of a shard's record."""
    sources = list(sources)
    verdicts = Counter(source.verdict for source in sources)
    clips = Counter(clip.verdict for source in sources for clip in source.clips)
    return {
        "sources": len(sources),
        "kept": verdicts["kept"],
        "rejected": verdicts["rejected"],
        "failed": verdicts["failed"],
        "clips_kept": clips["kept"],
        "clips_rejected": clips["rejected"],
    }


def _settle_source(
    source: SourceRecord,
    ruling: SourceRuling,
    members: Mapping[str, int],
    find_spare: Callable[[str], Stored | None],
) -> SourceRecord:
    if ruling.original is not None:
        return copy_of(source, ruling.original)
    if ruling.is_orphan:
        return replace(copy_of(source, ""), reasons=(NOT_STORED,), duplicate_of=None)
    if not source.clips:
        return source
    clips = [
        _settle_clip(clip, one, members, find_spare)
        for clip, one in zip(source.clips, ruling.clips, strict=True)
    ]
    kept = any(clip.verdict == "kept" for clip in clips)
    reasons = () if kept else tuple(dict.fromkeys(r for clip in clips for r in clip.reasons))
    return replace(
        source, clips=tuple(clips), verdict="kept" if kept else "rejected", reasons=reasons
    )


def _settle_clip(
    clip: ClipRecord,
    ruling: ClipRuling,
    members: Mapping[str, int],
    find_spare: Callable[[str], Stored | None],
) -> ClipRecord:
    if ruling.reasons or ruling.duplicate_of is not None:
        return _rejected(clip, ruling.reasons or (DUPLICATE,), ruling.duplicate_of)
    kept = replace(clip, verdict="kept", reasons=(), duplicate_of=None)
    if f"{clip.key}.mp4" in members:
        return kept
    spare = find_spare(clip.key)
    return replace(kept, **vars(spare)) if spare else _rejected(clip, (NOT_STORED,))


def _rejected(
    clip: ClipRecord, reasons: tuple[str, ...], duplicate_of: str | None = None
) -> ClipRecord:
    return replace(
        clip, verdict="rejected", reasons=reasons, duplicate_of=duplicate_of, **vars(_NOTHING)
    )
