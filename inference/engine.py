"""The engine behind animate, batch and serve: two files in, a video and its record out.

It opens perception and the pipeline once and runs requests one after another.
"""

import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from animator.keypoints import BODY, KEYPOINT_NAMES, VISIBLE
from inference.pipeline import AnimationPipeline, AnimationResult, Pose
from inference.requests import AnimationRequest
from pipelines.faces import Face, open_face_backend
from pipelines.framing import fit
from pipelines.images import read_image
from pipelines.overrides import apply_overrides, to_dict
from pipelines.pose import PoseTrack
from pipelines.pose_backends import open_pose_backend
from pipelines.shards import sha256_file, write_atomic
from pipelines.video import VideoInfo, VideoLimits, decode, encode, probe

Progress = Callable[[float, str], None]
PERCEPTION_SIDE = 640  # pixels; people and faces are looked for at this size
MAX_FRAMES = 3000
_HEAD_NAMES = ("nose", "right_eye", "left_eye", "right_ear", "left_ear")
HEAD = [KEYPOINT_NAMES.index(name) for name in _HEAD_NAMES]
# Shares of the progress bar: reading and perception, sampling, writing.
READ, SAMPLED = 0.15, 0.95


class AnimationError(ValueError):
    """A request that cannot be animated; the message is one sentence for its user."""


class Timings:
    """Wall-clock seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def record(self) -> dict[str, float]:
        return {name: round(value, 3) for name, value in self.seconds.items()}


def _ignore(share: float, stage: str) -> None:
    pass


class AnimationEngine:
    """Animates files by one model.

    Args:
        model_dir: a saved model (see `AnimationPipeline.from_pretrained`).
        face: face backend, `auto` by default.
        pose: pose backend, `auto` by default: a file of keypoints beside the picture or video
            where there is one, else the networks that `ANIMATOR_MODELS` holds.
        alignment: another model folder to take the alignment block from.
        dtype: of the weights (see `AnimationPipeline.from_pretrained`).
        changes: of the model's own sampling and guidance settings, as "sampling.churn=40".

    Raises:
        ValueError: where the model cannot be loaded.
    """

    def __init__(
        self,
        model_dir: Path,
        face: str = "auto",
        pose: str = "auto",
        alignment: Path | None = None,
        dtype: str = "auto",
        changes: Sequence[str] = (),
    ):
        self.model_dir = Path(model_dir)
        self.pipeline = AnimationPipeline.from_pretrained(
            self.model_dir, face=face, alignment=alignment, dtype=dtype
        )
        self.settings = apply_overrides(self.pipeline.settings, changes)
        # A model that was trained on one recogniser's embeddings brings its own detector too.
        self.faces = self.pipeline.encoder.recogniser or open_face_backend(face)
        self.poses = open_pose_backend(pose)
        self.limits = VideoLimits(max_frames=20 * MAX_FRAMES)

    def run(
        self,
        request: AnimationRequest,
        progress: Progress | None = None,
        *,
        align: bool = True,
        per_frame: bool = False,
        framing: str = "pad",
        size: tuple[int, int] | None = None,
    ) -> dict[str, Any]:
        """Write `request.output` and the record `NAME.json` beside it; returns the record.

        Both appear complete or not at all. `progress(share, stage)` is called between steps, and
        may raise to stop.

        Raises:
            AnimationError, ValueError: for input that cannot be animated.
        """
        progress = progress or _ignore
        timings = Timings()
        size = self.pipeline.frame_size(size)
        with timings.stage("read"):
            progress(0.0, "reading")
            self._check_paths(request)
            image = read_image(request.reference)
            fit(image.shape[:2], size, framing)  # refuses what it cannot do before any work
            info = probe(request.driving, self.limits)
        with timings.stage("perception"):
            progress(0.02, "finding the person")
            face = self._reference_face(request, image)
            reference_pose = self._reference_pose(request.reference, image, face)
            progress(0.05, "reading the motion")
            driving_pose = self._driving_pose(request.driving, info)
        with timings.stage("sampling"):
            result = self.pipeline(
                image,
                reference_pose,
                driving_pose,
                fps=info.fps,
                face=face,
                framing=framing,
                align=align,
                per_frame=per_frame,
                size=size,
                seed=request.seed,
                settings=self.settings.with_choices(steps=request.steps, guidance=request.guidance),
                on_step=lambda done, steps: progress(
                    READ + (SAMPLED - READ) * done / steps, f"step {done}/{steps}"
                ),
            )
        progress(SAMPLED, "writing")
        return self._write(request, info, result, face, timings)

    def _check_paths(self, request: AnimationRequest) -> None:
        if request.output.suffix.lower() != ".mp4":
            raise AnimationError(
                f"{request.output}: the output is an H.264 video, so its name must end in .mp4."
            )
        for path, what in (
            (request.reference, "reference image"),
            (request.driving, "driving video"),
        ):
            if not path.is_file():
                raise AnimationError(f"{path}: no such {what}; check the path.")

    def _reference_face(self, request: AnimationRequest, image: np.ndarray) -> Face | None:
        """The face that was asked for; None where the picture shows none and none was chosen."""
        faces = self.faces.detect(_shrink(image))
        if len(faces) >= request.reference_face:
            return faces[request.reference_face - 1]
        if request.reference_face == 1:
            return None
        raise AnimationError(
            f"{request.reference}: face {request.reference_face} was asked for, but {len(faces)} "
            f"{'was' if len(faces) == 1 else 'were'} found ({self.faces.name}); they are counted "
            "from 1, the largest."
        )

    def _reference_pose(self, path: Path, image: np.ndarray, face: Face | None) -> Pose:
        """The person with the chosen face, or the largest one of the picture."""
        track = self.poses.track([_shrink(image)], source=path, times=np.zeros(1))
        if not _has_person(track, self.poses.threshold):
            raise AnimationError(
                f"{path}: no person found in the reference image ({self.poses.name}: "
                f"{self.poses.reason}); give a picture that shows the person, or keypoints beside "
                f"it as {path.stem}.pose.npz."
            )
        who = 0 if face is None else _owner(track, face)
        threshold = self.poses.threshold
        return Pose(track.keypoints[0, who], track.score[0, who], image.shape[:2], threshold)

    def _driving_pose(self, path: Path, info: VideoInfo) -> Pose:
        """Every frame's people at the clip's own rate."""
        frames = decode(path, fps=info.fps, max_side=PERCEPTION_SIDE, limits=self.limits)
        if len(frames) > MAX_FRAMES:
            raise AnimationError(
                f"{path}: {len(frames)} frames, expected at most {MAX_FRAMES}; cut the clip."
            )
        times = np.arange(len(frames)) / info.fps
        track = self.poses.track(list(frames), source=path, times=times)
        if not _has_person(track, self.poses.threshold):
            raise AnimationError(
                f"{path}: no person found in the driving video ({self.poses.name}: "
                f"{self.poses.reason}); give a clip that shows the person moving, or keypoints "
                f"beside it as {path.stem}.pose.npz."
            )
        size = (info.height, info.width)
        return Pose(track.keypoints, track.score, size, self.poses.threshold)

    def _write(
        self,
        request: AnimationRequest,
        info: VideoInfo,
        result: AnimationResult,
        face: Face | None,
        timings: Timings,
    ) -> dict[str, Any]:
        output = request.output
        output.parent.mkdir(parents=True, exist_ok=True)
        staged = output.with_name(f".{output.stem}.{os.getpid()}-{secrets.token_hex(4)}.mp4")
        try:
            with timings.stage("encoding"):
                sound = request.driving if info.has_audio else None
                written = encode(staged, result.frames, fps=info.fps, audio_from=sound)
            warnings = [*self.pipeline.encoder.warnings]
            if written.audio_note:
                warnings.append(written.audio_note)
            if face is None:
                warnings.append("no face was found in the reference: its identity is not guided")
            if result.alignment.method != "none" and not result.alignment.frames_used:
                warnings.append("no frame shares three joints with the reference: not aligned")
            record = self._record(request, info, result, timings, warnings)
            if face is not None:
                box = [round(float(side), 4) for side in face.box]
                record["face"] = {"chosen": request.reference_face, "box": box}
            record["file"] = {"bytes": staged.stat().st_size, "sha256": sha256_file(staged)}
            os.replace(staged, output)
        finally:
            staged.unlink(missing_ok=True)
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        write_atomic(output.with_suffix(".json"), text.encode())
        return record

    def _record(
        self,
        request: AnimationRequest,
        info: VideoInfo,
        result: AnimationResult,
        timings: Timings,
        warnings: list[str],
    ) -> dict[str, Any]:
        num_frames, height, width = result.frames.shape[:3]
        perception = {
            "face_detector": {"name": self.faces.name, "licence": self.faces.licence},
            "pose": {"name": self.poses.name, "licence": self.poses.licence},
        }
        return {
            "reference": request.reference.name,
            "driving": request.driving.name,
            "video": {
                "frames": num_frames,
                "height": height,
                "width": width,
                "fps": round(info.fps, 4),
                "sound": info.has_audio,
            },
            "alignment": {**result.alignment.record(), "summary": result.alignment.describe()},
            "sampling": {
                "seed": request.seed,
                "dtype": str(self.pipeline.animator.dtype).removeprefix("torch."),
                **to_dict(result.settings.sampling),
                "guidance": to_dict(result.settings.guidance),
                "windows": to_dict(result.settings.windows),
            },
            "models": {
                "animator": {
                    "name": self.model_dir.name,
                    "licence": self.pipeline.about.get("licence", "that of its training data"),
                },
                **self.pipeline.encoder.models,
                **perception,
            },
            "timings": timings.record(),
            "warnings": warnings,
        }


def _shrink(image: np.ndarray) -> np.ndarray:
    scale = PERCEPTION_SIDE / max(image.shape[:2])
    if scale >= 1:
        return image
    return cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def _owner(track: PoseTrack, face: Face) -> int:
    """The person whose head a face is: the nearest nose, eyes and ears; else the largest person."""
    centre = (face.box[:2] + face.box[2:]) / 2
    reach = float((face.box[2:] - face.box[:2]).max())
    seen = track.score[0][:, HEAD] >= VISIBLE
    away = np.linalg.norm(track.keypoints[0][:, HEAD] - centre, axis=-1)
    distance = np.where(seen, away, np.inf).min(1)
    nearest = int(distance.argmin())
    return nearest if distance[nearest] <= reach else 0


def _has_person(track: PoseTrack, threshold: float) -> bool:
    return track.score.size > 0 and bool((track.score[:, 0, BODY] >= threshold).any())
