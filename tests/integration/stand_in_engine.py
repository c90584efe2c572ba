"""An engine without a model, for the tests of batch and serve: quick, and told what to do by seed.

It writes a small real mp4. Environment: STAND_IN_LOG, a file that gets a line at the start
and at the end of every run; STAND_IN_SECONDS, how long each step takes.
"""

import os
import time
from pathlib import Path

import numpy as np

from inference.requests import AnimationRequest
from pipelines.images import read_image
from pipelines.video import encode, probe

REFUSED_SEED = 401  # a user's mistake
BROKEN_SEED = 500  # an engine that raises
DEADLY_SEED = 666  # an engine whose process dies
SILENT_SEED = 777  # an engine that stops answering, once
LOST_SEED = 888  # an engine whose device is lost, once


class AcceleratorError(RuntimeError):
    """As torch's own of this name: no later item can succeed in the process."""


class StandInEngine:
    """Copies the reference's colour into a few frames of video."""

    def __init__(
        self,
        model_dir: Path,
        face: str = "auto",
        pose: str = "auto",
        alignment: str = "auto",
        **options: object,
    ) -> None:
        if not (model_dir / "config.json").is_file():
            raise ValueError(f"{model_dir}: no config.json; give a model folder")
        self.log = os.environ.get("STAND_IN_LOG")
        self.options = options
        self.seconds = float(os.environ.get("STAND_IN_SECONDS", "0.02"))

    def run(self, request: AnimationRequest, progress=None, **shape: object) -> dict:
        self._note("start", request)
        colour = read_image(request.reference).mean((0, 1))
        num_frames = min(probe(request.driving).num_frames, 4)
        num_steps = request.steps or 5
        for step in range(num_steps):
            if progress is not None:
                progress(step / num_steps, "sampling")
            self._misbehave(request)
            time.sleep(self.seconds)
        frame = np.broadcast_to(colour, (32, 32, 3)).astype(np.uint8)
        encode(request.output, [frame] * num_frames, fps=8)
        self._note("end", request)
        return {
            "seed": request.seed,
            "num_frames": num_frames,
            "asked": {**self.options, **shape},
            "warnings": [],
        }

    def _misbehave(self, request: AnimationRequest) -> None:
        if request.seed == REFUSED_SEED:
            raise ValueError(f"{request.reference}: no person found; choose a clearer picture")
        if request.seed == BROKEN_SEED:
            raise RuntimeError(f"out of memory while reading {request.driving}")
        if request.seed == DEADLY_SEED:
            os._exit(1)
        lost = request.output.parent.parent / "was-lost"
        if request.seed == LOST_SEED and not lost.exists():
            lost.touch()
            raise AcceleratorError("CUDA error: an illegal memory access was encountered")
        marker = request.output.parent.parent / "was-silent"
        if request.seed == SILENT_SEED and not marker.exists():
            marker.touch()
            time.sleep(3600)

    def _note(self, event: str, request: AnimationRequest) -> None:
        if self.log:
            with open(self.log, "a") as stream:
                stream.write(f"{event} {os.getpid()} {request.seed} {request.output.name}\n")
