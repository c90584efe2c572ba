"""Settings of face optimisation."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from animator.crop_decoder import Statistics

Mode = Literal["auto", "off", "crop", "exact", "published"]
Schedule = Literal["constant", "v1"]


@dataclass(frozen=True, kw_only=True)
class FaceOptimizationConfig:
    """How predictions are steered towards the reference's face (Algorithm 1).

    Modes: `crop` decodes the surroundings of each face alone; `exact` decodes whole frames, a few
    at a time; `published` all frames that are refined together in one graph, faces cut out by
    their boxes (v1); `auto` is `crop` for models with a recognition network and `off` for others.
    """

    mode: Mode = "auto"
    steps: int = 10  # the first denoising steps, in which predictions are refined
    iterations: int = 10  # of Adam in each of them
    learning_rate: float = 0.05  # of latents of unit spread
    schedule: Schedule = "constant"  # v1: falls evenly to 0 over all denoising steps
    chunk: int = 4  # frames decoded with gradient at a time, at most
    key_frames: float = 1.0  # share of a portion's frames that an iteration takes, in turns
    min_gain: float = 0.001  # stop where the similarity grows by less in an iteration
    halo: int = 8  # latent cells decoded around a face in mode crop
    margin: int = 8  # latent cells around a face that may change; at most `halo`
    snap: int = 4  # sizes of crops are multiples of it, so that there are few of them
    statistics: Statistics = "frame"  # what crops borrow; see `animator.crop_decoder`
    refresh: int = 1  # steps between passes over whole frames, which crops borrow from
    detect_every: int = 3  # steps between corrections of the faces' places; 0: never
    min_face: float = 24.0  # pixels of a face's longer side from which it is refined
    portion: int = 4  # frames of a pass over whole frames, as many as a chunk: memory

    def __post_init__(self) -> None:
        for name, choices in (
            ("mode", get_args(Mode)),
            ("schedule", get_args(Schedule)),
            ("statistics", get_args(Statistics)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"Got face.{name} {getattr(self, name)!r}, but expected one of "
                    f"{', '.join(choices)}."
                )
        for name, least, most in (
            ("steps", 0, 1000),
            ("iterations", 1, 1000),
            ("chunk", 1, 64),
            ("halo", 0, 64),
            ("margin", 0, 64),
            ("snap", 1, 64),
            ("refresh", 1, 1000),
            ("detect_every", 0, 1000),
            ("portion", 1, 256),
            ("min_face", 8, 4096),
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and least <= value <= most):
                raise ValueError(f"Got face.{name} {value}, but expected {least} to {most}.")
        if not (math.isfinite(self.learning_rate) and 0 < self.learning_rate <= 10):
            raise ValueError(
                f"Got face.learning_rate {self.learning_rate}, but expected more than 0 and at "
                "most 10; latents have unit spread."
            )
        if not 0 < self.key_frames <= 1:
            raise ValueError(
                f"Got face.key_frames {self.key_frames}, but expected a share of the frames, more "
                "than 0 and at most 1."
            )
        if not 0 <= self.min_gain < 1:
            raise ValueError(f"Got face.min_gain {self.min_gain}, but expected 0 to 1.")
        if self.margin > self.halo:
            raise ValueError(
                f"Got face.margin {self.margin} and face.halo {self.halo}, but expected a margin "
                "of at most the halo: cells that are not decoded cannot change."
            )

    @classmethod
    def v1(cls, mode: Mode = "published") -> "FaceOptimizationConfig":
        """What v1's code does: 3 iterations in the first 21 steps, at 0.1 (1 - i/N)."""
        return cls(
            mode=mode,
            steps=21,
            iterations=3,
            learning_rate=0.1,
            schedule="v1",
            min_gain=0.0,
            detect_every=0,
        )

    @property
    def piece_frames(self) -> int:
        """Frames decoded with gradient at a time: few enough for a share of a portion."""
        return max(1, min(self.chunk, int(self.portion * self.key_frames)))

    def rate(self, step: int, num_steps: int) -> float:
        """Learning rate of a denoising step."""
        share = 1 - step / max(num_steps, 1) if self.schedule == "v1" else 1.0
        return self.learning_rate * share
