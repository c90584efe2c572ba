"""Frozen encoders around the animator: what turns a reference image into its three inputs.

Training and inference share them, so a model is always driven by what it was trained on.
Shapes: B batch, T frames, H W pixels, C latent channels, h w latent size, D context width,
E face embedding.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from animator.config import AnimatorConfig, PoseStyle
from animator.face_embedding import FaceThumbnail, crop_faces
from animator.image_token import open_image_token
from animator.latents import LatentCodec, open_codec
from animator.model import Animator
from animator.skeleton import draw_pose
from inference.noise import REFERENCE, ClipNoise
from pipelines.faces import Face, FaceBackend, open_face_backend
from pipelines.framing import Framing
from pipelines.models import locate_face_pack

FRAMES_AT_ONCE = 16


def to_tensor(frames: np.ndarray) -> Tensor:
    """uint8 RGB `(..., H, W, 3)` to float `(..., 3, H, W)` in [-1, 1]."""
    tensor = torch.from_numpy(np.require(frames, requirements=("C", "W")))
    return rearrange(tensor, "... h w c -> ... c h w").float() / 127.5 - 1


def to_frames(images: Tensor) -> np.ndarray:
    """Float `(T, 3, H, W)` in [-1, 1] to uint8 RGB `(T, H, W, 3)`, a few frames at a time."""
    frames = np.empty((len(images), *images.shape[2:], 3), np.uint8)
    for begin in range(0, len(images), FRAMES_AT_ONCE):
        part = images[begin : begin + FRAMES_AT_ONCE].float()
        pixels = ((part.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        frames[begin : begin + len(part)] = rearrange(pixels, "t c h w -> t h w c").cpu().numpy()
    return frames


def pose_images(
    keypoints: np.ndarray,
    score: np.ndarray,
    size: tuple[int, int],
    threshold: float,
    style: PoseStyle,
) -> np.ndarray:
    """Poses `(T, P, K, 2)` and scores `(T, P, K)` drawn at (height, width), `(T, H, W, 3)`."""
    frames = [
        draw_pose(k, s, *size, threshold, style) for k, s in zip(keypoints, score, strict=True)
    ]
    return np.stack(frames)


class ReferenceEncoder(nn.Module):
    """Image token, face embedding and reference latents, with the encoders a model names.

    Args:
        config: of the model; names the encoders.
        folder: the model's folder, for encoders with weights of their own.
        face: which face backend to open where the model needs recognition embeddings.
        dtype: of the encoders' weights; None keeps that of their files.

    Raises:
        ValueError: for encoders that are not known or whose files are missing.
    """

    def __init__(
        self,
        config: AnimatorConfig,
        folder: Path | None = None,
        face: str = "auto",
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.config = config
        vae_folder = folder / "vae" if folder else None
        self.codec: LatentCodec = open_codec(config.codec, vae_folder, dtype)
        if self.codec.latent_channels != config.latent_channels:
            raise ValueError(
                f"Got codec {config.codec} with {self.codec.latent_channels} latent channels, but "
                f"the model expects {config.latent_channels}."
            )
        self.image_encoder = open_image_token(
            config.image_token,
            config.cross_attention_dim,
            folder / "image_encoder" if folder else None,
            dtype,
        )
        self.face_thumbnail = FaceThumbnail(config.face_embedding_dim)
        self.recogniser = _open_recogniser(config, face)
        self.warnings: list[str] = []
        if self.recogniser is not None and config.face_model:
            if self.recogniser.name != f"insightface:{config.face_model}":
                self.warnings.append(
                    f"the model learned faces from {config.face_model}, but {self.recogniser.name} "
                    "gives others: the person's identity will suffer"
                )

    @property
    def needs_full_frames(self) -> bool:
        """Whether the face embedding wants the frame at its own size."""
        return self.recogniser is not None

    @property
    def token_takes_native(self) -> bool:
        """Whether the image token wants the picture at its own size and shape."""
        return self.image_encoder.takes_native

    @property
    def models(self) -> dict[str, dict[str, str]]:
        """Name and licence of each encoder, for the record of an output."""
        face: Any = self.recogniser or self.face_thumbnail
        return {
            "codec": {"name": self.config.codec, "licence": self.codec.licence},
            "image_token": {
                "name": self.config.image_token,
                "licence": str(self.image_encoder.licence),
            },
            "face_embedding": {"name": face.name, "licence": face.licence},
        }

    @torch.no_grad()
    def image_token(self, images: Tensor) -> Tensor:
        """`(B, 3, H, W)` in [-1, 1] to `(B, 1, D)`."""
        return self.image_encoder(images)

    def resize_for_token(self, images: Tensor) -> Tensor:
        """Pictures at the image encoder's own size, so that they can be stacked in a batch."""
        return self.image_encoder.resize(images)

    @torch.no_grad()
    def face_embedding(self, frame: np.ndarray, face: Face | None) -> Tensor:
        """Embedding `(E,)` of one face in a uint8 RGB frame; zeros where there is none."""
        if face is None:
            return torch.zeros(self.config.face_embedding_dim)
        if self.recogniser is not None:
            if self.config.face_channel_order != self.recogniser.channel_order:
                frame = np.ascontiguousarray(frame[..., ::-1])
            embedding = np.asarray(self.recogniser.embed(frame, face), np.float32)
            return torch.from_numpy(embedding)
        box = torch.from_numpy(np.asarray(face.box, np.float32))
        crops = crop_faces(to_tensor(frame)[None], box[None])
        place = next(self.face_thumbnail.buffers()).device
        return self.face_thumbnail(crops.to(place))[0].cpu()

    @torch.no_grad()
    def reference_latents(self, images: Tensor) -> Tensor:
        """`(B, 3, H, W)` in [-1, 1] to `(B, C, h, w)`; noise is the caller's to add."""
        return self.codec.encode_reference(images)

    def time_ids(self, fps: float | Tensor, batch: int) -> Tensor:
        """As the function `time_ids`, for this encoder's model."""
        return time_ids(self.config, fps, batch)


@dataclass(frozen=True)
class EncodedReference:
    """What a reference alone decides of the conditions, whatever drives it."""

    context: Tensor  # (1, 1 + P·F, D): image token and F face tokens a person
    latents: Tensor  # (1, C, h, w)


@torch.no_grad()
def encode_reference(
    animator: Animator,
    encoder: ReferenceEncoder,
    reference: np.ndarray,
    faces: Sequence[Face | None],
    frame: Framing,
    seed: int,
) -> EncodedReference:
    """Encode a picture for an animator.

    Args:
        reference: uint8 RGB `(H0, W0, 3)`.
        faces: of each person, in the order of their regions, or None who has none.
        frame: how it is fitted into the model's size.
        seed: of the noise that the model's configuration adds to it.
    """
    place = animator.place
    framed = frame.image(reference)
    image = to_tensor(framed)[None].to(place)
    embeddings = [_embedding(encoder, reference, framed, face, frame) for face in faces]
    native = encoder.token_takes_native
    token = encoder.image_token(to_tensor(reference)[None].to(place) if native else image)
    context = animator.context_of_people(token, torch.stack(embeddings).to(place))
    noise = ClipNoise(seed, tuple(image.shape[1:]))(REFERENCE, [0]).to(image)
    noisy = image + encoder.config.noise_augmentation * noise
    return EncodedReference(context, encoder.reference_latents(noisy).float())


def _embedding(
    encoder: ReferenceEncoder,
    reference: np.ndarray,
    framed: np.ndarray,
    face: Face | None,
    frame: Framing,
) -> Tensor:
    if encoder.needs_full_frames:
        return encoder.face_embedding(reference, face)
    if face is not None:
        face = replace(face, box=frame.boxes(face.box))
    return encoder.face_embedding(framed, face)


def reference_key(
    reference: np.ndarray, faces: Sequence[Face | None], frame: Framing, seed: int
) -> str:
    """What tells one `encode_reference` of a model from another: a hash of all it depends on."""
    digest = hashlib.sha256(np.ascontiguousarray(reference).data)
    digest.update(repr((reference.shape, frame, seed)).encode())
    for face in faces:
        digest.update(b"face")
        for part in () if face is None else (face.box, face.landmarks):
            digest.update(b"none" if part is None else np.asarray(part, np.float64).tobytes())
    return digest.hexdigest()


def time_ids(config: AnimatorConfig, fps: float | Tensor, batch: int) -> Tensor:
    """Frames per second - 1, motion bucket and noise level, `(B, 3)` (v1).

    Args:
        fps: of the clip or clips; a model that was taught one rate is told that one.
    """
    ids = torch.empty(batch, 3, device=fps.device if isinstance(fps, Tensor) else None)
    ids[:, 0] = (fps if config.conditioning_fps is None else config.conditioning_fps) - 1
    ids[:, 1] = config.motion_bucket
    ids[:, 2] = config.noise_augmentation
    return ids


def _open_recogniser(config: AnimatorConfig, choice: str) -> FaceBackend | None:
    if config.face_embedding == "thumbnail":
        return None
    if config.face_embedding != "insightface":
        raise ValueError(
            f"Got face embedding {config.face_embedding!r}, but expected thumbnail or insightface."
        )
    if choice == "auto":
        own = config.face_model and locate_face_pack(config.face_model)
        choice = f"insightface:{config.face_model}" if own else "insightface"
    backend = open_face_backend(choice)
    if backend.embedding_dim != config.face_embedding_dim:
        wanted = config.face_model or "the pack it was trained with"
        raise ValueError(
            f"Got face pack {backend.name} with embeddings of {backend.embedding_dim}, but the "
            f"model was trained on {config.face_embedding_dim}: give it {wanted} (`animator models "
            "pull` fetches the known packs)."
        )
    return backend


def face_mask(boxes: np.ndarray, size: tuple[int, int], cell: int) -> np.ndarray:
    """Share of each latent cell that faces cover: M of eq. 25, `(T, 1, h, w)` in 0..1.

    Args:
        boxes: `(T, P, 4)` in 0..1; all-zero boxes are no face.
        size: (height, width) in pixels.
        cell: pixels a latent cell.
    """
    height, width = size[0] // cell, size[1] // cell
    rows, columns = np.arange(height + 1), np.arange(width + 1)
    mask = np.zeros((len(boxes), 1, height, width), np.float32)
    for t, people in enumerate(boxes):
        for x0, y0, x1, y1 in people:
            vertical = _overlap(rows, y0 * height, y1 * height)
            horizontal = _overlap(columns, x0 * width, x1 * width)
            mask[t, 0] = np.maximum(mask[t, 0], np.outer(vertical, horizontal))
    return mask


def _overlap(edges: np.ndarray, low: float, high: float) -> np.ndarray:
    """Covered share of each unit interval between consecutive edges."""
    return np.clip(np.minimum(edges[1:], high) - np.maximum(edges[:-1], low), 0, 1)
