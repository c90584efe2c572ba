"""How well a clip's poses fit a picture, as one page and its numbers, before a video is computed.

It sees what `inference.engine` sees and aligns as it does, and needs no animator.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from animator.alignment_weights import AUTO, open_alignment
from animator.keypoints import BODY
from inference.alignment.advice import advise, compare_forms, decide
from inference.alignment.methods import (
    CLOSED_FORM,
    LEARNED,
    MethodResult,
    OwnTransforms,
    compare_methods,
    own_transforms,
    pair_of,
)
from inference.alignment.page import render_page
from inference.alignment.pictures import choose_frames
from inference.clip_alignment import AlignmentSettings
from inference.perception import (
    AnimationError,
    Perception,
    Pose,
    check_inputs,
    cut_warning,
)
from inference.retarget import Retargeted
from pipelines.images import read_image
from pipelines.pose_file import SUFFIXES
from pipelines.shards import write_atomic
from pipelines.video import VideoInfo

Progress = Callable[[float, str], None]


@dataclass(frozen=True, kw_only=True)
class AlignmentReport:
    """What to align and where to write; `alignment` as `animator.alignment_weights` has it.

    `command` is shown on the page, so that it can be made again.
    """

    reference: Path
    driving: Path
    report: Path
    out: Path | None = None
    reference_face: int = 1
    alignment: str = AUTO
    face: str = "auto"
    pose: str = "auto"
    settings: AlignmentSettings = field(default_factory=AlignmentSettings)
    command: str = ""


def report_alignment(request: AlignmentReport, progress: Progress | None = None) -> dict[str, Any]:
    """Write the page and, where asked, the aligned poses; returns the page's numbers.

    Both files appear complete or not at all.

    Raises:
        AnimationError, ValueError: for input that cannot be aligned, before any work where it can
            be known.
    """
    say = progress or (lambda share, stage: None)
    _check(request)
    say(0.0, "reading")
    image = read_image(request.reference)
    info = Perception.probe(request.driving)
    block, about = open_alignment(request.alignment)
    perception = Perception(request.face, request.pose)
    say(0.05, "finding the person")
    face = perception.face(request.reference, image, request.reference_face)
    reference = perception.reference(request.reference, image, face)
    say(0.1, "reading the motion")
    frames = perception.frames(request.driving, info)
    say(0.2, "finding the poses")
    driving = perception.driving(request.driving, info, frames)
    cuts = perception.cuts(request.driving, info)
    say(0.8, "aligning")
    methods = compare_methods(block, reference, driving, request.settings)
    used = [*methods][-1]
    moved = methods[used].moved
    own = [
        own_transforms(block, pair_of(reference, driving, person), reference.size)
        for person in moved.people
    ]
    notes = _notes(
        methods,
        _people(driving.score, driving.threshold),
        has_face=face is not None,
        others=request.settings.others,
    )
    about_both = _about(request, reference, driving, info, len(frames), cuts)
    score = moved.drawn(driving.score, driving.threshold, others=request.settings.others)
    driving = replace(driving, score=score)
    shown = _shown(moved, driving)
    warnings = [*([cut_warning(cuts)] if cuts else []), *moved.warnings]
    result = {
        **about_both,
        "verdict": decide(moved.people)._asdict(),
        "used": used,
        "summary": moved.describe(),
        "alignment": moved.record(),
        "warnings": [{"text": text, "advice": advise(text)} for text in warnings],
        "notes": notes,
        "people": [
            {**person.record(), "frames_own": _numbers(transforms)}
            for person, transforms in zip(moved.people, own, strict=True)
        ],
        "methods": {name: _row(result) for name, result in methods.items()},
        "shown": [
            {"frame": index, "seconds": round(index / info.fps, 3), "why": why}
            for index, why in shown
        ],
        "models": {**perception.models(reference, driving), "alignment": about},
    }
    say(0.85, "drawing")
    page = render_page(result, (image, reference), (frames, driving), methods, own)
    say(0.98, "writing")
    write_atomic(request.report, page.encode())
    if request.out is not None:
        write_atomic(request.out, _keypoints_file(moved, driving, info.fps))
    return result


def _check(request: AlignmentReport) -> None:
    """Everything that can be refused before any work."""
    check_inputs(request.reference, request.driving)
    wanted = [(request.report, ".html", "the page")]
    if request.out is not None:
        wanted.append((request.out, SUFFIXES[0], "the file of keypoints"))
    for path, ending, what in wanted:
        if not path.name.lower().endswith(ending):
            raise AnimationError(f"{path}: the name of {what} must end in {ending}.")
        if not path.absolute().parent.is_dir():
            raise AnimationError(f"{path} cannot be written: make the folder {path.parent} first.")
        if path.is_dir():
            raise AnimationError(f"{path} is a folder: give {what} another name.")
    beside = [
        source.with_name(source.stem + suffix)
        for source in (request.reference, request.driving)
        for suffix in SUFFIXES
    ]
    if request.out is not None and request.out.resolve() in [path.resolve() for path in beside]:
        raise AnimationError(
            f"{request.out} would be written over the keypoints of an input: give --out another "
            "name."
        )


def _shown(moved: Retargeted, driving: Pose) -> list[tuple[int, list[str]]]:
    who = moved.main.driving
    seen = driving.score[:, who, BODY] >= driving.threshold
    return choose_frames(moved.keypoints[:, who, BODY], seen, moved.main.most_alike)


def _about(
    request: AlignmentReport,
    reference: Pose,
    driving: Pose,
    info: VideoInfo,
    num_frames: int,
    cuts: Sequence[float],
) -> dict[str, Any]:
    """What was given, by its names."""
    return {
        "reference": {
            "name": request.reference.name,
            "height": reference.size[0],
            "width": reference.size[1],
            "people": _people(reference.score[None], reference.threshold),
            "keypoints": reference.score.shape[-1],
        },
        "driving": {
            "name": request.driving.name,
            "height": info.height,
            "width": info.width,
            "frames": num_frames,
            "fps": round(info.fps, 4),
            "seconds": round(num_frames / info.fps, 3),
            "cuts": list(cuts),
            "people": _people(driving.score, driving.threshold),
            "keypoints": driving.score.shape[-1],
        },
        "reference_face": request.reference_face,
        "settings": asdict(request.settings),
        "command": request.command,
    }


def _people(score: np.ndarray, threshold: float) -> int:
    """How many people have a joint that is seen, of a score `(T, P, K)`."""
    return int((score[..., BODY] >= threshold).any((0, 2)).sum())


def _notes(
    methods: dict[str, MethodResult], num_driving: int, *, has_face: bool, others: bool
) -> list[str]:
    used = [*methods][-1]
    people = methods[used].moved.people
    notes = []
    for number, person in enumerate(people, 1):
        said = (*person.warnings, methods[used].moved.describe())
        texts = [text for text in person.notes if text not in said]
        if used == LEARNED:
            other = methods[CLOSED_FORM].moved.people[number - 1]
            texts += filter(None, [compare_forms(person, other)])
        notes += [f"person {number}: {text}" if len(people) > 1 else text for text in texts]
    if num_driving > len(people):
        notes.append(
            f"the clip shows {num_driving} people, of whom {len(people)} "
            f"{'has' if len(people) == 1 else 'have'} a partner in the picture: the others are "
            + (
                "drawn too, and go along with the main one"
                if others
                else "left out (`animate --set alignment.others=true` draws them too)"
            )
        )
    if not has_face:
        notes.append(
            "no face was found in the picture: its largest person counts as the main one, and a "
            "video would not be guided by who it is"
        )
    return notes


def _row(result: MethodResult) -> dict[str, Any]:
    """One method in the table: its transform of every person, and its measures."""
    people = [
        {
            "person": number,
            "method": person.method,
            "scale": round(person.scale, 5),
            "degrees": round(person.degrees, 4),
            "shift": [round(value, 5) for value in person.shift],
        }
        for number, person in enumerate(result.moved.people, 1)
    ]
    measures = {
        "outside": result.outside,
        "jitter": result.jitter,
        "jitter_per_frame": result.jitter_per_frame,
        "off": result.off,
    }
    return {
        "people": people,
        **{k: None if value is None else round(value, 5) for k, value in measures.items()},
    }


def _numbers(own: OwnTransforms) -> dict[str, Any]:
    """The curves' values; None where a frame says nothing."""
    values = {"scale": own.scale, "degrees": own.degrees, "x": own.place[:, 0]}
    values["y"] = own.place[:, 1]
    return {
        **{
            name: [round(float(v), 4) if np.isfinite(v) else None for v in array]
            for name, array in values.items()
        },
        "used": own.used.tolist(),
    }


def _keypoints_file(moved: Retargeted, driving: Pose, fps: float) -> bytes:
    """Aligned poses as `pipelines.pose_file` reads them, in 0..1 of the reference's frame."""
    buffer = io.BytesIO()
    keypoints, score = moved.keypoints.astype(np.float32), driving.score.astype(np.float32)
    np.savez_compressed(
        buffer, keypoints=keypoints, score=score, fps=fps, threshold=driving.threshold
    )
    return buffer.getvalue()
