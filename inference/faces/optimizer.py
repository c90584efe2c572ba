"""HJB face optimisation: predictions steered towards the reference's face (Algorithm 1).

In each of the first denoising steps the prediction is decoded, its faces are compared with the
reference's, and Adam moves a copy of the latents to make them more alike. The loss is a mean over
faces and Adam works on each number alone, so frames are worked through in chunks whose graphs are
freed at once, and only the surroundings of each face are decoded.

Shapes: T frames, t frames at hand, P people, C latent channels, h w latent size, E embedding.
"""

import io
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from animator.crop_decoder import Piece, open_crop_decoder
from animator.latents import LatentCodec
from inference.conditioning import to_frames
from inference.faces.config import FaceOptimizationConfig
from inference.faces.curve import FaceCurve
from inference.faces.pieces import FacePiece, pieces_of
from inference.faces.places import FacePlaces
from inference.faces.similarity import FaceReader, similarities
from pipelines.faces import FaceBackend
from pipelines.overrides import to_dict
from pipelines.shards import write_atomic

# Float16 loses gradients below 6e-8; Adam does not care what all of them are multiplied by.
LOSS_SCALE = 2.0**12


def _state_file(step: int) -> str:
    return f"faces-{step}.npz"


class FaceOptimizer:
    """Refines predictions of one clip; a `Refiner` of the sampler.

    Args:
        codec: whose latents are refined.
        reader: knows faces.
        targets: embeddings `(P, E)` of the reference's faces, for each driving person; rows of
            people whose face is never visible are not read.
        places: where the faces are; corrected as the clip takes shape.
        config: with another mode than `auto` and `off`.
        num_steps: denoising steps of the sampler.
        detector: finds faces in what has been decoded, to correct their places; None does not.
        on_iteration: called with the step after each iteration; may raise to stop.
    """

    def __init__(
        self,
        codec: LatentCodec,
        reader: FaceReader,
        targets: Tensor,
        places: FacePlaces,
        config: FaceOptimizationConfig,
        *,
        num_steps: int,
        detector: FaceBackend | None = None,
        on_iteration: Callable[[int], object] | None = None,
    ):
        if config.mode in ("auto", "off"):
            raise ValueError(
                f"Got face.mode {config.mode!r}, but expected crop, exact or published here: the "
                "caller decides whether faces are optimised."
            )
        self.codec = codec
        self.reader = reader
        self.targets = targets
        self.places = places
        self.config = config
        self.num_steps = num_steps
        self.detector = detector
        self.on_iteration = on_iteration or (lambda step: None)
        self.curve = FaceCurve()
        self.passes = self.corrected = self.skipped = 0
        whole = config.mode != "crop"
        self._decoder = open_crop_decoder(codec, "crop" if whole else config.statistics)
        self._noted: tuple[int, list[int], list[Piece]] | None = None
        self._folder: Path | None = None

    def refine(self, latents: Tensor, frames: Tensor, step: int) -> Tensor:
        """Predicted clean latents whose faces are more like the reference's.

        Args:
            latents: `(t, C, h, w)` of consecutive frames, on the codec's scale.
            frames: their numbers in the clip, `(t,)`.
            step: of the sampler, from 0.

        Returns:
            the same shape and type; equal bit for bit where nothing may change.
        """
        if step >= self.config.steps:
            return latents
        begun = time.perf_counter()
        portion = len(latents) if self.config.mode == "published" else self.config.portion
        parts = [
            self._refine(part, numbers.tolist(), step)
            for part, numbers in zip(latents.split(portion), frames.split(portion), strict=True)
        ]
        if (step + 1) % self.config.refresh == 0 or step + 1 >= self._num_steps:
            # The memory is the network's until the next pass.
            self._decoder.forget()
            self._noted = None
        self.curve.took(step, time.perf_counter() - begun)
        if self._folder is not None:
            write_atomic(self._folder / _state_file(step + 1), self._state())
        return torch.cat(parts)

    __call__ = refine

    def keep_in(self, folder: Path | None, step: int) -> None:
        """Keep places and record in a work folder, and go on from there before a step.

        With `refresh` above 1 the steps after that begin with a pass of their own.
        """
        self._folder = folder
        if folder is None or step == 0:
            return
        file = folder / _state_file(min(step, self.config.steps))
        if not file.is_file():
            return
        with np.load(file) as found:
            self.places.landmarks[...] = found["landmarks"]
            self.places.boxes[...] = found["boxes"]
            counts, curve = json.loads(str(found["counts"])), json.loads(str(found["curve"]))
        self.passes, self.corrected, self.skipped = counts
        self.curve = FaceCurve.of_state(curve)

    def _state(self) -> bytes:
        stored = io.BytesIO()
        np.savez(
            stored,
            landmarks=self.places.landmarks,
            boxes=self.places.boxes,
            counts=json.dumps([self.passes, self.corrected, self.skipped]),
            curve=json.dumps(self.curve.state()),
        )
        return stored.getvalue()

    def record(self) -> dict[str, Any]:
        """What was done, for the record of an output."""
        return {
            "settings": to_dict(self.config),
            "frames_with_face": int(self.places.visible.any(1).sum()),
            "frames": len(self.places.visible),
            "faces": self.places.visible.sum(0).tolist(),
            "whole_frame_passes": self.passes,
            "corrected_places": self.corrected,
            "skipped_gradients": self.skipped,
            **self.curve.record(),
        }

    @property
    def _num_steps(self) -> int:
        """Steps in which faces are refined."""
        return min(self.config.steps, self.num_steps)

    def _refine(self, latents: Tensor, numbers: Sequence[int], step: int) -> Tensor:
        pieces = self._prepared(latents, numbers, step)
        if not pieces:
            return latents
        with torch.enable_grad():
            # A parameter a frame: Adam leaves alone what an iteration gave no gradient.
            copies = [frame.float().clone().requires_grad_() for frame in latents.detach()]
            adam = torch.optim.Adam(copies, lr=self.config.rate(step, self.num_steps))
            chunks = sorted({piece.chunk for piece in pieces})
            share = max(1, round(self.config.key_frames * len(chunks)))
            latest: dict[int, tuple[float, int]] = {}  # loss and faces of each chunk
            first: dict[int, tuple[float, int]] = {}  # the same before its first update
            before: float | None = None
            for iteration in range(self.config.iterations):
                turn = [chunks[(iteration * share + i) % len(chunks)] for i in range(share)]
                adam.zero_grad(set_to_none=True)
                for chunk in turn:
                    latest[chunk] = self._chunk([p for p in pieces if p.chunk == chunk], copies)
                    first.setdefault(chunk, latest[chunk])
                self._drop_broken(copies)
                adam.step()
                self.curve.add(step, iteration, [latest[chunk] for chunk in turn])
                self.on_iteration(step)
                if len(latest) == len(chunks) and (iteration + 1) * share % len(chunks) < share:
                    total = sum(loss for loss, _ in latest.values())
                    now = total / max(1, sum(count for _, count in latest.values()))
                    if before is not None and before - now < self.config.min_gain:
                        break
                    before = now
        self.curve.begin(step, list(first.values()))
        refined = torch.stack([copy.detach() for copy in copies])
        if step == self._num_steps - 1:
            with torch.no_grad():
                losses = torch.cat([self._losses(piece, refined) for piece in pieces])
            losses = losses[losses.isfinite()]
            self.curve.end(float(losses.sum()), len(losses))
        return refined.to(latents.dtype)

    def _prepared(self, latents: Tensor, numbers: Sequence[int], step: int) -> list[FacePiece]:
        """The pieces of these frames, with whatever decoding them takes noted."""
        pieces = pieces_of(
            self.places, numbers, self.reader, self.config, self.codec.spatial_factor
        )
        if not pieces:
            return []
        every = self.config.detect_every
        due = self.detector is not None and every > 0 and step > 0 and step % every == 0
        boxes = [face.piece for face in pieces]
        frames: Tensor | None = None
        if due or not self._still_noted(numbers, boxes, step):
            with torch.no_grad():
                frames = self._decoder.look(latents, boxes)
            self.passes += frames is not None
            self._noted = (step, list(numbers), boxes)
        if due and self.detector is not None:
            if frames is None:
                with torch.no_grad():
                    frames = self.codec.decode(latents)
            # For the next step: the pieces at hand are of the places as they were.
            self.corrected += self.places.correct(to_frames(frames), numbers, self.detector)
        return pieces

    def _still_noted(self, numbers: Sequence[int], boxes: Sequence[Piece], step: int) -> bool:
        """Whether the last pass over whole frames was of these pieces, and not long ago."""
        if self._noted is None:
            return False
        since, frames, noted = self._noted
        same = frames == list(numbers) and noted == boxes
        # Counted from the first step, so that a run that goes on from there looks at the same ones.
        return same and since // self.config.refresh == step // self.config.refresh

    def _chunk(self, pieces: Sequence[FacePiece], copies: Sequence[Tensor]) -> tuple[float, int]:
        """Add the gradients of a chunk's pieces to the frames'; the sum of losses, and faces."""
        total, count = 0.0, 0
        for face in pieces:
            losses = self._losses(face, copies)
            (losses.sum() * LOSS_SCALE).backward()
            known = losses.detach()[losses.isfinite()]  # half precision may have overflowed
            total, count = total + float(known.sum()), count + len(known)
        return total, count

    def _losses(self, face: FacePiece, latents: Sequence[Tensor] | Tensor) -> Tensor:
        """|1 - cos(Arc(f), Arc(y))| of each face of a piece, `(F,)`."""
        piece = face.piece
        crop = torch.stack([piece.of(latents[i]) for i in range(piece.start, piece.stop)])
        place = crop.device
        if face.free is not None:
            free = torch.from_numpy(face.free)[:, None].to(place)
            crop = torch.where(free, crop, crop.detach())
        pictures = self._decoder.decode(crop, face.number)
        embeddings = self.reader.embed(
            pictures[torch.from_numpy(face.frames).to(place)],
            torch.from_numpy(face.landmarks).to(place),
            torch.from_numpy(face.boxes).to(place),
        )
        targets = self.targets.to(embeddings)[torch.from_numpy(face.people).to(place)]
        return (1 - similarities(embeddings, targets)).abs()

    def _drop_broken(self, copies: Sequence[Tensor]) -> None:
        """Leave frames whose gradient is no finite number as they are."""
        for copy in copies:
            if copy.grad is not None and not bool(copy.grad.isfinite().all()):
                copy.grad = None
                self.skipped += 1
