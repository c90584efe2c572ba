"""The demonstration's report: one HTML file with its pictures, videos and curves inside."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

INK, LINE, ORANGE, TEAL = "#26323a", "#e6e0d3", "#e2592b", "#4f8f86"


def write_report(path: Path, content: Mapping[str, Any]) -> None:
    """Fill the template; text is escaped, pictures come as base64 from the functions below."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    html = environment.get_template("report.html.jinja").render(**content)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(html, encoding="utf-8")
    temporary.replace(path)


def embed_file(path: Path) -> str:
    """A file's bytes in base64."""
    return base64.b64encode(path.read_bytes()).decode()


def embed_image(image: np.ndarray, *, kind: str = "PNG") -> str:
    """(H, W, 3) uint8 as base64 of a PNG or JPEG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **({"quality": 88} if kind == "JPEG" else {}))
    return base64.b64encode(buffer.getvalue()).decode()


def strip(frames: np.ndarray, columns: int = 8, gap: int = 4) -> np.ndarray:
    """`columns` of the frames (T, H, W, 3), evenly spaced, side by side on paper."""
    chosen = frames[np.linspace(0, len(frames) - 1, columns).round().astype(int)]
    paper = np.full((frames.shape[1], gap, 3), (255, 255, 255), np.uint8)
    pieces = [piece for frame in chosen for piece in (frame, paper)]
    return np.concatenate(pieces[:-1], axis=1)


def curve(title: str, samples: Sequence[float], values: Sequence[float]) -> str:
    """A loss curve as SVG: every step in pale, its running mean in strong."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "demo", "font.family": "sans-serif"}):
        figure = Figure(figsize=(5, 2.7), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(samples, values, color=TEAL, alpha=0.35, linewidth=0.8)
        mean = running_mean(values)
        axes.plot(samples, mean, color=ORANGE, linewidth=2)
        axes.set_title(title, loc="left", color=INK, fontsize=11)
        axes.set_xlabel("samples seen", color=INK, fontsize=9)
        # The first steps would flatten everything that follows.
        late = np.asarray(values[len(values) // 20 :])
        if len(late) > 1 and np.ptp(late) > 0:
            axes.set_ylim(0, float(np.percentile(late, 99)) * 1.15)
        axes.tick_params(colors=INK, labelsize=8)
        axes.grid(color=LINE, linewidth=0.8)
        axes.spines[:].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def running_mean(values: Sequence[float]) -> np.ndarray:
    """Mean over the last twentieth of the run, at every step."""
    array = np.nan_to_num(np.asarray(values, np.float64))
    width = max(1, len(array) // 20)
    total = np.cumsum(np.concatenate([[0.0], array]))
    ends = np.arange(1, len(array) + 1)
    starts = np.maximum(ends - width, 0)
    return (total[ends] - total[starts]) / (ends - starts)


def minutes(seconds: float) -> str:
    """`75.2` as `1 min 15 s`."""
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{seconds:.1f} s"
