"""Configuration of the model: one frozen dataclass a part, and the named presets."""

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin

Prediction = Literal["v", "sample"]
ChannelOrder = Literal["rgb", "bgr"]
PoseStyle = Literal["bold", "published"]
PoseCoordinates = Literal["frame", "person"]
FaceMerge = Literal["distribution", "norm", "addition"]
FaceEncoding = Literal["content_aware", "projection"]
MAX_COUNT = 65_536  # of anything that is counted: a damaged file must not ask for more


def _check_fields(config: object) -> None:
    """Each field of a configuration is of its kind: counts are whole numbers from 1 up.

    Raises:
        ValueError: names the field.
    """
    for entry in fields(config):  # type: ignore[arg-type]
        value, kind = getattr(config, entry.name), entry.type
        if get_origin(kind) is Literal:
            _require(value in get_args(kind), f"{entry.name} {value!r}", f"one of {get_args(kind)}")
        elif kind is int:
            _require(_is_count(value), f"{entry.name} {value!r}", "a whole number from 1 up")
        elif kind == tuple[int, ...]:
            whole = isinstance(value, tuple) and all(map(_is_count, value))
            _require(whole and len(value) > 0, f"{entry.name} {value!r}", "whole numbers from 1 up")
        elif kind is str:
            _require(isinstance(value, str), f"{entry.name} {value!r}", "a text")
        elif value is not None or kind is float:
            real = isinstance(value, int | float) and math.isfinite(value)
            _require(real, f"{entry.name} {value!r}", "a number")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_COUNT


def _require(condition: bool, given: str, expected: str) -> None:
    if not condition:
        raise ValueError(f"Got {given}, but expected {expected}.")


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
    """The alignment block (eq. 1, 9-11). Width and heads are not published."""

    num_keypoints: int = 18
    width: int = 64  # a thousand frames in half a second on one core
    num_heads: int = 4
    encoder_depth: int = 2
    fusion_depth: int = 4
    feed_forward_ratio: int = 4
    # Where the block's origin and unit are: the frame's centre and longer side, or the reference
    # person's centre and size, so that nothing depends on where and how large people are.
    coordinates: PoseCoordinates = "person"

    def __post_init__(self) -> None:
        _check_fields(self)
        _require(
            self.width % self.num_heads == 0,
            f"width {self.width} with num_heads {self.num_heads}",
            "a width that num_heads divides",
        )


@dataclass(frozen=True, kw_only=True)
class AnimatorConfig:
    """Sizes of UNet, PoseNet, Face Encoder and ID adapters, and what feeds them.

    `codec`, `image_token` and `face_embedding` name the frozen encoders whose outputs the
    weights were trained on; a checkpoint only works with the ones it names.
    """

    # latents
    codec: str = "block_dct"  # or "temporal_vae", a folder beside the weights
    latent_channels: int = 48
    spatial_factor: int = 8  # pixels a latent cell, on each side
    height: int = 128  # pixels; the size the weights were trained for
    width: int = 96
    num_frames: int = 8
    # backbone
    block_out_channels: tuple[int, ...] = (64, 128, 128)
    layers_per_block: int = 1
    num_attention_heads: tuple[int, ...] = (2, 4, 4)
    cross_attention_dim: int = 128
    addition_time_embed_dim: int = 32
    # conditioning
    image_token: str = "thumbnail"  # or "clip_vision"
    face_embedding: str = "thumbnail"  # or "insightface"
    face_embedding_dim: int = 512
    face_model: str = ""  # the pack whose embeddings the weights were trained on, where known
    face_channel_order: ChannelOrder = "rgb"  # as the recognition network saw the training faces
    num_face_tokens: int = 4
    face_encoder_depth: int = 4
    face_head_dim: int = 64
    # The full method, and what ablations replace: in the ID adapter the distribution alignment
    # (Table V), in the Face Encoder the layers that look at the image (Table II).
    id_adapter: FaceMerge = "distribution"
    face_encoder: FaceEncoding = "content_aware"
    pose_channels: tuple[int, ...] = (3, 16, 32, 64, 128)
    pose_style: PoseStyle = "bold"  # thick enough for small frames; "published" is v1's drawing
    conditioning_fps: float | None = None  # frames a second the UNet is told; None: the clip's own
    motion_bucket: int = 127  # Stable Video Diffusion's measure of motion
    noise_augmentation: float = 0.02  # deviation of the noise on the reference's pixels
    # diffusion
    sigma_data: float = 1.0  # spread of the latents; Stable Video Diffusion uses 1
    prediction: Prediction = "sample"  # what the UNet's output is; Stable Video Diffusion: "v"

    def __post_init__(self) -> None:
        _check_fields(self)
        _require(
            len(self.block_out_channels) == len(self.num_attention_heads),
            f"{len(self.block_out_channels)} block_out_channels and "
            f"{len(self.num_attention_heads)} num_attention_heads",
            "one number of heads for each block",
        )
        _require(
            len(self.pose_channels) == 5,
            f"{len(self.pose_channels)} pose_channels",
            "5: the input, three strided stages and the last convolution",
        )
        multiple = self.size_multiple
        _require(
            self.height % multiple == 0 and self.width % multiple == 0,
            f"height {self.height} and width {self.width}",
            f"multiples of {multiple} (latent cells of {self.spatial_factor} pixels, "
            f"halved {len(self.block_out_channels) - 1} times)",
        )
        _require(self.sigma_data > 0, f"sigma_data {self.sigma_data}", "a positive number")
        _require(
            self.noise_augmentation >= 0,
            f"noise_augmentation {self.noise_augmentation}",
            "0 (no noise) or a positive number",
        )

    @property
    def size_multiple(self) -> int:
        """Height and width must be multiples of this, in pixels."""
        return self.spatial_factor * 2 ** (len(self.block_out_channels) - 1)


def tiny() -> AnimatorConfig:
    """Every part present, small enough to train in minutes on two CPU cores."""
    return AnimatorConfig()


def svd_xt() -> AnimatorConfig:
    """The published sizes, on the Stable Video Diffusion XT backbone."""
    return AnimatorConfig(
        codec="temporal_vae",
        latent_channels=4,
        height=576,
        width=1024,
        num_frames=16,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        num_attention_heads=(5, 10, 20, 20),
        cross_attention_dim=1024,
        addition_time_embed_dim=256,
        image_token="clip_vision",
        face_embedding="insightface",
        pose_style="published",
        conditioning_fps=7.0,
        prediction="v",
    )


PRESETS = {"tiny": tiny, "svd_xt": svd_xt}
