"""Still images under limits: JPEG, PNG and WebP, upright, RGB."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP")


class ImageError(ValueError):
    """An image that cannot be used; the message says what was given, expected and how to mend."""


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What an image may cost; checked on the header, before a pixel is decoded."""

    max_bytes: int = 100 << 20
    max_pixels: int = 100_000_000


def read_image(path: str | Path, limits: ImageLimits | None = None) -> np.ndarray:
    """The picture as (H, W, 3) uint8 RGB, EXIF orientation applied, transparency over white.

    Raises ImageError for a missing, damaged, foreign or oversized file.
    """
    path, limits = Path(path), limits or ImageLimits()
    expected = "expected a JPEG, PNG or WebP picture"
    if not path.is_file():
        raise ImageError(f"{path}: no such file; {expected}")
    if path.stat().st_size > limits.max_bytes:
        raise ImageError(
            f"{path}: {path.stat().st_size} bytes, expected at most {limits.max_bytes}; "
            "save it smaller"
        )
    try:
        with warnings.catch_warnings():
            # Pillow's own warning for large pictures: the limit below decides.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > limits.max_pixels:
                    raise ImageError(
                        f"{path}: {image.width}x{image.height}, expected at most "
                        f"{limits.max_pixels} pixels; save it smaller"
                    )
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen types on damaged files
        reason = str(error).replace(str(path), "it") or type(error).__name__
        raise ImageError(f"{path}: cannot be read ({reason}); {expected}") from None


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode in ("I;16", "I;16B", "I"):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.ascontiguousarray(np.asarray(image.convert("RGB")))
