"""Histograms of scores for the report, as plain numbers for its drawings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.curation.config import CurationConfig
from pipelines.schema import SourceRecord

_NUM_BINS = 24
_HEIGHT = 56


@dataclass(frozen=True, kw_only=True)
class _Chart:
    """A score to draw: its range on paper and where the rule's threshold lies."""

    name: str
    title: str
    high: float
    threshold: float
    keep: str


def draw_charts(config: CurationConfig, sources: Sequence[SourceRecord]) -> list[dict[str, Any]]:
    """A histogram of every score that a rule looks at."""
    return [_draw_chart(chart, sources) for chart in _charts(config)]


def _charts(config: CurationConfig) -> list[_Chart]:
    camera, faces, pose = config.camera, config.faces, config.pose
    limit = camera.max_percent_per_second
    return [
        _Chart(
            name="camera_percent_per_second",
            title="Camera motion, % a second",
            high=4 * limit,
            threshold=limit,
            keep="below",
        ),
        _Chart(
            name="face_share",
            title="Frames with a face",
            high=1.0,
            threshold=faces.min_share,
            keep="above",
        ),
        _Chart(
            name="face_score",
            title="Face detection score",
            high=1.0,
            threshold=faces.min_score,
            keep="above",
        ),
        _Chart(
            name="face_size",
            title="Face height / longer side",
            high=0.5,
            threshold=faces.min_size,
            keep="above",
        ),
        _Chart(
            name="face_sharpness",
            title="Face sharpness",
            high=max(400.0, 4 * faces.min_sharpness),
            threshold=faces.min_sharpness,
            keep="above",
        ),
        _Chart(
            name="pose_missing",
            title="Missing keypoints",
            high=1.0,
            threshold=pose.max_missing,
            keep="below",
        ),
    ]


def _draw_chart(chart: _Chart, sources: Sequence[SourceRecord]) -> dict[str, Any]:
    """Bars of a histogram over clips in percent of the drawing: kept below, rejected on top."""
    bins = [[0, 0] for _ in range(_NUM_BINS)]
    for source in sources:
        for clip in source.clips:
            value = clip.scores.get(chart.name)
            if isinstance(value, int | float):
                share = min(max(value / chart.high, 0.0), 1.0)
                bins[min(int(share * _NUM_BINS), _NUM_BINS - 1)][clip.verdict != "kept"] += 1
    tallest = max(1, *(kept + rejected for kept, rejected in bins))
    return {
        "title": chart.title,
        "threshold": chart.threshold,
        "line": round(100 * min(chart.threshold / chart.high, 1.0), 3),
        "high": chart.high,
        "keep": chart.keep,
        "tallest": tallest,
        "bars": [
            {
                "x": round(100 * number / _NUM_BINS, 3),
                "width": round(100 / _NUM_BINS * 0.86, 3),
                "kept": round(_HEIGHT * kept / tallest, 3),
                "rejected": round(_HEIGHT * rejected / tallest, 3),
                "label": f"{kept} kept, {rejected} rejected",
            }
            for number, (kept, rejected) in enumerate(bins)
            if kept or rejected
        ],
    }
