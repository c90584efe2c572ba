"""Every threshold and size of a curation run, with the paper's rules as defaults."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """What a source may cost; `timeout_seconds` is of wall time for all the work on one source."""

    max_bytes: int = 4 << 30
    max_pixels: int = 40_000_000
    max_seconds: float = 1800.0
    timeout_seconds: float = 3600.0

    def __post_init__(self) -> None:
        _positive("video", self, "max_bytes", "max_pixels", "max_seconds", "timeout_seconds")


@dataclass(frozen=True, kw_only=True)
class ShotConfig:
    """How shot changes are found, and what happens to a source that has some.

    on_cut: `reject` drops the source (the paper's rule); `split` makes a clip of each shot.
    adaptive_threshold, min_content: PySceneDetect's AdaptiveDetector, which proposes hard cuts.
    same_share: a proposal is refused where at least this share of the points that are tracked from
        before it to after it survive: fast motion, flashes and captions keep the scene.
    same_colours: and where the colour histograms overlap by at least this much.
    uniform_spread: a frame whose grey levels spread by less (standard deviation, 0..255) shows
        nothing; such frames between two pictures are a fade.
    dissolve_residual: how far the frames of a dissolve may be from a mix of its two ends
        (relative RMS; 0 = perfect mix).
    """

    on_cut: Literal["reject", "split"] = "reject"
    adaptive_threshold: float = 3.0
    min_content: float = 12.0
    same_share: float = 0.2
    same_colours: float = 0.3
    uniform_spread: float = 5.0
    dissolve_residual: float = 0.4
    side: int = 160
    fps: float = 30.0

    def __post_init__(self) -> None:
        _positive("shots", self, "adaptive_threshold", "min_content", "side", "fps")
        _share("shots", self, "same_share", "same_colours", "dissolve_residual")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """The frames that are scored: `fps` a second, at most `max_frames` a clip, longest side."""

    fps: float = 5.0
    max_frames: int = 150
    side: int = 640

    def __post_init__(self) -> None:
        _positive("samples", self, "fps", "max_frames", "side")


@dataclass(frozen=True, kw_only=True)
class CameraConfig:
    """A camera moves above `max_percent_per_second`, % of the frame's longer side a second.

    min_tracked_share: where less of the pairs of frames could be followed (plain walls, a person
        who fills the frame), the measure is not believed and the clip passes.
    """

    max_percent_per_second: float = 3.0
    min_tracked_share: float = 0.2

    def __post_init__(self) -> None:
        _positive("camera", self, "max_percent_per_second")
        _share("camera", self, "min_tracked_share")


@dataclass(frozen=True, kw_only=True)
class FaceConfig:
    """Face rules, over the sampled frames of a clip.

    min_score: detections scored lower are not sure to be faces, and do not count as one.
    min_share: with a sure face in fewer frames, there is no face.
    min_score, min_size, min_sharpness: the means under which a face is of low quality: detection
        score, height of the box as a share of the frame's longer side, and variance of the
        Laplacian of the face scaled to 48 pixels.
    store_embeddings: whether recognition embeddings, which are personal data, go into the shards.
    """

    backend: str = "auto"
    min_share: float = 0.3
    min_score: float = 0.6
    min_size: float = 0.02
    min_sharpness: float = 10.0
    store_embeddings: bool = False

    def __post_init__(self) -> None:
        _share("faces", self, "min_share", "min_score", "min_size")


@dataclass(frozen=True, kw_only=True)
class PoseConfig:
    """Pose rules: more than `max_missing` of the main person's keypoints missing is too many.

    every: the pose network runs on every n-th frame of kept clips, joints in between are
        interpolated.
    max_people: how many people are stored.
    """

    backend: str = "auto"
    max_missing: float = 0.7
    every: int = 1
    max_people: int = 4

    def __post_init__(self) -> None:
        _share("pose", self, "max_missing")
        _positive("pose", self, "every", "max_people")


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What is stored: shots of `min_seconds` to `max_seconds` (longer ones are divided).

    min_side: sources whose shorter side has fewer pixels are too small.
    """

    max_side: int = 1024
    max_fps: float = 30.0
    crf: int = 18
    gop: int = 12
    preset: Literal["ultrafast", "veryfast", "fast", "medium", "slow"] = "fast"
    min_seconds: float = 1.0
    max_seconds: float = 120.0
    min_side: int = 240
    sources_per_shard: int = 8

    def __post_init__(self) -> None:
        _positive("output", self, "max_side", "max_fps", "gop", "min_seconds", "sources_per_shard")
        if self.max_seconds < 2 * self.min_seconds:
            raise ValueError(
                f"output.max_seconds is {self.max_seconds}, expected at least twice "
                f"output.min_seconds ({self.min_seconds}), so that long shots can be divided."
            )
        if not 0 <= self.crf <= 51:
            raise ValueError(f"output.crf is {self.crf}, expected 0 (lossless) to 51.")


@dataclass(frozen=True, kw_only=True)
class CurationConfig:
    """A whole curation run; its hash is part of every shard's record."""

    video: VideoConfig = field(default_factory=VideoConfig)
    shots: ShotConfig = field(default_factory=ShotConfig)
    samples: SampleConfig = field(default_factory=SampleConfig)
    camera: CameraConfig = field(default_factory=CameraConfig)
    faces: FaceConfig = field(default_factory=FaceConfig)
    pose: PoseConfig = field(default_factory=PoseConfig)
    output: OutputConfig = field(default_factory=OutputConfig)


def _positive(group: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not value > 0:
            raise ValueError(f"{group}.{name} is {value}, expected a number above 0.")


def _share(group: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not 0 <= value <= 1:
            raise ValueError(f"{group}.{name} is {value}, expected a share from 0 to 1.")
