"""Small folders in the layouts that are imported: a square that walks, and its keypoints."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH, NUM_FRAMES = 64, 48, 6
FACE = (10, 6, 26, 22)  # left, top, right, bottom in pixels


def picture(index: int, seed: int = 0, size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    """A grey slope with a coloured square on its way to the right."""
    height, width = size
    slope = np.linspace(40, 200, width)[None, :, None] + np.zeros((height, 1, 3))
    slope[20:36, 2 + 4 * index : 14 + 4 * index] = (200, 60 + 20 * (seed % 8), 40)
    return slope.astype(np.uint8)


def keypoints(num_frames: int = NUM_FRAMES) -> dict[str, np.ndarray]:
    """One person of 18 joints that moves a little, in our own arrays."""
    grid = np.stack(np.meshgrid(np.linspace(0.2, 0.7, 6), np.linspace(0.1, 0.9, 3)), -1)
    still = grid.reshape(1, 1, 18, 2).astype(np.float32)
    moved = still + 0.02 * np.arange(num_frames, dtype=np.float32)[:, None, None, None]
    return {"keypoints": moved, "score": np.full((num_frames, 1, 18), 0.9, np.float32)}


def write_frames(
    folder: Path,
    names: Sequence[str] = tuple(f"frame_{index}.png" for index in range(NUM_FRAMES)),
    seed: int = 0,
) -> Path:
    """Pictures of these names, in this order; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        Image.fromarray(picture(index, seed)).save(folder / name)
    return folder


def write_clip(clip: Path, seed: int = 0, *, with_keypoints: bool = True) -> Path:
    """A clip in StableAnimator's layout, with keypoints beside it; returns its folder."""
    write_frames(clip / "images", seed=seed)
    write_frames(clip / "poses", seed=seed)
    (clip / "faces").mkdir()
    left, top, right, bottom = FACE
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[top:bottom, left:right] = 255
    for index in range(NUM_FRAMES):
        # No face is found in the last frame, which the layout shows as a white picture.
        shown = mask if index < NUM_FRAMES - 1 else np.full_like(mask, 255)
        Image.fromarray(shown).save(clip / "faces" / f"frame_{index}.png")
    if with_keypoints:
        np.savez(clip.with_name(f"{clip.name}.pose.npz"), **keypoints())
    return clip


def write_set(root: Path, num_clips: int = 3) -> Path:
    """`rec/00001` … in StableAnimator's layout; returns the root."""
    for number in range(1, num_clips + 1):
        write_clip(root / "rec" / f"{number:05d}", seed=number)
    return root


def shard_bytes(folder: Path) -> dict[str, bytes]:
    """Every file that an import is to reproduce."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Of two stacks of uint8 pictures, in decibels."""
    error = np.mean((one.astype(np.float64) - other.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def link(path: Path, target: Path | str) -> None:
    """A symbolic link, whose folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.symlink(target, path)
