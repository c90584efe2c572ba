"""The demonstration's report: one HTML file with its pictures, videos and curves inside."""

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


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


def minutes(seconds: float) -> str:
    """`75.2` as `1 min 15 s`."""
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{seconds:.1f} s"
