"""Which encoders a run uses: those that a model folder names, known by the bytes of their files."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from animator import licences
from animator.block_dct import BlockDCT
from animator.config import AnimatorConfig, tiny
from animator.image_token import HALF, WHOLE, ThumbnailToken
from animator.latents import WEIGHTS, TemporalVAE
from animator.precision import DTYPES, weights_dtype
from animator.tensor_files import read_settings
from animator.weights import animator_sizes
from pipelines.encode.config import (
    MODEL_SIZE,
    NATIVE_SIZE,
    EncodeConfig,
    EncodeError,
    native_size,
    parse_size,
)
from pipelines.faces import FaceError
from pipelines.framing import Framing, fit
from pipelines.models import ENVIRONMENT, face_packs, locate_face_pack, sha256
from pipelines.overrides import config_hash, to_dict

_CODEC_LICENCE = {"temporal_vae": TemporalVAE.licence, "block_dct": BlockDCT.licence}
_TOKEN_LICENCE = {"clip_vision": licences.CLIP, "thumbnail": ThumbnailToken.licence}


@dataclass(frozen=True, kw_only=True)
class EncoderChoice:
    """Everything that decides what is computed: settled settings and the encoders' identity.

    config: without `auto` and `model`.
    models: for each encoder its name, files with their SHA-256, data type and licence.
    """

    config: EncodeConfig
    sizes: AnimatorConfig
    folder: Path | None
    device: str
    models: dict[str, dict[str, Any]]

    def settings(self) -> dict[str, Any]:
        """What an output folder keeps, as JSON holds it; equal for equal outputs."""
        kept = {"settings": to_dict(self.config), "models": self.models}
        if self.config.size == NATIVE_SIZE:
            kept["native"] = {"multiple": self.sizes.size_multiple, "max_pixels": self._pixels}
        return kept

    @property
    def config_hash(self) -> str:
        """SHA-256 (hex) of the settings."""
        return config_hash(self.settings())

    @property
    def _pixels(self) -> int:
        return self.sizes.height * self.sizes.width

    @property
    def fit_mode(self) -> str:
        """`pad`, or `crop`; a clip's own shape only loses its edges."""
        return "crop" if self.config.size == NATIVE_SIZE else self.config.fit

    def framing(self, source: tuple[int, int]) -> Framing:
        """How frames of (height, width) are fitted into those that latents are made of."""
        if self.config.size == NATIVE_SIZE:
            target = native_size(source, self.sizes.size_multiple, self._pixels)
        else:
            target = parse_size(self.config.size)
        return fit(source, target, self.fit_mode)

    def latent_bytes(self, source: tuple[int, int], num_frames: int) -> int:
        """Bytes that the latents of a clip take."""
        height, width = self.framing(source).target
        cell = self.sizes.spatial_factor
        return 2 * num_frames * self.sizes.latent_channels * (height // cell) * (width // cell)


def choose_encoders(config: EncodeConfig, folder: Path | None, device: str) -> EncoderChoice:
    """Settle what a run computes, and read the encoders' files for their SHA-256.

    Args:
        folder: a model folder, or one of Stable Video Diffusion in diffusers' layout; None is the
            tiny preset, which needs no files.
        device: `cpu` or `cuda`.

    Raises:
        EncodeError: for a size that the model does not take, and for faces without a pack.
        ValueError: for a folder that holds no model.
    """
    sizes = model_sizes(folder)
    config = replace(
        config, size=_settled_size(config.size, sizes), dtype=_settled_dtype(config.dtype, device)
    )
    models: dict[str, dict[str, Any]] = {}
    where = {"dtype": config.dtype, "device": device}
    if config.latents:
        names = (f"{WEIGHTS}.safetensors", f"{WEIGHTS}.fp16.safetensors")
        files = _digests(folder, "vae", names) if sizes.codec == "temporal_vae" else {}
        models["codec"] = {
            "name": sizes.codec,
            "licence": _CODEC_LICENCE.get(sizes.codec, "unknown"),
            "files": files,
            **(where if files else {"dtype": "fp32", "device": device}),
        }
    if config.image_tokens:
        names = (HALF, WHOLE) if config.dtype != "fp32" else (WHOLE, HALF)
        files = _digests(folder, "image_encoder", names) if sizes.image_token != "thumbnail" else {}
        models["image_token"] = {
            "name": sizes.image_token,
            "licence": _TOKEN_LICENCE.get(sizes.image_token, "unknown"),
            "dim": sizes.cross_attention_dim,
            "files": files,
            **(where if files else {"dtype": "fp32", "device": device}),
        }
    if config.faces:
        pack = _face_pack(config.face, sizes)
        config = replace(config, face=f"insightface:{pack.name}")
        learned = sizes.face_embedding == "insightface"
        models["face_embedding"] = {
            "name": config.face,
            "licence": licences.INSIGHTFACE,
            "files": {path.name: sha256(path) for path in sorted(pack.glob("*.onnx"))},
            "channel_order": sizes.face_channel_order if learned else "rgb",
        }
    return EncoderChoice(config=config, sizes=sizes, folder=folder, device=device, models=models)


def model_sizes(folder: Path | None) -> AnimatorConfig:
    """The configuration of a model folder, which names its frozen encoders.

    Raises:
        ValueError: for a folder that is neither of ours nor one of Stable Video Diffusion.
    """
    if folder is None:
        return tiny()
    unet = folder / "unet" / "config.json"
    if not (folder / "config.json").is_file() and unet.is_file():
        from animator.stable_video import sizes_from_unet

        return sizes_from_unet(read_settings(unet), unet)
    return animator_sizes(folder)


def _settled_size(size: str, sizes: AnimatorConfig) -> str:
    if size == MODEL_SIZE:
        return f"{sizes.height}x{sizes.width}"
    if size == NATIVE_SIZE:
        return size
    multiple = sizes.size_multiple
    height, width = parse_size(size)
    if min(height, width) < multiple or height % multiple or width % multiple:
        raise EncodeError(
            f"Got size {size}, but expected height and width as multiples of {multiple} pixels; "
            f"this model was made for {sizes.height}x{sizes.width}."
        )
    return f"{height}x{width}"


def _settled_dtype(choice: str, device: str) -> str:
    # A driver without a GPU of its own may lead workers that have one: those of today take bf16.
    if choice == "auto" and device == "cuda" and not torch.cuda.is_available():
        return "bf16"
    dtype = weights_dtype(choice, torch.device(device))
    return next(name for name, kind in DTYPES.items() if kind == dtype)


def _digests(folder: Path | None, part: str, names: Sequence[str]) -> dict[str, str]:
    """SHA-256 of the settings and the weights that will be read: the first of `names`."""
    here = None if folder is None else folder / part
    present = [name for name in names if here is not None and (here / name).is_file()]
    if here is None or not present or not (here / "config.json").is_file():
        raise EncodeError(
            f"{here or 'the tiny model'} has no config.json with {' or '.join(names)}: give "
            "--model a model folder with its frozen encoders, or that of Stable Video Diffusion "
            "(`animator models pull svd-xt`)."
        )
    return {name: sha256(here / name) for name in ("config.json", present[0])}


def _face_pack(choice: str, sizes: AnimatorConfig) -> Path:
    """The pack to embed faces with: the one asked for, the model's own, or the best present."""
    kind, _, name = choice.partition(":")
    if kind not in ("auto", "insightface") or (kind == "auto" and name):
        raise EncodeError(
            f"Got face backend {choice!r}, but expected auto, insightface or insightface:PACK: "
            "only recognition networks embed faces."
        )
    if not name and sizes.face_embedding == "insightface":
        name = sizes.face_model
    pack = locate_face_pack(name or None)
    if pack is None:
        present = ", ".join(path.name for path in face_packs()) or "none"
        raise FaceError(
            f"No InsightFace pack {name or 'of any name'} was found (present: {present}), and "
            f"--faces needs one: put it in a folder face/PACK below {ENVIRONMENT}, or fetch one "
            "with `animator models pull` (for non-commercial research only)."
        )
    return pack
