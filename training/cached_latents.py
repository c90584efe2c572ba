"""What `animator encode` made of the clips, in place of their pixels.

Shapes: T frames of an example, C latent channels, h w latent size, D width of a token, E of a face
embedding.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from animator.config import AnimatorConfig
from pipelines import schema
from pipelines.clips import ClipStore
from pipelines.encode.config import NATIVE_SIZE, native_size, parse_size
from pipelines.encode.plan import SETTINGS_FILE
from pipelines.encode.store import LatentStore
from pipelines.framing import Framing
from pipelines.schema import ShardError


class ClipLatents(NamedTuple):
    """The latents of an example."""

    frames: Tensor  # (T, C, h, w) float16 as stored, on the scale of the codec's `encode`
    reference: Tensor  # (C, h, w) float32, on that of its `encode_reference`


class CachedLatents:
    """A folder of encoded clips, seen by the numbers of the clips that it was made from.

    Image tokens and face embeddings are there for some frames a second; the nearest stands for
    each. Safe to share by threads.

    Args:
        root: the folder that `animator encode` wrote.
        clips: what it was made from.
        model: whose encoders it has to be of.
        mode: of the framing.

    Attributes:
        native: whether each clip was encoded in its own shape.
        mode: of the framing; a clip in its own shape fills it and loses a little.
        has_tokens, has_faces: whether image tokens, and the face embeddings that the model takes,
            are there too.

    Raises:
        ShardError: it was not made from these clips.
        ValueError: it was made with other encoders, or with another framing.
    """

    def __init__(self, root: str, clips: ClipStore, model: AnimatorConfig, mode: str) -> None:
        self.store = LatentStore(root)
        self.store.check_made_from(clips)
        self.clips = clips
        self.model = model
        self._numbers = [self.store.index(key) for key in clips.keys]
        self._scales: dict[int, float] = {}
        self._check_encoders()
        self.native = False
        self._sizes = self._read_sizes(mode)
        self.mode = "crop" if self.native else mode
        models = self.store.models
        self.has_tokens = "image_token" in models
        self.has_faces = "face_embedding" in models and model.face_embedding == "insightface"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the data."""
        return self.store.fingerprint

    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of the frames that each clip's latents are of."""
        return self._sizes

    def latents(
        self, index: int, which: np.ndarray, reference: int, framing: Framing
    ) -> ClipLatents:
        """Latents of chosen frames and of the reference frame of a clip.

        Args:
            framing: how the clip's frames have to be fitted.

        Raises:
            ShardError: they are damaged, or of frames fitted otherwise.
        """
        number = self._numbers[index]
        if index not in self._scales:
            stored = self.store.framing(number)
            if stored != framing:
                raise ShardError(
                    f"{self.store.root}: clip {self.clips.keys[index]} was fitted into "
                    f"{stored.target[0]}x{stored.target[1]} otherwise than "
                    f"{framing.target[0]}x{framing.target[1]} is now: encode it again."
                )
            self._scales[index] = self.store.scale(number)
        both = torch.from_numpy(self.store.latents(number, [*which.tolist(), reference]))
        return ClipLatents(both[:-1], both[-1].float() / self._scales[index])

    def token(self, index: int, frame: int) -> Tensor:
        """The image token `(1, D)` of the frame nearest to this one."""
        found = self.store.image_tokens(self._numbers[index])
        nearest = int(np.abs(found.frames - frame).argmin())
        return torch.tensor(found.tokens[nearest : nearest + 1], dtype=torch.float32)

    def face(self, index: int, frame: int, person: int) -> Tensor:
        """The embedding `(E,)` of a person in the nearest frame where it was found, or zeros."""
        found = self.store.face_embeddings(self._numbers[index])
        seen = np.flatnonzero(found.score[:, person] > 0)
        if not len(seen):
            return torch.zeros(self.model.face_embedding_dim)
        nearest = int(seen[np.abs(found.frames[seen] - frame).argmin()])
        return torch.tensor(found.embeddings[nearest, person])

    def _check_encoders(self) -> None:
        model, models = self.model, self.store.models
        if "codec" not in models:
            raise ValueError(
                f"{self.store.root} holds no latents, only {', '.join(sorted(models))}: encode "
                "into another folder with --latents."
            )
        pack = f"insightface:{model.face_model}" if model.face_model else None
        wanted: dict[str, Mapping[str, Any]] = {
            "codec": {"name": model.codec},
            "image_token": {"name": model.image_token, "dim": model.cross_attention_dim},
        }
        if model.face_embedding == "insightface":
            faces = {"name": pack, "channel_order": model.face_channel_order}
            wanted["face_embedding"] = {k: v for k, v in faces.items() if v is not None}
        for part, settings in wanted.items():
            for key, value in settings.items():
                if part in models and models[part].get(key) != value:
                    raise ValueError(
                        f"{self.store.root} was encoded with the {part} {key} "
                        f"{models[part].get(key)!r}, but the model has {value!r}: encode the "
                        "clips with this model's folder."
                    )

    def _read_sizes(self, mode: str) -> list[tuple[int, int]]:
        path = Path(self.store.root) / SETTINGS_FILE
        if not path.is_file():  # shards that were copied without it: each clip says for itself
            sizes = [self.store.framing(number).target for number in self._numbers]
            self.native = len(set(sizes)) > 1
            return sizes
        kept = schema.decode_json(path.read_bytes(), str(path))
        try:
            size, fitted = kept["settings"]["size"], kept["settings"]["fit"]
            if fitted != mode:
                raise ValueError(
                    f"{self.store.root} was encoded with --fit {fitted}, but task.framing is "
                    f"{mode}: set the one or encode with the other."
                )
            if size != NATIVE_SIZE:
                return [parse_size(size)] * len(self.clips)
            self.native = True
            multiple, most = kept["native"]["multiple"], kept["native"]["max_pixels"]
        except (KeyError, TypeError):
            raise ShardError(f"{path} is no settings file of `animator encode`.") from None
        return [native_size(self.clips.size(i), multiple, most) for i in range(len(self.clips))]
