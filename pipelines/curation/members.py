"""What a source's clips make of it, and what a kept clip's member KEY.json says.

Functions of records alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pipelines import schema
from pipelines.curation.source import recorded_scores
from pipelines.schema import ClipRecord, Scores, SourceRecord


def judged_source(record: SourceRecord, clips: Sequence[ClipRecord]) -> SourceRecord:
    """The source with these clips: kept if one of them is, else rejected for all their reasons."""
    kept = any(clip.verdict == "kept" for clip in clips)
    reasons = () if kept else tuple(dict.fromkeys(r for clip in clips for r in clip.reasons))
    return replace(
        record,
        clips=tuple(clips),
        verdict="kept" if kept else "rejected",
        reasons=reasons,
        scores=_source_scores(clips),
    )


def _source_scores(clips: Sequence[ClipRecord]) -> Scores:
    """Scores of a whole source: means weighted by the clips' length, of the camera the most.

    Clips on which a score was not measured do not count for it.
    """
    scores: Scores = {}
    for name in dict.fromkeys(name for clip in clips for name in clip.scores):
        pairs = [
            (float(value), clip.end - clip.start)
            for clip in clips
            if isinstance(value := clip.scores.get(name), int | float)
        ]
        if not pairs:
            continue
        values, weights = np.array(pairs).T
        if name == "seconds":
            scores[name] = float(values.sum())
        elif name in ("camera_percent_per_second", "camera_peak_percent_per_second"):
            scores[name] = float(values.max())
        else:
            scores[name] = float(np.average(values, weights=weights))
    return recorded_scores(scores)


def clip_json(
    record: SourceRecord,
    clip: ClipRecord,
    models: Mapping[str, Mapping[str, Any]],
    config_hash: str,
    versions: Mapping[str, str],
) -> bytes:
    """The member KEY.json of a kept clip; `models` and `versions` are those of its shard."""
    return schema.encode_json(
        {
            "key": clip.key,
            "source": {
                "id": record.id,
                "sha256": record.sha256,
                "bytes": record.bytes,
                "info": record.info,
            },
            "span": [clip.start, clip.end],
            "fps": clip.fps,
            "num_frames": clip.num_frames,
            "size": [clip.height, clip.width],
            "scores": clip.scores,
            "provenance": {"uris": record.uris, **record.provenance},
            "models": models,
            "config_hash": config_hash,
            "versions": versions,
        }
    )
