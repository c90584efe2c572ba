"""The record beside a video: what it was made from, by what, how, and what to think of it."""

from collections.abc import Sequence
from typing import Any

from inference.clip_stream import AnimationStream
from inference.perception import cut_warning
from inference.presets import Preset
from inference.requests import AnimationRequest
from inference.settings import AnimationSettings
from pipelines.faces import Face
from pipelines.overrides import differences, to_dict
from pipelines.video import VideoInfo

NOBODY = 0.1  # share of a clip's frames that may show nobody without being said


def describe_run(
    request: AnimationRequest,
    info: VideoInfo,
    cuts: Sequence[float],
    stream: AnimationStream,
    dtype: str,
) -> dict[str, Any]:
    """Inputs, shape, alignment and sampling; names of files alone, never their folders."""
    height, width = stream.size
    settings = stream.settings
    return {
        "reference": request.reference.name,
        "driving": request.driving.name,
        "video": {
            "frames": len(stream),
            "height": height,
            "width": width,
            "fps": round(info.fps, 4),
            "sound": info.has_audio,
            "cuts": list(cuts),
        },
        "alignment": {**stream.alignment.record(), "summary": stream.alignment.describe()},
        "sampling": {
            "seed": request.seed,
            "dtype": dtype,
            **to_dict(settings.sampling),
            "guidance": to_dict(settings.guidance),
            "windows": to_dict(settings.windows),
        },
        "alignment_settings": to_dict(settings.alignment),
        "speed": to_dict(settings.speed),
        "provenance": settings.provenance.record(),
    }


def describe_preset(
    preset: Preset | None, own: AnimationSettings, used: AnimationSettings
) -> dict[str, Any]:
    """The preset, its limits, and what was set otherwise: for that the limits say nothing.

    Without a preset `changed` alone, of the model's own settings. Paths of keys stay out of it.
    """
    changed = differences(_shareable(own), _shareable(used))
    return {"preset": {**preset.record(), "changed": changed}} if preset else {"changed": changed}


def _shareable(settings: AnimationSettings) -> dict[str, Any]:
    return {**to_dict(settings), "provenance": settings.provenance.record()}


def describe_face(face: Face | None, chosen: int) -> dict[str, Any]:
    """Which face of the picture is animated, and where it is, xyxy in 0..1."""
    if face is None:
        return {}
    return {"face": {"chosen": chosen, "box": [round(float(side), 4) for side in face.box]}}


def run_warnings(stream: AnimationStream, face: Face | None, cuts: Sequence[float]) -> list[str]:
    """What speaks against the result before a frame of it is looked at.

    `cuts` are the seconds at which a new shot of the driving clip begins.
    """
    warnings = [f"{cut_warning(cuts)}; animate each shot by itself"] if cuts else []
    if face is None:
        warnings.append("no face was found in the reference: its identity is not guided")
    else:
        warnings += [
            f"person {number} of the picture (from left to right) has no face that was found: "
            "its identity is not guided; give a picture that shows the face, or animate fewer "
            "people"
            for number in stream.faceless
        ]
        if stream.no_faces:
            warnings.append(f"faces are not optimised: {stream.no_faces}")
    poses = stream.poses
    nobody = int((~(poses.score >= poses.threshold).any((1, 2))).sum())
    if nobody > NOBODY * len(poses.score):
        warnings.append(
            f"nobody is seen in {nobody} of the clip's {len(poses.score)} frames: cut it to where "
            "the person is"
        )
    return warnings + [f"alignment: {text}" for text in stream.alignment.warnings]
