"""The encoders of a run, opened: frames to latents, image tokens and face embeddings.

Shapes: T frames, S sampled frames, P people, H W pixels, C latent channels, h w latent size,
D width of a token or embedding.
"""

from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from animator.image_token import open_image_token
from animator.latents import open_codec
from animator.precision import DTYPES
from pipelines.encode.config import EncodeError
from pipelines.encode.model import EncoderChoice
from pipelines.faces import Face, open_face_backend
from pipelines.pose import box_overlap

# Pixels that the codec is given at once: sixteen frames of 576x1024, whatever the clip's length.
CHUNK_PIXELS = 16 * 576 * 1024
MAX_CHUNK = 64
MIN_OVERLAP = 0.3
HALF_LIMIT = float(np.finfo(np.float16).max)


class Encoders:
    """Frozen encoders on one device; frames are uint8 RGB `(H, W, 3)`.

    Args:
        choice: what to open; its files are read here.

    Raises:
        ValueError: for files that are damaged or do not fit the model.
    """

    def __init__(self, choice: EncoderChoice) -> None:
        config, sizes, folder = choice.config, choice.sizes, choice.folder
        self.device = torch.device(choice.device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise EncodeError(
                "The run was planned for GPUs, but this worker has none: give every machine of "
                "the cluster a GPU, or encode on the CPU into another --out folder."
            )
        dtype = DTYPES[config.dtype]
        self.codec = self.image = self.faces = None
        if config.latents:
            self.codec = _placed(
                open_codec(sizes.codec, folder and folder / "vae", dtype), self.device
            )
            if self.codec.latent_channels != sizes.latent_channels:
                raise EncodeError(
                    f"Got codec {sizes.codec} with {self.codec.latent_channels} latent channels, "
                    f"but the model expects {sizes.latent_channels}."
                )
        if config.image_tokens:
            token = open_image_token(
                sizes.image_token,
                sizes.cross_attention_dim,
                folder and folder / "image_encoder",
                dtype,
            )
            self.image = _placed(token, self.device)
        if config.faces:
            self.faces = open_face_backend(config.face, threads=1)
            self._swap_channels = (
                choice.models["face_embedding"]["channel_order"] != self.faces.channel_order
            )
            learned = sizes.face_embedding == "insightface"
            if learned and self.faces.embedding_dim != sizes.face_embedding_dim:
                raise EncodeError(
                    f"Got face pack {self.faces.name} with embeddings of "
                    f"{self.faces.embedding_dim}, but the model was trained on "
                    f"{sizes.face_embedding_dim}: name its own with --face insightface:PACK."
                )

    @property
    def latent_scale(self) -> float:
        """What latents are multiplied by, and those of references are not."""
        return float(getattr(self.codec, "scaling_factor", 1.0))

    @property
    def tokens_take_native(self) -> bool:
        """Whether the image token wants the frame at the clip's own size."""
        return self.image is not None and self.image.takes_native

    @property
    def embedding_dim(self) -> int:
        """Width of a face embedding."""
        return 0 if self.faces is None else self.faces.embedding_dim

    @torch.no_grad()
    def latents(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        """Latents `(T, C, h, w)` float16 of frames of one size, on the scale of `codec.encode`.

        Raises:
            ValueError: for latents that float16 does not hold.
        """
        assert self.codec is not None
        latents = self.codec.encode(_unit(np.stack(frames), self.device)).float()
        largest = float(latents.abs().amax())
        if not largest <= HALF_LIMIT:
            raise EncodeError(
                f"The codec gave latents of up to {largest:g}, expected finite numbers within "
                f"float16 (to {HALF_LIMIT:g}): try --dtype fp32."
            )
        return latents.half().cpu().numpy()

    @torch.no_grad()
    def for_token(self, frame: np.ndarray) -> Tensor:
        """A frame `(H, W, 3)` as small as the image encoder takes it, `(1, 3, h, w)`."""
        assert self.image is not None
        return self.image.resize(_unit(frame[None], self.device))

    @torch.no_grad()
    def image_tokens(self, small: Sequence[Tensor]) -> np.ndarray:
        """Tokens `(S, D)` float16 of frames that `for_token` made small."""
        assert self.image is not None
        tokens = self.image(torch.cat(list(small)))
        return rearrange(tokens, "s 1 d -> s d").half().cpu().numpy()

    def embed(self, frame: np.ndarray, face: Face) -> np.ndarray | None:
        """Embedding `(D,)` float32, not normalised, of a face at its stored place in a frame.

        A face that was stored without landmarks is looked for anew where its box is; None where
        the pack does not see it there.
        """
        assert self.faces is not None
        if not (np.isfinite(face.landmarks).all() and face.landmarks.any()):
            found = self.faces.detect(frame)
            near = max(found, key=lambda other: box_overlap(other.box, face.box), default=None)
            if near is None or box_overlap(near.box, face.box) < MIN_OVERLAP:
                return None
            face = near
        if not np.isfinite(face.landmarks).all():
            return None
        if self._swap_channels:
            frame = np.ascontiguousarray(frame[..., ::-1])
        return np.asarray(self.faces.embed(frame, face), np.float32)


def chunk_length(size: tuple[int, int]) -> int:
    """Frames of (height, width) that the codec takes at once; a function of the size alone."""
    return max(1, min(MAX_CHUNK, CHUNK_PIXELS // (size[0] * size[1])))


def _placed(module, device: torch.device):
    return module.to(device).eval()


def _unit(frames: np.ndarray, device: torch.device) -> Tensor:
    """uint8 `(T, H, W, 3)` to `(T, 3, H, W)` in [-1, 1]; bytes travel, not floats."""
    pixels = torch.from_numpy(np.require(frames, requirements=("C", "W"))).to(device)
    return rearrange(pixels, "t h w c -> t c h w").float() / 127.5 - 1
