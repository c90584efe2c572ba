"""The engine behind animate, batch and serve: two files in, a video and its record out.

It opens perception and the pipeline once and runs requests one after another.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from inference.clip_stream import AnimationStream
from inference.engine_factory import model_fingerprint
from inference.identity import IdentityMeter
from inference.outputs import making
from inference.peak_memory import PeakMemory
from inference.perception import AnimationError, Perception, check_inputs
from inference.perception_cache import RememberingPerception
from inference.pipeline import AnimationPipeline
from inference.presets import preset as find_preset
from inference.provenance import Signer, file_metadata, watermarked
from inference.records import describe_face, describe_preset, describe_run, run_warnings
from inference.requests import AnimationRequest
from inference.seams import SeamMeter, pose_motion
from inference.settings import chosen_settings
from inference.stages import Timings
from inference.states import WorkPlace
from pipelines.faces import Face
from pipelines.framing import fit
from pipelines.images import read_image
from pipelines.pose_file import FilePoseBackend
from pipelines.shards import sha256_file, write_atomic
from pipelines.video import EncodeResult, VideoInfo, encode

Progress = Callable[[float, str], None]
# Shares of the progress bar: reading and perception, sampling, writing.
READ, SAMPLED = 0.15, 0.95
# Frames of a clip from which on `animator animate` can continue a run that was ended.
LONG = 64


def _ignore(share: float, stage: str) -> None:
    pass


class AnimationEngine:
    """Animates files by one model.

    Args:
        model_dir: a saved model (see `AnimationPipeline.from_pretrained`).
        face: face backend, `auto` by default.
        pose: pose backend, `auto` by default: a file of keypoints beside the picture or video
            where there is one, else the networks that `ANIMATOR_MODELS` holds.
        alignment: which alignment block (see `animator.alignment_weights.open_alignment`).
        dtype: of the weights (see `AnimationPipeline.from_pretrained`).
        changes: of the model's own settings of sampling, guidance and alignment, as
            "sampling.churn=40".
        remember: how many answers of perception are kept for requests that share a picture or a
            clip; none by default.
        preset: of `inference.presets`, which `changes` are made to; the model's own settings by
            default.

    Raises:
        ValueError: where the model cannot be loaded.
    """

    def __init__(
        self,
        model_dir: Path,
        face: str = "auto",
        pose: str = "auto",
        alignment: str = "auto",
        dtype: str = "auto",
        changes: Sequence[str] = (),
        remember: int = 0,
        preset: str | None = None,
    ):
        # A name that there is none of is refused before anything is loaded.
        self.preset = None if preset is None else find_preset(preset)
        self.model_dir = Path(model_dir)
        self.pipeline = AnimationPipeline.from_pretrained(
            self.model_dir, face=face, alignment=alignment, dtype=dtype
        )
        self._preset_settings, self.settings = chosen_settings(
            self.pipeline.settings, self.pipeline.device.type, self.preset, changes
        )
        marks = self.settings.provenance
        self._signer = Signer(marks) if marks.signed else None  # a wrong key is said at once
        self._model_fingerprint: str | None = None
        # A model that was trained on one recogniser's embeddings brings its own detector too.
        faces = self.pipeline.encoder.recogniser
        self.perception = (
            RememberingPerception(face, pose, faces, keep=remember)
            if remember
            else Perception(face, pose, faces)
        )

    def run(
        self,
        request: AnimationRequest,
        progress: Progress | None = None,
        *,
        align: bool = True,
        framing: str = "pad",
        size: tuple[int, int] | None = None,
        work: Path | None = None,
        resumable: bool = False,
        replace_work: bool = False,
    ) -> dict[str, Any]:
        """Write `request.output` and the record `NAME.json` beside it; returns the record.

        Both appear complete or not at all. `progress(share, stage)` is called between steps, and
        may raise to stop.

        Args:
            align, framing, size: see `AnimationPipeline.stream`.
            work: a folder for what has been computed after each step. The same request continues
                from there after it was ended, with the same result; it is removed at the end.
            resumable: use `.NAME.work` beside the output for that where the clip has more than
                `LONG` frames; what it holds of another request is removed.
            replace_work: remove what `work` holds of another request, instead of refusing it.

        Raises:
            AnimationError, ValueError: for input that cannot be animated.
        """
        progress = progress or _ignore
        timings, memory = Timings(), PeakMemory()
        size = self.pipeline.frame_size(size)
        with timings.stage("read"):
            progress(0.0, "reading")
            self._check_paths(request)
            image = read_image(request.reference)
            fit(image.shape[:2], size, framing)  # refuses what it cannot do before any work
            info = self.perception.probe(request.driving)
        with timings.stage("perception"):
            progress(0.02, "finding the person")
            face = self.perception.face(request.reference, image, request.reference_face)
            faces = self.perception.faces_in(request.reference, image)
            reference_pose = self.perception.reference(request.reference, image, face)
            progress(0.05, "reading the motion")
            frames = self.perception.frames(request.driving, info)
            driving_pose = self.perception.driving(request.driving, info, frames)
            cuts = self.perception.cuts(request.driving, info)
            models = self.perception.models(reference_pose, driving_pose)
            if align:
                models["alignment"] = self.pipeline.alignment_model
        place = None
        if work is not None or (resumable and len(driving_pose.score) > LONG):
            place = self._work_place(request, work, replace=replace_work or work is None)

        def sampled(done: int, steps: int) -> None:
            progress(READ + (SAMPLED - READ) * done / steps, f"step {done}/{steps}")

        stream = self.pipeline.stream(
            image,
            reference_pose,
            driving_pose,
            fps=info.fps,
            face=face,
            faces=faces,
            framing=framing,
            align=align,
            size=size,
            seed=request.seed,
            settings=self.settings.with_choices(steps=request.steps, guidance=request.guidance),
            on_step=sampled,
            on_work=sampled,
            work=place,
            timings=timings,
        )
        try:
            progress(SAMPLED, "writing")
            meters = self._meters(stream, image, face)
            with making(request.output) as folder:
                staged = folder / "video.mp4"
                encoded = self._write(staged, request, info, stream, meters, timings, progress)
                record = self._record(request, info, cuts, stream, meters, face, models)
                if encoded.audio_note:
                    record["warnings"].append(encoded.audio_note)
                record["timings"], record["memory"] = timings.record(), memory.record()
                if self._signer is not None:
                    title = f"{request.reference.name} moved by {request.driving.name}"
                    self._signer.sign(staged, record["models"], title)
                self._publish(request.output, staged, record)
            stream.states.remove()
        finally:
            stream.states.close()
        return record

    def _check_paths(self, request: AnimationRequest) -> None:
        if request.output.suffix.lower() != ".mp4":
            raise AnimationError(
                f"{request.output}: the output is an H.264 video, so its name must end in .mp4."
            )
        check_inputs(request.reference, request.driving)
        inputs = {path.resolve() for path in (request.reference, request.driving)}
        for path in (request.output, request.output.with_suffix(".json")):
            if path.resolve() in inputs:
                raise AnimationError(f"{path}: would be written over an input; give another name.")
            if path.is_dir():
                raise AnimationError(f"{path}: is a folder; give another name.")
        folder = request.output.absolute().parent
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise AnimationError(
                f"{folder}: nothing can be written there"
                f"{'' if there.is_dir() else f', as {there} is a file'}; give another folder."
            )

    def _work_place(
        self, request: AnimationRequest, work: Path | None, *, replace: bool
    ) -> WorkPlace:
        """The folder that was asked for, or one beside the output; model and inputs by content."""
        if self._model_fingerprint is None:
            self._model_fingerprint = model_fingerprint(self.model_dir)
        files = [request.reference, request.driving]
        files += [p for path in files if (p := FilePoseBackend.find(path)) is not None]
        found = [sha256_file(path) for path in files]
        seen_by = [self.perception.faces.name, self.perception.poses.name, request.reference_face]
        return WorkPlace(
            work or request.output.with_name(f".{request.output.stem}.work"),
            self._model_fingerprint,
            inputs=json.dumps([found, seen_by, self.pipeline.alignment_model]),
            replace=replace,
        )

    def _meters(
        self, stream: AnimationStream, image: np.ndarray, face: Face | None
    ) -> tuple[SeamMeter, IdentityMeter | None]:
        """What watches the frames for seams and drift, and for who they show."""
        encoder, poses = self.pipeline.encoder, stream.poses
        windows = [w.frames for w in stream.plan(stream.settings.sampling.steps - 1)]
        motion = pose_motion(poses.keypoints, poses.score, poses.threshold)
        seams = SeamMeter(windows, stream.decoded_spans(), motion=motion)
        if face is None:
            return seams, None
        reference = encoder.face_embedding(image, face).numpy()

        def identify(frame: np.ndarray) -> list[np.ndarray]:
            faces = self.perception.faces.detect(frame)
            return [encoder.face_embedding(frame, one).numpy() for one in faces]

        return seams, IdentityMeter(
            len(stream),
            windows,
            identify,
            reference,
            measured_by=encoder.models["face_embedding"]["name"],
            recognises=encoder.recogniser is not None,
        )

    def _write(
        self,
        staged: Path,
        request: AnimationRequest,
        info: VideoInfo,
        stream: AnimationStream,
        meters: Sequence[SeamMeter | IdentityMeter | None],
        timings: Timings,
        progress: Progress,
    ) -> EncodeResult:
        """Decode and encode into `staged`, a few frames in memory at a time."""

        def shown(frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
            for number, frame in enumerate(frames):
                with timings.stage("measuring"):
                    for meter in filter(None, meters):
                        meter.add(frame)
                yield frame
                progress(SAMPLED + (1 - SAMPLED) * (number + 1) / len(stream), "writing")

        with timings.stage("encoding"):
            frames = shown(timings.each("decoding", stream.frames()))
            sound = request.driving if info.has_audio else None
            frames = watermarked(frames, stream.settings.provenance.watermark)
            return encode(staged, frames, fps=info.fps, audio_from=sound, metadata=file_metadata())

    @staticmethod
    def _publish(output: Path, staged: Path, record: dict[str, Any]) -> None:
        record["file"] = {"bytes": staged.stat().st_size, "sha256": sha256_file(staged)}
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        write_atomic(output.with_suffix(".json"), text.encode())
        os.replace(staged, output)  # last: a video that is there has its own record

    def _record(
        self,
        request: AnimationRequest,
        info: VideoInfo,
        cuts: Sequence[float],
        stream: AnimationStream,
        meters: tuple[SeamMeter, IdentityMeter | None],
        face: Face | None,
        models: dict[str, Any],
    ) -> dict[str, Any]:
        """The record, but for what is known only when all is done."""
        seams, identity = meters
        licence = self.pipeline.about.get("licence", "that of its training data")
        dtype = str(self.pipeline.animator.dtype).removeprefix("torch.")
        warnings = [*self.pipeline.encoder.warnings, *run_warnings(stream, face, cuts)]
        record = {
            **describe_run(request, info, cuts, stream, dtype),
            **describe_preset(self.preset, self._preset_settings, stream.settings),
            **describe_face(face, request.reference_face),
            "models": {
                "animator": {"name": self.model_dir.name, "licence": licence},
                **self.pipeline.encoder.models,
                **models,
            },
            "seams": seams.record(),
            "warnings": warnings + seams.warnings(),
        }
        if stream.states.continued_from:
            record["continued_from_step"] = stream.states.continued_from
        if identity is not None:
            record["face_identity"] = identity.record()
            record["warnings"] += identity.warnings()
        if stream.faces is not None:
            record["face_optimization"] = stream.faces.record()
        return record
