"""The parts of the cut-out figure, cut from a public-domain portrait.

The picture is scikit-image's `astronaut`: NASA's portrait of Eileen Collins, in the public domain.
A part is an RGBA sprite (float32, premultiplied, 0..1) with named anchor points in its own pixels.
"""

from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
import skimage.data

PAPER = np.array([0.97, 0.95, 0.90], np.float32)  # the cut edge of the card
BRASS = np.array([0.80, 0.62, 0.25], np.float32)
GLOVE = np.array([0.86, 0.87, 0.90], np.float32)
BOOT = np.array([0.16, 0.16, 0.20], np.float32)
RING = np.array([0.34, 0.32, 0.40], np.float32)

# Outlines and anchors in pixels of the 512×512 portrait.
HEAD_OUTLINE = (
    (229, 15), (250, 18), (268, 27), (284, 38), (292, 50), (297, 62), (301, 82), (299, 97),
    (294, 110), (287, 120), (281, 127), (276, 134), (270, 137), (266, 135), (264, 148), (259, 162),
    (254, 172), (251, 182), (240, 188), (225, 187), (208, 184), (195, 181), (189, 176), (186, 162),
    (183, 150), (181, 131), (176, 130), (171, 122), (163, 117), (156, 108), (153, 95), (151, 85),
    (152, 72), (155, 60), (163, 50), (172, 42), (184, 37), (190, 30), (200, 23), (215, 18),
)  # fmt: skip
TORSO_OUTLINE = (
    (113, 192), (125, 170), (142, 155), (165, 148), (187, 147), (230, 160), (255, 172), (276, 188),
    (298, 215), (306, 236), (324, 243), (340, 256), (346, 275), (340, 300), (326, 345), (316, 400),
    (310, 452), (290, 468), (215, 474), (135, 468), (106, 452), (98, 400), (84, 345), (74, 300),
    (70, 275), (76, 248), (94, 222), (113, 210),
)  # fmt: skip
FACE_POINTS = (0, 14, 15, 16, 17)
HEAD_CENTRE = (226, 104)
HELMET, HELMET_RADII = (388, 429), (108, 83)
HELMET_SCALE = 0.86  # of the portrait's helmet, so that it goes over the head
HEAD_ANCHORS = {0: (223, 124), 14: (201, 101), 15: (246, 103), 16: (171, 110), 17: (279, 114)}
TORSO_ANCHORS = {"right": (112, 272), "left": (306, 272), "pelvis": (209, 455)}


@dataclass(frozen=True, kw_only=True)
class Part:
    """A sprite (h, w, 4) and its anchors (n, 2), both in the sprite's pixels, x first."""

    image: np.ndarray
    anchors: np.ndarray


@cache
def portrait() -> np.ndarray:
    """The portrait (512, 512, 3) RGB in 0..1."""
    return skimage.data.astronaut().astype(np.float32) / 255


def _outline_mask(outline: tuple[tuple[int, int], ...], shape: tuple[int, ...]) -> np.ndarray:
    """Coverage (H, W) in 0..1 of a polygon whose corners are rounded off."""
    scale = 4
    canvas = np.zeros((shape[0] * scale, shape[1] * scale), np.uint8)
    cv2.fillPoly(canvas, [np.array(outline, np.int32) * scale], 255)
    smooth = cv2.GaussianBlur(canvas, (0, 0), 6)
    canvas = np.where(smooth > 127, 255, 0).astype(np.uint8)
    return cv2.resize(canvas, shape[1::-1], interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def _cut(rgb: np.ndarray, mask: np.ndarray, *, border: int) -> np.ndarray:
    """Cut `rgb` along `mask` and leave a rim of paper: premultiplied RGBA."""
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * border + 1, 2 * border + 1))
    outer = cv2.GaussianBlur(cv2.dilate(mask, kernel), (0, 0), 0.7)
    colour = rgb * mask[..., None] + PAPER * np.clip(outer - mask, 0, 1)[..., None]
    return np.dstack([colour, np.maximum(outer, mask)]).astype(np.float32)


def _crop(image: np.ndarray, anchors: np.ndarray) -> Part:
    """Trim the transparent margin."""
    rows, columns = np.nonzero(image[..., 3] > 0)
    top, left = rows.min(), columns.min()
    trimmed = image[top : rows.max() + 1, left : columns.max() + 1]
    trimmed = cv2.copyMakeBorder(trimmed, 2, 2, 2, 2, cv2.BORDER_CONSTANT, value=(0, 0, 0, 0))
    offset = (np.asarray(anchors) - (left - 2, top - 2)).astype(np.float32)
    return Part(image=trimmed, anchors=offset)


@cache
def head() -> Part:
    """The head with its face."""
    mask = _outline_mask(HEAD_OUTLINE, portrait().shape)
    anchors = np.array([HEAD_ANCHORS[index] for index in FACE_POINTS], np.float32)
    return _crop(_cut(portrait(), mask, border=4), anchors)


@cache
def helmet() -> Part:
    """The helmet that lies in the portrait's lap, to be worn over the head; same anchors."""
    y, x = np.mgrid[:512, :512].astype(np.float32)
    inside = np.hypot((x - HELMET[0]) / HELMET_RADII[0], (y - HELMET[1]) / HELMET_RADII[1])
    mask = np.clip((1 - inside) * HELMET_RADII[1] + 0.5, 0, 1)
    anchors = [np.subtract(HEAD_ANCHORS[index], HEAD_CENTRE) for index in FACE_POINTS]
    centred = np.array(HELMET) + np.array(anchors) / HELMET_SCALE
    return _crop(_cut(portrait(), mask, border=5), centred)


@cache
def torso() -> Part:
    """Helmet ring and suit; the helmet in the portrait's lap gives way to the mirrored suit."""
    rgb = portrait().copy()
    y, x = np.mgrid[:512, :512]
    helmet = ((x - 385) ** 2 + (y - 440) ** 2 < 122**2).astype(np.float32)
    helmet = cv2.GaussianBlur(helmet, (0, 0), 3)[..., None]
    mirrored = rgb[:, np.clip(405 - np.arange(512), 0, 511)]
    rgb = mirrored * helmet + rgb * (1 - helmet)
    belt = cv2.GaussianBlur((y > 452).astype(np.float32), (0, 0), 1.0)[..., None]
    rgb = RING * belt + rgb * (1 - belt)
    mask = _outline_mask(TORSO_OUTLINE, rgb.shape)
    anchors = np.array([TORSO_ANCHORS[name] for name in ("right", "left", "pelvis")], np.float32)
    return _crop(_cut(rgb, mask, border=4), anchors)


@cache
def _fabric() -> np.ndarray:
    """Suit cloth (320, 160, 3): the sleeve's colour with its folds, evenly lit."""
    sleeve = portrait()[300:440, 62:128]
    cloth = cv2.resize(sleeve, (160, 320), interpolation=cv2.INTER_CUBIC)
    even = cv2.GaussianBlur(cloth, (0, 0), 40)
    return np.clip(cloth - even + np.median(sleeve, axis=(0, 1)), 0, 1)


@cache
def limb(kind: str) -> Part:
    """A capsule of suit cloth from one joint to the next, pinned; kind as in LIMB_SHAPES."""
    top, bottom, end = LIMB_SHAPES[kind]
    length, margin = 200, 70
    height, width = length + 2 * margin, 180
    y, x = np.mgrid[:height, :width].astype(np.float32)
    along = np.clip((y - margin) / length, 0, 1)
    radius = top + (bottom - top) * along
    centre = width / 2
    beyond = np.where(y < margin, margin - y, np.maximum(y - margin - length, 0))
    distance = np.hypot(x - centre, beyond) - radius
    mask = np.clip(0.5 - distance, 0, 1)
    cloth = cv2.resize(_fabric(), (width, height))
    across = np.clip(np.abs(x - centre) / (radius + 1e-6), 0, 1)
    rgb = cloth * (1.06 - 0.42 * across**2.2)[..., None]
    if end is not None:
        colour, start = end
        cuff = np.clip((y - (margin + length * start)) / 2, 0, 1)[..., None]
        shade = (1.05 - 0.4 * across**2.2)[..., None]
        rgb = rgb * (1 - cuff) + colour * shade * cuff
    for pin in (margin, margin + length) if end is None else ():
        brass = np.clip(8.5 - np.hypot(x - centre, y - pin), 0, 1)[..., None]
        shine = np.clip(4.0 - np.hypot(x - centre + 2, y - pin + 2), 0, 1)[..., None] * 0.25
        rgb = rgb * (1 - brass) + BRASS * brass + shine
    anchors = np.array([[centre, margin], [centre, margin + length]], np.float32)
    return _crop(_cut(np.clip(rgb, 0, 1), mask, border=4), anchors)


# Radii at the upper and lower joint for a length of 200, and the colour of the end from a share on.
LIMB_SHAPES: dict[str, tuple[float, float, tuple[np.ndarray, float] | None]] = {
    "upper_arm": (56, 48, None),
    "forearm": (50, 40, (RING, 0.82)),
    "thigh": (52, 43, None),
    "shin": (45, 37, (BOOT, 0.72)),
}


@cache
def hand() -> Part:
    """A gloved mitten; anchors: wrist and finger tips."""
    image = np.zeros((160, 140, 3), np.uint8)
    cv2.ellipse(image, (70, 84), (34, 50), 0, 0, 360, (255, 255, 255), -1, cv2.LINE_AA)
    cv2.ellipse(image, (104, 70), (13, 30), 28, 0, 360, (255, 255, 255), -1, cv2.LINE_AA)
    return _solid(image, GLOVE, anchors=((70, 40), (70, 132)))


@cache
def foot() -> Part:
    """A boot from the front; anchors: ankle and the middle of the sole."""
    image = np.zeros((140, 140, 3), np.uint8)
    cv2.ellipse(image, (70, 92), (48, 42), 0, 180, 360, (255, 255, 255), -1, cv2.LINE_AA)
    cv2.rectangle(image, (22, 90), (118, 104), (255, 255, 255), -1)
    return _solid(image, BOOT, anchors=((70, 56), (70, 106)))


def _solid(image: np.ndarray, colour: np.ndarray, anchors: tuple) -> Part:
    mask = image[..., 0].astype(np.float32) / 255
    depth = cv2.GaussianBlur(mask, (0, 0), 9)[..., None]
    rgb = np.clip(colour * (0.6 + 0.45 * depth), 0, 1) * np.ones_like(mask)[..., None]
    return _crop(_cut(rgb, mask, border=4), np.array(anchors, np.float32))
