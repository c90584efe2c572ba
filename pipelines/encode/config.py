"""What is encoded, at which size, and what an output folder keeps of it."""

import re
from dataclasses import dataclass
from typing import Literal

MODEL_SIZE, NATIVE_SIZE = "model", "native"
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")


class EncodeError(ValueError):
    """An encoding run that cannot start; the message says what to give instead."""


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """The settings of a run, which its folder keeps for good.

    latents, image_tokens, faces: what is computed. Face embeddings are personal data.
    size: of the frames that latents are made of: `HEIGHTxWIDTH`, `model` for the size that the
        model was made for, or `native` for each clip's own shape (`native_size`).
    fit: how a clip of another shape is fitted into the size: `pad` or `crop`, as in training.
    samples_per_second: of the frames that get an image token and face embeddings.
    face: which InsightFace pack: `auto`, `insightface` or `insightface:PACK`.
    dtype: of the encoders' weights: `auto`, `fp32`, `bf16` or `fp16`.
    """

    latents: bool = True
    image_tokens: bool = False
    faces: bool = False
    size: str = MODEL_SIZE
    fit: Literal["pad", "crop"] = "pad"
    samples_per_second: float = 2.0
    face: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if not (self.latents or self.image_tokens or self.faces):
            raise EncodeError(
                "There is nothing to encode: give at least one of --latents, --image-tokens and "
                "--faces."
            )
        if self.size not in (MODEL_SIZE, NATIVE_SIZE):
            parse_size(self.size)
        if self.fit not in ("pad", "crop"):
            raise EncodeError(f"Got fit {self.fit!r}, but expected pad or crop.")
        if not 0 < self.samples_per_second <= 1000:
            raise EncodeError(
                f"Got {self.samples_per_second} samples per second, but expected more than 0 and "
                "at most 1000."
            )


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) from `512x512`.

    Raises:
        EncodeError: for any other text.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise EncodeError(
            f"Got size {text!r}, but expected HEIGHTxWIDTH such as 512x512, {MODEL_SIZE} (the "
            f"model's own size) or {NATIVE_SIZE} (each clip's own shape)."
        )
    return int(match[1]), int(match[2])


def native_size(source: tuple[int, int], multiple: int, max_pixels: int) -> tuple[int, int]:
    """The bucket of a clip's own shape: sides that are multiples, in at most so many pixels.

    The clip is shrunk where it is larger, never enlarged beyond one multiple, and loses less than
    one multiple a side.

    Args:
        source: (height, width) of the clip.
        max_pixels: of the size that the model was made for.
    """
    height, width = source
    scale = min(1.0, (max_pixels / (height * width)) ** 0.5)
    # A side that is a whole number of multiples must not lose one to rounding.
    sides = (int(side * scale / multiple + 1e-9) * multiple for side in (height, width))
    tall, wide = (max(multiple, side) for side in sides)
    return tall, wide
