"""A loss curve as a small SVG: the same records give the same bytes."""

import io
from collections.abc import Sequence

import numpy as np

POINTS = 120  # drawn; a longer run is drawn by its spread over neighbouring steps
_INK, _LINE, _ORANGE, _TEAL = "#26323a", "#e6e0d3", "#e2592b", "#4f8f86"


def loss_curve(
    samples: Sequence[float], values: Sequence[float], title: str, *, transparent: bool = False
) -> str:
    """The steps' losses in pale, their running mean in strong; text that starts with `<svg`.

    Args:
        samples: samples seen at each step.
        values: losses.
        transparent: no background, for a page that has one.
    """
    import matplotlib
    from matplotlib.figure import Figure

    losses = np.nan_to_num(np.asarray(values, np.float64))
    ends, low, high = spread(losses)
    x = np.asarray(samples, np.float64)[ends]
    with matplotlib.rc_context({"svg.hashsalt": "loss", "font.family": "sans-serif"}):
        figure = Figure(figsize=(5, 2.7), layout="constrained", facecolor="white")
        axes = figure.add_subplot(facecolor="none")
        axes.fill_between(x, low, high, color=_TEAL, alpha=0.35, linewidth=0.8)
        axes.plot(x, running_mean(losses)[ends], color=_ORANGE, linewidth=2)
        axes.set_title(title, loc="left", color=_INK, fontsize=11)
        axes.set_xlabel("samples seen", color=_INK, fontsize=9)
        # The first steps would flatten everything that follows.
        late = losses[len(losses) // 20 :]
        if len(late) > 1 and np.ptp(late) > 0:
            axes.set_ylim(0, float(np.percentile(late, 99)) * 1.15)
        axes.tick_params(colors=_INK, labelsize=8)
        axes.grid(color=_LINE, linewidth=0.8)
        axes.spines[:].set_visible(False)
        buffer = io.StringIO()
        nothing = {"Date": None, "Creator": None}  # that differs between days and machines
        figure.savefig(buffer, format="svg", transparent=transparent, metadata=nothing)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def spread(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Last step and 5th and 95th percentile of each of `POINTS` runs of neighbouring steps."""
    parts = np.array_split(values, min(POINTS, len(values)))
    ends = np.cumsum([len(part) for part in parts]) - 1
    low, high = (np.array([np.percentile(part, at) for part in parts]) for at in (5, 95))
    return ends, low, high


def running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last twentieth of the run, at every step."""
    width = max(1, len(values) // 20)
    total = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (total[ends] - total[starts]) / (ends - starts)
