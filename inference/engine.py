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

from inference.perception import AnimationError, Perception, check_inputs
from inference.perception_cache import RememberingPerception
from inference.pipeline import AnimationPipeline, AnimationResult
from inference.requests import AnimationRequest
from pipelines.faces import Face
from pipelines.framing import fit
from pipelines.images import read_image
from pipelines.overrides import apply_overrides, to_dict
from pipelines.shards import sha256_file, write_atomic
from pipelines.video import VideoInfo, encode

Progress = Callable[[float, str], None]
# Shares of the progress bar: reading and perception, sampling, writing.
READ, SAMPLED = 0.15, 0.95


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
        alignment: which alignment block (see `animator.alignment_weights.open_alignment`).
        dtype: of the weights (see `AnimationPipeline.from_pretrained`).
        changes: of the model's own settings of sampling, guidance and alignment, as
            "sampling.churn=40".
        remember: how many answers of perception are kept for requests that share a picture or a
            clip; none by default.

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
    ):
        self.model_dir = Path(model_dir)
        self.pipeline = AnimationPipeline.from_pretrained(
            self.model_dir, face=face, alignment=alignment, dtype=dtype
        )
        self.settings = apply_overrides(self.pipeline.settings, changes)
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
            info = self.perception.probe(request.driving)
        with timings.stage("perception"):
            progress(0.02, "finding the person")
            face = self.perception.face(request.reference, image, request.reference_face)
            reference_pose = self.perception.reference(request.reference, image, face)
            progress(0.05, "reading the motion")
            frames = self.perception.frames(request.driving, info)
            driving_pose = self.perception.driving(request.driving, info, frames)
            del frames  # before sampling needs the memory
            models = self.perception.models(reference_pose, driving_pose)
            if align:
                models["alignment"] = self.pipeline.alignment_model
        with timings.stage("sampling"):
            result = self.pipeline(
                image,
                reference_pose,
                driving_pose,
                fps=info.fps,
                face=face,
                framing=framing,
                align=align,
                size=size,
                seed=request.seed,
                settings=self.settings.with_choices(steps=request.steps, guidance=request.guidance),
                on_step=lambda done, steps: progress(
                    READ + (SAMPLED - READ) * done / steps, f"step {done}/{steps}"
                ),
            )
        progress(SAMPLED, "writing")
        return self._write(request, info, result, face, models, timings)

    def _check_paths(self, request: AnimationRequest) -> None:
        if request.output.suffix.lower() != ".mp4":
            raise AnimationError(
                f"{request.output}: the output is an H.264 video, so its name must end in .mp4."
            )
        check_inputs(request.reference, request.driving)

    def _write(
        self,
        request: AnimationRequest,
        info: VideoInfo,
        result: AnimationResult,
        face: Face | None,
        models: dict[str, Any],
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
            warnings += [f"alignment: {text}" for text in result.alignment.warnings]
            record = self._record(request, info, result, models, timings, warnings)
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
        models: dict[str, Any],
        timings: Timings,
        warnings: list[str],
    ) -> dict[str, Any]:
        num_frames, height, width = result.frames.shape[:3]
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
                **models,
            },
            "timings": timings.record(),
            "warnings": warnings,
        }
