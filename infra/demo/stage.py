"""A paper stage for the figure: sky, sun, clouds and hills in layers of cut card."""

import cv2
import numpy as np

# Sky above, sky below, far hill, near hill, ground, sun.
PALETTES = (
    ("9ec7db", "e6ede0", "8cb3a8", "61948a", "4d7370", "fae09e"),
    ("b8b3d6", "f5dbd1", "a894b8", "807099", "5e577a", "fce6bd"),
)


def paint_stage(height: int, width: int, *, seed: int = 0) -> np.ndarray:
    """A background (height, width, 3) uint8; the same seed gives the same picture."""
    rng = np.random.default_rng(seed)
    palette = [np.frombuffer(bytes.fromhex(c), np.uint8) / 255 for c in PALETTES[seed % 2]]
    above, below, far, near, ground, sun = palette
    scale = 2
    h, w = height * scale, width * scale
    y, x = np.mgrid[:h, :w].astype(np.float32)
    blend = np.clip(y / (0.75 * h), 0, 1)[..., None]
    image = above * (1 - blend) + below * blend
    image = _card(image, np.hypot(x - w * rng.uniform(0.70, 0.85), y - 0.2 * h) < 0.085 * h, sun)
    for _ in range(max(2, round(3 * w / h))):
        image = _card(image, _cloud(x, y, h, rng), np.array([0.97, 0.97, 0.95]))
    for colour, level, wave in ((far, 0.58, 0.07), (near, 0.70, 0.045), (ground, 0.84, 0.015)):
        line = level + wave * np.sin(x / h * rng.uniform(3.5, 5.5) + rng.uniform(0, 6))
        line += 0.4 * wave * np.sin(x / h * rng.uniform(8, 12) + rng.uniform(0, 6))
        image = _card(image, y > line * h, colour)
    grain = cv2.GaussianBlur(rng.normal(size=(h, w)).astype(np.float32), (0, 0), 1.6)[..., None]
    image = cv2.resize(image + 0.03 * grain, (width, height), interpolation=cv2.INTER_AREA)
    return np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)


def _cloud(x: np.ndarray, y: np.ndarray, height: int, rng: np.random.Generator) -> np.ndarray:
    """Three overlapping discs on a flat base."""
    cx, cy = rng.uniform(0, x.shape[1]), rng.uniform(0.10, 0.38) * height
    size = rng.uniform(0.04, 0.06) * height
    discs = ((-1.3, 0.0, 0.8), (0.0, -0.4, 1.15), (1.3, 0.0, 0.85))
    inside = [np.hypot(x - cx - dx * size, y - cy - dy * size) < r * size for dx, dy, r in discs]
    return np.logical_or.reduce(inside) & (y < cy + 0.45 * size)


def _card(image: np.ndarray, mask: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Lay a piece of card over the picture, with the shadow it throws on what lies behind."""
    cover = mask.astype(np.float32)
    height = len(cover)
    shift = np.array([[1, 0, 0.008 * height], [0, 1, -0.008 * height]], np.float32)
    soft = cv2.GaussianBlur(cover, (0, 0), 0.012 * height)
    shadow = cv2.warpAffine(soft, shift, cover.shape[::-1], borderMode=cv2.BORDER_REPLICATE)
    image = image * (1 - 0.18 * shadow[..., None])
    return image * (1 - cover[..., None]) + colour * cover[..., None]
