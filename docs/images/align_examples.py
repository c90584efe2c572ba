"""The pictures of docs/align.md: `animator align` on material that may be shown.

Run from the repository: python docs/images/align_examples.py [FOLDER for the pages]. People are the
demonstration's puppet, and Eileen Collins in NASA's portrait (public domain), which scikit-image
brings along; its keypoints were found by a pose network and checked by eye.
"""

import base64
import io
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image, ImageDraw

from inference.alignment.report import AlignmentReport, report_alignment
from infra.demo.clips import TAKES, Take, film, record
from pipelines.video import encode

HERE = Path(__file__).parent
COLUMNS = ("the clip", "not aligned", "affine", "closed form", "learned")
TILE, GAP, HEAD = 220, 6, 22
SIZE, FPS, FRAMES = (320, 240), 12, 36
PORTRAIT = {
    0: (221, 123), 1: (207, 265), 2: (93, 261), 3: (64, 423), 5: (321, 276), 6: (345, 440),
    14: (202, 100), 15: (245, 104), 16: (174, 114), 17: (273, 119),
}  # fmt: skip


def portrait(folder: Path, name: str, box: tuple[int, int, int, int]) -> Path:
    """NASA's portrait, cut to `box` (left, top, right, bottom), with its keypoints beside it."""
    left, top, right, bottom = box
    image = skimage.data.astronaut()[top:bottom, left:right]
    keypoints, score = np.zeros((1, 1, 18, 2), np.float32), np.zeros((1, 1, 18), np.float32)
    for joint, (x, y) in PORTRAIT.items():
        place = ((x - left) / (right - left), (y - top) / (bottom - top))
        keypoints[0, 0, joint] = place
        score[0, 0, joint] = 0 <= min(place) and max(place) <= 1
    return _write_image(folder / f"{name}.png", image, keypoints, score)


def two_people(folder: Path, name: str, takes: tuple[Take, Take], *, moving: bool) -> Path:
    """Two puppets side by side, as a clip or as a picture."""
    filmed = [film(take, size=SIZE, fps=FPS, num_frames=FRAMES) for take in takes]
    frames = np.concatenate([frames for frames, _, _ in filmed], axis=2)
    points = np.stack(
        [points * (0.5, 1) + (0.5 * i, 0) for i, (_, points, _) in enumerate(filmed)], 1
    )
    points = points.astype(np.float32)
    score = np.full(points.shape[:3], 0.95, np.float32)
    if not moving:
        return _write_image(folder / f"{name}.png", frames[0], points[:1], score[:1])
    path = folder / f"{name}.mp4"
    encode(path, frames, fps=FPS)
    np.savez(path.with_suffix(".pose.npz"), keypoints=points, score=score, fps=FPS)
    return path


def _write_image(path: Path, image: np.ndarray, keypoints: np.ndarray, score: np.ndarray) -> Path:
    Image.fromarray(image).save(path)
    np.savez(path.with_suffix(".pose.npz"), keypoints=keypoints, score=score, fps=1)
    return path


def sheet(page: Path, rows: int) -> Image.Image:
    """The first rows of a page's pictures on one sheet."""
    found = re.findall(r"data:image/webp;base64,([A-Za-z0-9+/=]+)", page.read_text())
    tiles = [Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB") for data in found]
    tiles = tiles[: rows * len(COLUMNS)]
    for tile in tiles:
        tile.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
    widths = [max(t.width for t in tiles[i :: len(COLUMNS)]) for i in range(len(COLUMNS))]
    height = max(tile.height for tile in tiles)
    paper = Image.new(
        "RGB", (sum(widths) + GAP * (len(widths) + 1), HEAD + rows * (height + GAP)), "white"
    )
    draw = ImageDraw.Draw(paper)
    x = GAP
    for i, (title, width) in enumerate(zip(COLUMNS, widths, strict=True)):
        draw.text((x, 5), title, fill=(40, 40, 48))
        for row in range(rows):
            paper.paste(tiles[row * len(COLUMNS) + i], (x, HEAD + row * (height + GAP)))
        x += width + GAP
    return paper


def main(folder: Path) -> None:
    """Write a page and a sheet for each example."""
    material = record(folder / "demo", height=SIZE[0], width=SIZE[1], fps=FPS)
    wave, sway = (next(take for take in TAKES if take.name == name) for name in ("wave", "sway"))
    small, large = replace(wave, height=0.5), replace(sway, height=0.85)
    examples = {
        "good": (material.reference, material.driving, 2),
        "half": (portrait(folder, "portrait", (0, 0, 512, 512)), material.driving, 2),
        "bad": (portrait(folder, "head", (110, 20, 330, 240)), material.driving, 1),
        "two": (
            two_people(
                folder, "pair", (replace(large, seed=21), replace(small, seed=22)), moving=False
            ),
            two_people(folder, "duet", (small, large), moving=True),
            1,
        ),
    }
    for name, (reference, driving, rows) in examples.items():
        page = folder / f"{name}.html"
        result = report_alignment(
            AlignmentReport(reference=reference, driving=driving, report=page, pose="file")
        )
        sheet(page, rows).save(HERE / f"align-{name}.webp", quality=85, method=6)
        print(name, result["verdict"]["text"], result["summary"], *result["warnings"], sep="\n  ")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
