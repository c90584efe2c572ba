"""The state of a run as one page: numbers, curves, validation pictures; no other file is needed."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from training.metrics import read_metrics
from training.status_text import clock, node_text, size

_TEMPLATE = "status.html.jinja"
_POINTS = 160  # of a curve
_PICTURES = 3  # newest validations that are shown
_WIDTH = 1280  # pixels of a picture at most
# What is drawn, where a run has it: title, numbers, what the lines are called, logarithmic.
_CURVES: tuple[tuple[str, tuple[tuple[str, str], ...], bool], ...] = (
    ("loss", (("loss", ""),), False),
    (
        "loss by noise level",
        tuple((f"loss_sigma_q{i}", f"q{i}") for i in range(4)),
        True,
    ),
    ("loss of the face", (("loss_face", ""),), False),
    ("gradient norm", (("grad_norm", ""),), True),
    ("learning rate", (("lr", ""),), False),
    ("samples a second", (("samples_per_second", ""),), False),
    ("MFU", (("mfu", ""),), False),
    ("memory, GB", (("memory_gb", ""),), False),
)


def render_page(out: Path, status: Mapping[str, Any]) -> str:
    """The page of `read_status`; all text is escaped."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"clock": clock, "size": size, "node": node_text, "short": _short}
    source = resources.files("training").joinpath(_TEMPLATE).read_text("utf-8")
    records = read_metrics(out / "metrics.jsonl")
    shown = [row for row in status["validation"] if row["pictures"]][-_PICTURES:]
    return environment.from_string(source).render(
        status=status,
        curves=[*_curves(records), *_validation_curves(status["validation"])],
        pictures=[
            {"samples_seen": row["samples_seen"], "sources": [_embed(p) for p in row["pictures"]]}
            for row in reversed(shown)
        ],
        metrics=list(status["validation"][-1]["metrics"]) if status["validation"] else [],
    )


def _curves(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for title, lines, logarithmic in _CURVES:
        drawn = [
            (name, [(r["samples_seen"], r[key]) for r in records if _finite(r.get(key))])
            for key, name in lines
        ]
        if chart := draw(title, drawn, logarithmic=logarithmic):
            found.append(chart)
    return found


def _validation_curves(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    names = list(rows[-1]["metrics"]) if len(rows) > 1 else []
    found = []
    for name in names:
        points = [(r["samples_seen"], r["metrics"].get(name)) for r in rows]
        known = [(x, y) for x, y in points if _finite(y)]
        if len(known) > 1 and (chart := draw(f"validation: {name}", [("", known)])):
            found.append(chart)
    return found


def draw(
    title: str,
    lines: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    *,
    logarithmic: bool = False,
) -> dict[str, Any] | None:
    """A chart of lines of (samples seen, value) on a canvas of 100 x 100; None without points.

    Many points are drawn as means of neighbours. The scale leaves out the first twentieth, which
    would flatten all that follows.
    """
    lines = [(name, points) for name, points in lines if points]
    if not lines:
        return None
    thinned = [(name, _thin(points)) for name, points in lines]
    if logarithmic:
        thinned = [
            (name, [(x, math.log10(y)) for x, y in points if y > 0]) for name, points in thinned
        ]
    late = [y for _, points in thinned for _, y in points[len(points) // 20 :]]
    if not late:
        return None
    low, high = min(late), max(late)
    if high - low < 1e-12 * max(abs(high), 1.0):
        low, high = low - 0.5 * abs(low) - 1e-12, high + 0.5 * abs(high) + 1e-12
    start = min(points[0][0] for _, points in thinned if points)
    end = max(points[-1][0] for _, points in thinned if points)
    width = max(end - start, 1e-9)

    def path(points: Sequence[tuple[float, float]]) -> str:
        across = (100 * (x - start) / width for x, _ in points)
        down = (100 * min(1.1, max(-0.1, (high - y) / (high - low))) for _, y in points)
        steps = (f"{x:.2f},{y:.2f}" for x, y in zip(across, down, strict=True))
        text = "M" + " L".join(steps)
        return f"{text} h0.01" if len(points) == 1 else text

    show = (lambda v: _short(10**v)) if logarithmic else _short
    return {
        "title": title,
        "now": _short(lines[0][1][-1][1]) if len(lines) == 1 else "",
        "logarithmic": logarithmic,
        "top": show(high),
        "bottom": show(low),
        "start": f"{start:,.0f}",
        "end": f"{end:,.0f} samples",
        "lines": [{"name": name, "path": path(points)} for name, points in thinned if points],
    }


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `_POINTS` points: the last place and the mean of each run of neighbours."""
    width = -(-len(points) // _POINTS)
    runs = [points[at : at + width] for at in range(0, len(points), width)]
    return [(run[-1][0], sum(y for _, y in run) / len(run)) for run in runs]


def _embed(path: str) -> str:
    """A picture as a data URI, no wider than it is looked at."""
    from PIL import Image

    with Image.open(path) as image:
        image.thumbnail((_WIDTH, 8 * _WIDTH))
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
