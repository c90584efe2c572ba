"""Curves of an alignment over time, as plain numbers for the report's drawings.

T frames of the clip; a drawing is 100 wide and 100 high.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from inference.alignment.methods import OwnTransforms
from inference.alignment.verdict import PersonAlignment

MAX_DOTS = 500  # of a curve; more cannot be told apart
_HEAVY, _LIGHT = 0.5, 0.1  # shares of the weight of the frames that count most
# What is drawn at least, so that noise does not look like motion.
_LEAST = {"scale": math.log(1.15), "degrees": 5.0, "place": 0.03}


def draw_curves(own: OwnTransforms, person: PersonAlignment) -> list[dict[str, Any]]:
    """Scale, rotation and place of every frame beside what all make together."""
    scale, degrees, place = (own.weight[:, i] for i in range(3))
    return [
        {
            "title": "Scale",
            "note": f"{person.scale:.2f}, the frames agree to {100 * person.scale_spread:.0f} %",
            **_draw(
                {"": np.log(own.scale)},
                math.log(person.scale),
                _LEAST["scale"],
                (own.used, scale),
                lambda value: f"{math.exp(value):.2f}",
            ),
        },
        {
            "title": "Rotation",
            "note": f"{person.degrees:+.1f}°, the frames agree to {person.degrees_spread:.1f}°",
            **_draw(
                {"": _near(own.degrees, person.degrees)},
                person.degrees,
                _LEAST["degrees"],
                (own.used, degrees),
                lambda value: f"{value:+.0f}°",
            ),
        },
        {
            "title": "Place",
            "note": f"the frames agree to {100 * person.place_spread:.1f} %",
            **_draw(
                {"across": own.place[:, 0], "down": own.place[:, 1]},
                0.0,
                _LEAST["place"],
                (own.used, place),
                lambda value: f"{100 * value:+.0f} %",
            ),
        },
    ]


def _draw(
    lines: dict[str, np.ndarray],
    clip: float,
    least: float,
    counts: tuple[np.ndarray, np.ndarray],
    label: Callable[[float], str],
) -> dict[str, Any]:
    """Dots by how much they count, the clip's value, and the labels of the drawing's edges.

    `counts` says of every frame whether it is used, and its weight.
    """
    used, weight = counts
    known = np.concatenate([values[used & np.isfinite(values)] for values in lines.values()])
    low, high = np.percentile(known, (1, 99)) if len(known) else (clip, clip)
    low, high = min(low, clip), max(high, clip)
    short = max(2 * least - (high - low), 0.08 * (high - low))
    low, high = low - short / 2, high + short / 2
    step = math.ceil(len(used) / MAX_DOTS)
    return {
        "clip": _height(clip, low, high),
        "top": label(high),
        "bottom": label(low),
        "lines": [
            {"name": name, "dots": _dots(values, low, high, used, weight, step)}
            for name, values in lines.items()
        ],
    }


def _dots(
    values: np.ndarray,
    low: float,
    high: float,
    used: np.ndarray,
    weight: np.ndarray,
    step: int,
) -> dict[str, str]:
    """SVG paths of dots: of frames that count much, less, hardly, and not at all."""
    paths: dict[str, list[str]] = {"heavy": [], "middle": [], "light": [], "out": []}
    last = max(len(values) - 1, 1)
    for index in range(0, len(values), step):
        if not np.isfinite(values[index]):
            continue
        kind = "out"
        if used[index]:
            share = weight[index]
            kind = "heavy" if share >= _HEAVY else "middle" if share >= _LIGHT else "light"
        y = _height(float(np.clip(values[index], low, high)), low, high)
        paths[kind].append(f"M{100 * index / last:.2f} {y:.1f}h0")
    return {kind: "".join(dots) for kind, dots in paths.items() if dots}


def _height(value: float, low: float, high: float) -> float:
    return round(100 * (high - value) / max(high - low, 1e-9), 1)


def _near(degrees: np.ndarray, clip: float) -> np.ndarray:
    """The same angles, within half a turn of the clip's."""
    return clip + (degrees - clip + 180) % 360 - 180
