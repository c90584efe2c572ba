"""The settings of an import."""

from dataclasses import dataclass
from typing import Any, Literal

from pipelines.container import VideoLimits
from pipelines.exchange.frame_folder import ExchangeError, PictureLimits
from pipelines.overrides import to_dict

# How the work is done; the same shards come of it.
_MANNER = {"timeout_seconds", "max_memory"}


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """How clips are taken over.

    fps: frames a second of folders of pictures that do not say their own.
    crf, gop, preset: of the stored H.264.
    pose, face: backends for clips that bring no keypoints, no face masks.
    face_fps: how often a second the face model looks.
    timeout_seconds: for one clip, in a worker process.
    max_memory: bytes of data that a worker process may have, its models with it; 0 for no limit.
    """

    fps: float = 30.0
    crf: int = 16
    gop: int = 12
    preset: Literal["ultrafast", "veryfast", "fast", "medium", "slow"] = "fast"
    pose: str = "auto"
    face: str = "auto"
    face_fps: float = 5.0
    max_people: int = 4
    max_frames: int = 20_000
    max_picture_bytes: int = 64 << 20
    max_pixels: int = 40_000_000
    clips_per_shard: int = 8
    timeout_seconds: float = 3600.0
    max_memory: int = 12 << 30

    def __post_init__(self) -> None:
        # 24 and 24.0 are one setting, so they have to have one hash.
        object.__setattr__(self, "fps", float(self.fps))
        if not 0 < self.fps <= 240:
            raise ExchangeError(f"fps is {self.fps}, expected a rate of 0 to 240 frames a second.")
        if not 0 <= self.crf <= 51:
            raise ExchangeError(f"crf is {self.crf}, expected 0 (lossless) to 51.")
        for name in ("gop", "face_fps", "max_people", "max_frames", "max_picture_bytes"):
            self._positive(name)
        for name in ("max_pixels", "clips_per_shard", "timeout_seconds"):
            self._positive(name)

        if self.max_memory < 0:
            raise ExchangeError(f"max_memory is {self.max_memory}, expected 0 or more.")

    def outcome(self) -> dict[str, Any]:
        """The settings that decide what comes of an import, as plain values."""
        return {name: value for name, value in to_dict(self).items() if name not in _MANNER}

    def _positive(self, name: str) -> None:
        if not getattr(self, name) > 0:
            raise ExchangeError(f"{name} is {getattr(self, name)}, expected a number above 0.")

    def pictures(self) -> PictureLimits:
        """The limits of a folder of pictures."""
        return PictureLimits(
            max_frames=self.max_frames,
            max_bytes=self.max_picture_bytes,
            max_pixels=self.max_pixels,
        )

    def video(self) -> VideoLimits:
        """The limits of a video."""
        return VideoLimits(max_frames=self.max_frames, max_pixels=self.max_pixels)
