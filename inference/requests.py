"""What one animation is asked to be: the options and the request."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MAX_SEED = 2**32 - 1
MAX_STEPS = 200
MAX_PIXELS = 4096 * 4096
MAX_GUIDANCE = 30.0
MAX_FACES = 100
OPTION_KINDS = {"seed": int, "steps": int, "guidance": float, "reference_face": int}


class RequestError(ValueError):
    """A request that cannot be run; the message says what was given, expected and how to mend."""


@dataclass(frozen=True, kw_only=True)
class AnimationOptions:
    """What a user may choose; None leaves the choice to the model's own default.

    `reference_face` says whom to animate where the picture shows several people: their faces are
    counted from 1, the largest.
    """

    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    reference_face: int = 1

    def __post_init__(self) -> None:
        _check_whole("seed", self.seed, 0, MAX_SEED)
        _check_whole("reference_face", self.reference_face, 1, MAX_FACES)
        if self.steps is not None:
            _check_whole("steps", self.steps, 1, MAX_STEPS)
        if self.guidance is not None and not (
            isinstance(self.guidance, int | float)
            and not isinstance(self.guidance, bool)
            and 0 <= self.guidance <= MAX_GUIDANCE
        ):
            raise RequestError(
                f"guidance is {self.guidance!r}, expected a number from 0 to {MAX_GUIDANCE:g}"
            )
        if self.guidance is not None:  # 3 and 3.0 are the same work
            object.__setattr__(self, "guidance", float(self.guidance))

    @classmethod
    def from_text(cls, fields: Mapping[str, str]) -> "AnimationOptions":
        """Options from form fields; an empty field counts as not given. Raises RequestError."""
        given: dict[str, Any] = {}
        for name, kind in OPTION_KINDS.items():
            text = fields.get(name, "").strip()
            if not text:
                continue
            try:
                given[name] = kind(text)
            except ValueError:
                word = "a whole number" if kind is int else "a number"
                raise RequestError(f"{name} is {text[:40]!r}, expected {word}") from None
        return cls(**given)


def _check_whole(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(f"{name} is {value!r}, expected a whole number from {low} to {high}")


@dataclass(frozen=True, kw_only=True)
class AnimationRequest(AnimationOptions):
    """Animate the person of `reference` by the motion of `driving`, into the mp4 `output`."""

    reference: Path
    driving: Path
    output: Path

    def to_json(self) -> dict[str, Any]:
        """The request as plain JSON values."""
        paths = {name: str(getattr(self, name)) for name in ("reference", "driving", "output")}
        return {**asdict(self), **paths}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "AnimationRequest":
        """The inverse of `to_json`; raises RequestError for options out of range."""
        paths = {name: Path(data[name]) for name in ("reference", "driving", "output")}
        options = {name: data[name] for name in OPTION_KINDS if name in data}
        return cls(**paths, **options)


def parse_size(text: str, name: str = "size") -> tuple[int, int]:
    """(height, width) of a text like 1024x576; raises RequestError for another."""
    found = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text.strip().lower())
    if found is None:
        raise RequestError(f"{name} is {text[:40]!r}, expected height and width as 1024x576")
    height, width = int(found[1]), int(found[2])
    if height * width > MAX_PIXELS:
        raise RequestError(
            f"{name} is {height}x{width}, expected at most {MAX_PIXELS} pixels in all (4096x4096)"
        )
    return height, width
