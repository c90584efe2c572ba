"""One clip on its way: a single pass over its frames, which are never all in memory.

T frames, S sampled frames, P people, H W pixels.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pipelines import schema
from pipelines.encode.encoders import Encoders, chunk_length
from pipelines.encode.members import (
    EMBEDDING,
    IMAGE,
    LATENTS,
    LatentWriter,
    describe_framing,
)
from pipelines.encode.model import EncoderChoice
from pipelines.faces import Face
from pipelines.schema import ClipRecord, FaceTrack
from pipelines.video import VideoError, VideoLimits, iter_frames

_TOKENS_AT_ONCE = 16
_FRAMES_PER_SIGN = 16


@dataclass
class Clock:
    """Seconds spent on each kind of work; what no name takes is the rest."""

    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, since: float) -> None:
        """Count the time from `since` (time.perf_counter) to now."""
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - since


class ClipWork:
    """The encoding of one clip.

    Args:
        clip: its record in the source shard.
        video: the clip's file.
        faces: its stored faces; only read where faces are embedded.
        staging: a folder for the file of latents.
        alive: called every few frames.
    """

    def __init__(
        self,
        clip: ClipRecord,
        video: Path,
        faces: FaceTrack | None,
        choice: EncoderChoice,
        encoders: Encoders,
        staging: Path,
        alive: Callable[[], None],
    ) -> None:
        self.clip = clip
        self.video = video
        self.faces = faces
        self.choice = choice
        self.encoders = encoders
        self.staging = staging
        self.alive = alive
        self.clock = Clock()
        self.framing = choice.framing((clip.height, clip.width))
        self._stride = max(1, round(clip.fps / choice.config.samples_per_second))
        self._tokens: list[np.ndarray] = []
        self._waiting: list[Tensor] = []
        self._embedded: list[np.ndarray] = []
        self._scores: list[np.ndarray] = []

    def run(self) -> tuple[dict[str, bytes | Path], dict[str, Any]]:
        """The clip's members but its JSON, and what that is to say of them.

        Raises:
            VideoError: the clip does not decode to the frames of its record.
            ValueError: whatever the encoders refuse.
        """
        latents = self.staging / f"{self.clip.key}.{LATENTS}"
        with ExitStack() as stack:
            writer = None
            if self.choice.config.latents:
                writer = stack.enter_context(LatentWriter(latents, self._latent_shape()))
            self._pass(writer)
        members: dict[str, bytes | Path] = {}
        about: dict[str, Any] = {"framing": describe_framing(self.framing, self.choice.fit_mode)}
        if self.choice.config.latents:
            members[LATENTS] = latents
            about["latents"] = {
                "shape": self._latent_shape(),
                "scale": self.encoders.latent_scale,
                "model": self.choice.models["codec"],
            }
        if self.choice.config.image_tokens:
            self._flush_tokens()
            tokens = np.concatenate(self._tokens)
            members[IMAGE] = self._pack({"tokens": tokens})
            about["image_tokens"] = {
                "shape": tokens.shape,
                "of": "the clip's own frames" if self.encoders.tokens_take_native else "latents'",
                "model": self.choice.models["image_token"],
            }
        if self.choice.config.faces:
            embeddings, score = np.stack(self._embedded), np.stack(self._scores)
            person = mean_directions(embeddings, score)
            members[EMBEDDING] = self._pack(
                {"embeddings": embeddings, "score": score, "person": person}
            )
            about["face_embeddings"] = {
                "shape": embeddings.shape,
                "people": int(person.any(axis=-1).sum()),
                "model": self.choice.models["face_embedding"],
            }
        return members, about

    def _pass(self, writer: LatentWriter | None) -> None:
        length, chunk = chunk_length(self.framing.target), []
        for number, frame in self._frames(1 if writer is not None else self._stride):
            sampled = number % self._stride == 0
            framed = None
            if writer is not None or (sampled and self._tokens_of_framed()):
                began = time.perf_counter()
                framed = self.framing.image(frame)
                self.clock.add("framing", began)
            if sampled:
                self._sample(number, frame, framed)
            if writer is not None:
                chunk.append(framed)
                if len(chunk) == length:
                    self._write(writer, chunk)
                    chunk = []
            if number % _FRAMES_PER_SIGN == 0:
                self.alive()
        if writer is not None and chunk:
            self._write(writer, chunk)

    def _frames(self, stride: int) -> Iterator[tuple[int, np.ndarray]]:
        """Every `stride`-th frame with its number."""
        clip = self.clip
        limits = VideoLimits(max_frames=clip.num_frames + 1)
        # Half a frame late: the middle of a frame's time on screen is safe from rounding.
        frames = iter_frames(self.video, start=0.5 / clip.fps, fps=clip.fps / stride, limits=limits)
        for number in range(0, clip.num_frames, stride):
            began = time.perf_counter()
            frame = next(frames, None)
            self.clock.add("decode", began)
            if frame is None:
                raise VideoError(f"ends before frame {number} of {clip.num_frames}")
            if frame.shape[:2] != (clip.height, clip.width):
                raise VideoError(
                    f"its frames have {frame.shape[1]}x{frame.shape[0]} pixels, its record says "
                    f"{clip.width}x{clip.height}"
                )
            yield number, frame

    def _write(self, writer: LatentWriter, chunk: list[np.ndarray]) -> None:
        began = time.perf_counter()
        latents = self.encoders.latents(chunk)
        self.clock.add("latents", began)
        writer.write(latents)

    def _sample(self, number: int, frame: np.ndarray, framed: np.ndarray | None) -> None:
        if self.choice.config.image_tokens:
            began = time.perf_counter()
            picture = framed if framed is not None and self._tokens_of_framed() else frame
            self._waiting.append(self.encoders.for_token(picture))
            self.clock.add("image_tokens", began)
            if len(self._waiting) == _TOKENS_AT_ONCE:
                self._flush_tokens()
        if self.choice.config.faces:
            began = time.perf_counter()
            self._embed(number, frame)
            self.clock.add("faces", began)

    def _flush_tokens(self) -> None:
        if self._waiting:
            began = time.perf_counter()
            self._tokens.append(self.encoders.image_tokens(self._waiting))
            self.clock.add("image_tokens", began)
            self._waiting = []

    def _embed(self, number: int, frame: np.ndarray) -> None:
        assert self.faces is not None
        people = self.faces.boxes.shape[1]
        embeddings = np.zeros((people, self.encoders.embedding_dim), np.float32)
        score = np.zeros(people, np.float32)
        for person in range(people):
            face = Face(
                box=self.faces.boxes[number, person],
                score=float(self.faces.score[number, person]),
                landmarks=self.faces.landmarks[number, person],
            )
            if face.score <= 0 or face.area <= 0:
                continue
            embedding = self.encoders.embed(frame, face)
            if embedding is not None:
                embeddings[person], score[person] = embedding, face.score
        self._embedded.append(embeddings)
        self._scores.append(score)

    def _pack(self, arrays: dict[str, np.ndarray]) -> bytes:
        numbers = np.arange(0, self.clip.num_frames, self._stride, dtype=np.int32)
        return schema.pack_arrays(arrays | {"frames": numbers})

    def _tokens_of_framed(self) -> bool:
        return self.choice.config.image_tokens and not self.encoders.tokens_take_native

    def _latent_shape(self) -> tuple[int, int, int, int]:
        sizes, (height, width) = self.choice.sizes, self.framing.target
        cell = sizes.spatial_factor
        return self.clip.num_frames, sizes.latent_channels, height // cell, width // cell


def mean_directions(embeddings: np.ndarray, score: np.ndarray) -> np.ndarray:
    """The mean direction of each person's embeddings, `(P, D)` of length 1, or zeros.

    Args:
        embeddings: `(S, P, D)`.
        score: `(S, P)`; 0 leaves a frame out.
    """
    lengths = np.linalg.norm(embeddings, axis=-1, keepdims=True)
    seen = (score > 0)[..., None] & (lengths > 0)
    total = np.where(seen, embeddings / np.where(seen, lengths, 1), 0).sum(axis=0)
    length = np.linalg.norm(total, axis=-1, keepdims=True)
    return (total / np.where(length > 0, length, 1)).astype(np.float32)
