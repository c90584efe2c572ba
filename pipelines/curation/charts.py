"""Histograms of scores for the report, as plain numbers for its drawings."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipelines.curation.config import CurationConfig
from pipelines.curation.filters import RULES, Rule
from pipelines.curation.tally import Tally

_NUM_BINS = 28
_HEIGHT = 56
# The ends of the axis: all but this share of the clips at either side.
_BEYOND = 0.01


def draw_charts(tally: Tally) -> list[dict[str, Any]]:
    """A histogram of every score that a rule looks at and that was measured."""
    charts = []
    for score in dict.fromkeys(rule.score for rule in RULES):
        rules = [rule for rule in RULES if rule.score == score]
        values = tally.values[score].items
        if values:
            charts.append(_draw(rules, values, tally.values[score].seen, tally.config))
    return charts


def _draw(
    rules: Sequence[Rule],
    values: Sequence[tuple[float, bool]],
    seen: int,
    config: CurationConfig,
) -> dict[str, Any]:
    """Bars of a histogram over clips in percent of the drawing: kept below, rejected on top."""
    numbers = np.array([value for value, _ in values])
    kept = np.array([is_kept for _, is_kept in values])
    limits = [(rule, rule.limit(config)) for rule in rules]
    lines = [(rule, limit) for rule, limit in limits if limit is not None]
    low, high = _axis(numbers, [limit for _, limit in lines])
    place = np.clip((numbers - low) / (high - low), 0, 1)
    bins = np.minimum((place * _NUM_BINS).astype(int), _NUM_BINS - 1)
    good = np.bincount(bins[kept], minlength=_NUM_BINS)
    bad = np.bincount(bins[~kept], minlength=_NUM_BINS)
    tallest = int((good + bad).max())
    return {
        "title": rules[0].title,
        "reason": rules[0].reason,
        "low": low,
        "high": high,
        "clips": seen,
        "tallest": tallest,
        "thresholds": [
            {
                "value": limit,
                "setting": rule.setting,
                "keep": "at least" if rule.direction == "min" else "at most",
                "line": round(100 * min(max((limit - low) / (high - low), 0), 1), 3),
            }
            for rule, limit in lines
        ],
        "bars": [
            {
                "x": round(100 * number / _NUM_BINS, 3),
                "width": round(100 / _NUM_BINS * 0.86, 3),
                "kept": round(_HEIGHT * int(good[number]) / tallest, 3),
                "rejected": round(_HEIGHT * int(bad[number]) / tallest, 3),
                "label": f"{good[number]} kept, {bad[number]} rejected",
            }
            for number in range(_NUM_BINS)
            if good[number] or bad[number]
        ],
    }


def _axis(numbers: np.ndarray, limits: Sequence[float]) -> tuple[float, float]:
    """From 0, or below where values are, to a little beyond the values and the thresholds."""
    low = min(0.0, *limits, float(np.quantile(numbers, _BEYOND))) if limits else 0.0
    low = min(low, float(np.quantile(numbers, _BEYOND)), 0.0)
    top = max(float(np.quantile(numbers, 1 - _BEYOND)), *limits, low + 1e-6)
    if 0.5 < top <= 1.0:  # a share: its axis ends where shares do
        return low, 1.0
    return low, _round_up(low + 1.15 * (top - low))


def _round_up(value: float) -> float:
    """To two digits, upwards."""
    step = 10.0 ** (np.floor(np.log10(abs(value))) - 1) if value else 1.0
    return float(np.ceil(value / step) * step)
