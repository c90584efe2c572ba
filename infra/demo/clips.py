"""The demonstration's videos: good ones, one for each reason to be turned away, and a driving one.

Every `NAME.mp4` has its keypoints beside it in `NAME.pose.npz`: keypoints (T, P, 18, 2) in 0..1,
score (T, P, 18), boxes (T, P, 4), fps. Here P = 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from infra.demo.figure import draw_figure
from infra.demo.motion import perform
from infra.demo.puppet_parts import FACE_POINTS
from infra.demo.stage import paint_stage
from pipelines.video import encode

SCORE = 0.95  # of a joint that is in the picture
CLOSE_AIM, CLOSE_SCALE = np.array([0.56, 0.44], np.float32), 1.7


@dataclass(frozen=True, kw_only=True)
class Take:
    """One video to record. `rejected_for` is the filter that must turn it away, if any."""

    name: str
    motion: str
    seed: int
    stage: int = 0
    pan: float = 0.0  # widths of the frame a second
    helmet: bool = False
    height: float = 0.78  # of the standing figure, in frames
    floor: float = 0.94
    shot_seconds: float | None = None  # cut to a close shot on another stage, this often
    rejected_for: str | None = None


TAKES = (
    Take(name="wave", motion="wave", seed=1),
    Take(name="raise", motion="raise", seed=2, stage=1),
    Take(name="sway", motion="sway", seed=3),
    Take(name="march", motion="march", seed=4, stage=1),
    Take(name="squat", motion="squat", seed=5),
    Take(name="pan", motion="sway", seed=6, pan=0.5, rejected_for="camera"),
    Take(name="montage", motion="wave", seed=7, shot_seconds=0.75, rejected_for="length"),
    Take(name="helmet", motion="march", seed=8, helmet=True, rejected_for="face"),
    # The head alone: 13 of 18 joints lie below the picture.
    Take(name="closeup", motion="sway", seed=9, height=2.3, floor=2.74, rejected_for="pose"),
)
DRIVING = Take(name="driving", motion="dance", seed=10)


@dataclass(frozen=True, kw_only=True)
class Misalignment:
    """How the driving figure stands apart from the reference: degrees, factor, frames."""

    degrees: float = 12.0
    scale: float = 0.76
    shift: tuple[float, float] = (0.07, -0.04)


@dataclass(frozen=True, kw_only=True)
class Material:
    """Where the recorded files lie."""

    clips: Path
    reference: Path
    driving: Path
    truth: Path


def record(
    folder: Path,
    *,
    height: int = 320,
    width: int = 240,
    fps: int = 12,
    num_frames: int = 60,
    misalignment: Misalignment | None = None,
) -> Material:
    """Record everything under `folder`; what lies there already is kept."""
    material = Material(
        clips=folder / "clips",
        reference=folder / "reference.png",
        driving=folder / "driving.mp4",
        truth=folder / "truth.mp4",
    )
    material.clips.mkdir(parents=True, exist_ok=True)
    size = (height, width)
    for take in TAKES:
        path = material.clips / f"{take.name}.mp4"
        if not path.exists():
            _write(path, *film(take, size=size, fps=fps, num_frames=num_frames), fps=fps)
    if not material.truth.exists():
        frames, points, boxes = film(DRIVING, size=size, fps=fps, num_frames=num_frames)
        _write(material.truth, frames, points, boxes, fps=fps)
    if not material.driving.exists():
        points = misalign(_points(DRIVING, size, fps, num_frames), size, misalignment)
        blank = np.full((height, width, 3), 226, np.uint8)
        drawn = [draw_figure(pose, blank, plain=True) for pose in points]
        frames = np.stack([d.image for d in drawn])
        _write(material.driving, frames, points, np.stack([d.box for d in drawn]), fps=fps)
    if not material.reference.exists():
        _write_reference(material.reference, size)
    return material


def film(
    take: Take, *, size: tuple[int, int], fps: int, num_frames: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frames (T, H, W, 3) uint8, keypoints (T, 18, 2) and boxes (T, 4) of a take."""
    points = _points(take, size, fps, num_frames)
    if take.shot_seconds:
        close = (np.arange(num_frames) / fps / take.shot_seconds).astype(int) % 2 == 1
        points[close] = (points[close] - CLOSE_AIM) * CLOSE_SCALE + 0.5
    stages = _backgrounds(take, size, fps, num_frames)
    drawn = [
        draw_figure(pose, stage, helmet=take.helmet)
        for pose, stage in zip(points, stages, strict=True)
    ]
    if take.helmet:
        points[:, list(FACE_POINTS)] = -1  # outside the picture: not to be seen
    return np.stack([d.image for d in drawn]), points, np.stack([d.box for d in drawn])


def misalign(
    points: np.ndarray, size: tuple[int, int], misalignment: Misalignment | None = None
) -> np.ndarray:
    """Turn, scale and shift keypoints (..., 2) about the frame's centre, without stretching."""
    how = misalignment or Misalignment()
    height, width = size
    pixels = (points - 0.5) * (width, height)
    angle = np.deg2rad(how.degrees)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    moved = how.scale * pixels @ turn / (width, height) + 0.5 + how.shift
    return moved.astype(np.float32)


def _points(take: Take, size: tuple[int, int], fps: int, num_frames: int) -> np.ndarray:
    return perform(
        take.motion,
        num_frames,
        fps=fps,
        aspect=size[1] / size[0],
        seed=take.seed,
        height=take.height,
        floor=take.floor,
    )


def _backgrounds(
    take: Take, size: tuple[int, int], fps: int, num_frames: int
) -> Iterator[np.ndarray]:
    height, width = size
    travel = take.pan * width / fps
    wide = paint_stage(height, width + int(np.ceil(travel * num_frames)), seed=take.stage)
    other = paint_stage(height, width, seed=take.stage + 1)[:, ::-1]
    for index in range(num_frames):
        shot = int(index / fps / take.shot_seconds) if take.shot_seconds else 0
        left = round(travel * index)
        yield other if shot % 2 else wide[:, left : left + width]


def _write_reference(path: Path, size: tuple[int, int]) -> None:
    from PIL import Image

    take = Take(name="reference", motion="sway", seed=11)
    frames, points, boxes = film(take, size=size, fps=12, num_frames=1)
    _write_pose(path, points, boxes, fps=12)
    Image.fromarray(frames[0]).save(path)


def _write(
    path: Path, frames: np.ndarray, points: np.ndarray, boxes: np.ndarray, *, fps: int
) -> None:
    """The keypoints first: a video that exists is complete."""
    _write_pose(path, points, boxes, fps=fps)
    encode(path, frames, fps=fps)


def _write_pose(path: Path, points: np.ndarray, boxes: np.ndarray, *, fps: int) -> None:
    inside = np.all((points >= 0) & (points <= 1), axis=-1)
    np.savez(
        path.with_suffix(".pose.npz"),
        keypoints=np.where(inside[..., None], points, 0).astype(np.float32)[:, None],
        score=np.where(inside, SCORE, 0).astype(np.float32)[:, None],
        boxes=boxes.astype(np.float32)[:, None],
        fps=np.float64(fps),
    )
