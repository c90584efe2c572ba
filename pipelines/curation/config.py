"""Every threshold and size of a curation run, with the paper's rules as defaults.

Settings are of three kinds. Most decide what is measured or stored, and a run keeps them for good.
Thresholds (`is_threshold`) only decide what is made of the scores, and can be revised afterwards
without a second look at a video. Those of `download` and the limits of time and memory
say how the work is done, not what comes of it (`outcome`), and may differ from one start of a run
to the next.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from pipelines.overrides import to_dict


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """What a source may cost.

    timeout_seconds: of wall time for all the work on one source, with seconds_per_video_second for
        each second that it lasts. What it waits for others to be done with a model does not count.
    max_memory: bytes of address space for the process that decodes it; 0 for no limit.
    """

    max_bytes: int = 4 << 30
    max_pixels: int = 40_000_000
    max_seconds: float = 1800.0
    timeout_seconds: float = 3600.0
    seconds_per_video_second: float = 6.0
    max_memory: int = 6 << 30

    def __post_init__(self) -> None:
        _positive("video", self, "max_bytes", "max_pixels", "max_seconds", "timeout_seconds")
        _not_negative("video", self, "max_memory", "seconds_per_video_second")

    @property
    def most_seconds(self) -> float:
        """Of wall time for the longest source there may be."""
        return self.timeout_seconds + self.seconds_per_video_second * self.max_seconds


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """How sources that are not on this machine are fetched.

    max_bytes, max_seconds, max_height: larger and longer videos are refused; of several formats,
        the best of at most `max_height` lines is taken.
    timeout_seconds: of wall time for one download, all its attempts included.
    rate_limit: bytes a second for each download; 0 for no limit.
    per_host: downloads from one host at a time, over all workers of one machine.
    retries, backoff_seconds: attempts after the first for errors that may pass, and the wait
        before the first of them, which doubles each time.
    cookies_file: a Netscape cookies.txt for sites that ask who is there.
    allow_hosts: hosts or addresses inside private networks that may be asked all the same.
    """

    max_bytes: int = 4 << 30
    max_seconds: float = 1800.0
    max_height: int = 1080
    timeout_seconds: float = 1800.0
    socket_timeout_seconds: float = 30.0
    rate_limit: int = 0
    per_host: int = 2
    retries: int = 4
    backoff_seconds: float = 2.0
    cookies_file: str | None = None
    allow_hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _positive("download", self, "max_bytes", "max_seconds", "max_height", "timeout_seconds")
        _positive("download", self, "socket_timeout_seconds", "per_host", "backoff_seconds")
        _not_negative("download", self, "rate_limit", "retries")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Which stages a clip passes.

    stop_early: a clip that a cheap stage rejects is not shown to the models. Cheaper where most is
        rejected, but the scores of the later stages are then missing, and looser thresholds
        afterwards cost a second look at the video.
    """

    stop_early: bool = False


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

    max_peak_percent_per_second: and where a fifth of the clip moves faster than this, however
        still the rest is.
    backend: `flow` (optical flow and a robust homography), `cotracker` (point tracks; weights for
        non-commercial use), or `auto`, the second where its weights are present.
    min_tracked_share: where less of the pairs of frames could be followed (plain walls, a person
        who fills the frame), the measure is not believed and the clip passes.
    """

    backend: Literal["auto", "flow", "cotracker"] = "auto"
    max_percent_per_second: float = 3.0
    max_peak_percent_per_second: float = 6.0
    min_tracked_share: float = 0.2

    def __post_init__(self) -> None:
        _positive("camera", self, "max_percent_per_second", "max_peak_percent_per_second")
        _share("camera", self, "min_tracked_share")


@dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """Picture rules, over the sampled frames of a clip. The defaults only refuse what is unusable.

    min_sharpness: variance of the Laplacian of the frame at 160 pixels of its shorter side.
    min_luma, max_luma: mean brightness, 0..255.
    max_clipped: share of pixels that are burnt out or drowned in black; a figure before plain
        white has many.
    max_black_bars: share of the frame that bars at its edges take, black or a blurred copy.
    max_text: share of the frame that burnt-in text covers; one line of subtitles takes 0.02.
    """

    min_sharpness: float = 15.0
    min_luma: float = 16.0
    max_luma: float = 252.0
    max_clipped: float = 0.97
    max_black_bars: float = 0.6
    max_text: float = 0.1

    def __post_init__(self) -> None:
        _not_negative("quality", self, "min_sharpness", "min_luma", "max_luma")
        _share("quality", self, "max_clipped", "max_black_bars", "max_text")


@dataclass(frozen=True, kw_only=True)
class FaceConfig:
    """Face rules, over the sampled frames of a clip.

    min_score: detections scored lower are not sure to be faces, and do not count as one.
    min_share: with a sure face in fewer frames, there is no face.
    min_score, min_size, min_sharpness, min_frontality, min_exposure: the means under which a face
        is of low quality: detection score, height of the box as a share of the frame's longer
        side, variance of the Laplacian of the face scaled to 48 pixels, how far it is turned to
        the camera (1 = frontal, 0 = profile), and the share of its pixels neither burnt out nor
        drowned in black.
    min_identity: the clip changes person where the embeddings of the main face before and after
        some moment agree less (cosine of the means of both); only where the face model knows
        identities.
    stored_min_score: detections scored lower are not stored with a kept clip.
    store_embeddings: whether recognition embeddings, which are personal data, go into the shards.
    """

    backend: str = "auto"
    min_share: float = 0.2
    min_score: float = 0.6
    min_size: float = 0.02
    min_sharpness: float = 10.0
    min_frontality: float = 0.0
    min_exposure: float = 0.3
    min_identity: float = 0.3
    stored_min_score: float = 0.6
    store_embeddings: bool = False

    def __post_init__(self) -> None:
        _share("faces", self, "min_share", "min_score", "min_size", "min_frontality")
        _share("faces", self, "min_exposure", "min_identity", "stored_min_score")
        _not_negative("faces", self, "min_sharpness")


@dataclass(frozen=True, kw_only=True)
class PoseConfig:
    """Pose rules: more than `max_missing` of the main person's keypoints missing is too many.

    The paper's rule can be read in two ways. `reading="mean"` compares the share missing over all
    frames; `reading="frames"` calls a frame bad above `max_missing` and rejects a clip with more
    than `max_bad_frames` of them. A frame without a detected person has no keypoints.

    max_missing_hands, max_missing_face: the same for parts, where the network knows them.
    every: the pose network runs on every n-th frame of kept clips, joints in between are
        interpolated.
    max_people: how many people are stored.
    """

    backend: str = "auto"
    reading: Literal["mean", "frames"] = "mean"
    max_missing: float = 0.7
    max_bad_frames: float = 0.5
    max_missing_hands: float = 1.0
    max_missing_face: float = 1.0
    every: int = 1
    max_people: int = 4

    def __post_init__(self) -> None:
        _share("pose", self, "max_missing", "max_bad_frames")
        _share("pose", self, "max_missing_hands", "max_missing_face")
        _positive("pose", self, "every", "max_people")


@dataclass(frozen=True, kw_only=True)
class PeopleConfig:
    """Rules on the people who are tracked through a clip.

    min_people, max_people: of them at once; `max_people=0` allows any number.
    min_height: of the main person, as a share of the frame's height.
    max_crossing: share of frames in which another person covers the main one.
    """

    min_people: int = 0
    max_people: int = 0
    min_height: float = 0.0
    max_crossing: float = 1.0

    def __post_init__(self) -> None:
        _share("people", self, "min_height", "max_crossing")
        _not_negative("people", self, "min_people", "max_people")


@dataclass(frozen=True, kw_only=True)
class DuplicateConfig:
    """Clips that show what an earlier one shows, over the whole run.

    near: whether near-duplicates are rejected; videos of the same bytes always are one.
    max_distance: bits (of 64) by which the perceptual hashes of two clips may differ, the mean
        over their frames.
    """

    near: bool = True
    max_distance: float = 6.0

    def __post_init__(self) -> None:
        _not_negative("duplicates", self, "max_distance")


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What is stored: shots of `min_seconds` to `max_seconds` (longer ones are divided).

    min_side: sources whose shorter side has fewer pixels are too small.
    sources_per_shard: 0 chooses by the size of the run: 8 up to a hundred thousand sources, more
        beyond.
    """

    max_side: int = 1024
    max_fps: float = 30.0
    crf: int = 18
    gop: int = 12
    preset: Literal["ultrafast", "veryfast", "fast", "medium", "slow"] = "fast"
    min_seconds: float = 1.0
    max_seconds: float = 120.0
    min_side: int = 240
    sources_per_shard: int = 0

    def __post_init__(self) -> None:
        _positive("output", self, "max_side", "max_fps", "gop", "min_seconds")
        _not_negative("output", self, "min_side", "sources_per_shard")
        if self.max_seconds < 2 * self.min_seconds:
            raise ValueError(
                f"output.max_seconds is {self.max_seconds}, expected at least twice "
                f"output.min_seconds ({self.min_seconds}), so that long shots can be divided."
            )
        if not 0 <= self.crf <= 51:
            raise ValueError(f"output.crf is {self.crf}, expected 0 (lossless) to 51.")


@dataclass(frozen=True, kw_only=True)
class CurationConfig:
    """A whole curation run; the hash of its `outcome` is part of every shard's record."""

    video: VideoConfig = field(default_factory=VideoConfig)
    download: DownloadConfig = field(default_factory=DownloadConfig)
    stages: StageConfig = field(default_factory=StageConfig)
    shots: ShotConfig = field(default_factory=ShotConfig)
    samples: SampleConfig = field(default_factory=SampleConfig)
    camera: CameraConfig = field(default_factory=CameraConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    faces: FaceConfig = field(default_factory=FaceConfig)
    pose: PoseConfig = field(default_factory=PoseConfig)
    people: PeopleConfig = field(default_factory=PeopleConfig)
    duplicates: DuplicateConfig = field(default_factory=DuplicateConfig)
    output: OutputConfig = field(default_factory=OutputConfig)


# Groups whose settings are thresholds, but for those named in _MEASURED; and single thresholds.
_JUDGING = ("camera", "quality", "faces", "pose", "people", "duplicates")
_MEASURED = {
    "camera.backend",
    "faces.backend",
    "faces.stored_min_score",
    "faces.store_embeddings",
    "pose.backend",
    "pose.every",
    "pose.max_people",
}
_THRESHOLDS = {"shots.on_cut", "output.min_side"}
# How the work is done; the same shards come of it.
_MANNER = {"video.timeout_seconds", "video.seconds_per_video_second", "video.max_memory"}


def is_threshold(name: str) -> bool:
    """Whether a setting (`group.name`) only decides what is made of scores, so can be revised."""
    group = name.partition(".")[0]
    return name in _THRESHOLDS or (group in _JUDGING and name not in _MEASURED)


def outcome(config: CurationConfig) -> dict[str, Any]:
    """The settings that decide what a run writes, as plain values by group."""
    groups = to_dict(config)
    del groups["download"]
    return {
        group: {name: value for name, value in settings.items() if f"{group}.{name}" not in _MANNER}
        for group, settings in groups.items()
    }


def _positive(group: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not value > 0:
            raise ValueError(f"{group}.{name} is {value}, expected a number above 0.")


def _not_negative(group: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value < 0:
            raise ValueError(f"{group}.{name} is {value}, expected 0 or more.")


def _share(group: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not 0 <= value <= 1:
            raise ValueError(f"{group}.{name} is {value}, expected a share from 0 to 1.")
