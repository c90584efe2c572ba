"""Which frames and which boxes of the latents show whose face: the pieces of work of a refinement.

Shapes: t frames of a piece, h w latent size, F faces of a piece.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from animator.crop_decoder import Piece
from inference.faces.config import FaceOptimizationConfig
from inference.faces.places import FacePlaces
from inference.faces.similarity import FaceReader


@dataclass(frozen=True, kw_only=True)
class FacePiece:
    """A piece of a clip's latents with the faces that are measured in it."""

    piece: Piece
    number: int  # among the pieces that are decoded together
    chunk: int  # number of the run of frames; key frames are chosen by it
    free: np.ndarray | None  # cells that may change, (t, height, width) bool; None: all
    frames: np.ndarray  # of each face, counted from the piece's first, (F,)
    people: np.ndarray  # whose each face is, (F,)
    landmarks: np.ndarray  # in 0..1 of the piece's picture, (F, 5, 2)
    boxes: np.ndarray  # likewise, (F, 4)


def pieces_of(
    places: FacePlaces,
    numbers: Sequence[int],
    reader: FaceReader,
    config: FaceOptimizationConfig,
    cell: int,
) -> list[FacePiece]:
    """The pieces that cover all visible faces of these frames of a clip.

    Args:
        numbers: of the frames in the clip, consecutive.
        cell: pixels a latent cell.
    """
    size = (places.size[0] // cell, places.size[1] // cell)
    visible = places.visible[list(numbers)]
    everybody = list(range(places.num_people))
    length = max(1, len(numbers)) if config.mode == "published" else config.piece_frames
    found: list[FacePiece] = []
    for chunk, begin in enumerate(range(0, len(numbers), length)):
        part = visible[begin : begin + length]
        for people in [[p] for p in everybody] if config.mode == "crop" else [everybody]:
            there = np.flatnonzero(part[:, people].any(1))
            if not len(there):
                continue
            start, stop = begin + int(there[0]), begin + int(there[-1]) + 1
            if config.mode == "published":
                start, stop = begin, begin + len(part)
            piece = Piece(start=start, stop=stop, top=0, left=0, height=size[0], width=size[1])
            free = None
            if config.mode == "crop":
                own, shown = list(numbers[start:stop]), visible[start:stop, people[0]]
                areas = reader.area(
                    places.landmarks[own, people[0]], places.boxes[own, people[0]], places.size
                )
                piece, free = _around(areas / cell, shown, start, size, config)
            faces = [(t, p) for t in range(stop - start) for p in people if visible[start + t, p]]
            found.append(_measured(places, numbers, piece, size, faces, len(found), chunk, free))
    return found


def _measured(
    places: FacePlaces,
    numbers: Sequence[int],
    piece: Piece,
    size: tuple[int, int],
    faces: Sequence[tuple[int, int]],
    number: int,
    chunk: int,
    free: np.ndarray | None,
) -> FacePiece:
    """A piece with its faces, (frame of the piece, person) each, in its own coordinates."""
    frames = np.array([frame for frame, _ in faces])
    people = np.array([person for _, person in faces])
    in_clip = np.asarray(numbers)[piece.start + frames]
    offset = np.array([piece.left, piece.top], np.float32)
    extent = np.array([piece.width, piece.height], np.float32)

    def within(points: np.ndarray) -> np.ndarray:
        return (points * np.array(size[::-1], np.float32) - offset) / extent

    return FacePiece(
        piece=piece,
        number=number,
        chunk=chunk,
        free=free,
        frames=frames,
        people=people,
        landmarks=within(places.landmarks[in_clip, people]),
        boxes=within(places.boxes[in_clip, people].reshape(-1, 2, 2)).reshape(-1, 4),
    )


def _around(
    areas: np.ndarray,
    shown: np.ndarray,
    start: int,
    size: tuple[int, int],
    config: FaceOptimizationConfig,
) -> tuple[Piece, np.ndarray]:
    """The crop around a face's areas `(t, 4)` in cells, and its cells that may change."""
    low = areas[shown][:, :2].min(0)
    high = areas[shown][:, 2:].max(0)
    left, width = _snapped(low[0], high[0], size[1], config)
    top, height = _snapped(low[1], high[1], size[0], config)
    piece = Piece(
        start=start, stop=start + len(areas), top=top, left=left, height=height, width=width
    )
    free = np.zeros((len(areas), height, width), bool)
    for frame in np.flatnonzero(shown):
        x0, y0, x1, y1 = areas[frame]
        rows = _range(y0 - top, y1 - top, config.margin)
        columns = _range(x0 - left, x1 - left, config.margin)
        free[frame, rows, columns] = True
    return piece, free


def _range(low: float, high: float, margin: int) -> slice:
    return slice(max(0, math.floor(low) - margin), max(0, math.ceil(high) + margin))


def _snapped(
    low: float, high: float, extent: int, config: FaceOptimizationConfig
) -> tuple[int, int]:
    """Begin and length of a span with its halo: of a round length, shifted into the frame."""
    begin, end = math.floor(low) - config.halo, math.ceil(high) + config.halo
    begin, end = max(begin, -config.halo), min(end, extent + config.halo)
    length = min(extent, math.ceil(max(end - begin, 1) / config.snap) * config.snap)
    begin -= (length - (end - begin)) // 2
    return min(max(begin, 0), extent - length), length
