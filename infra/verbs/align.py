"""align: whether a clip's motion fits a picture, before a video is computed."""

from pathlib import Path
from typing import Annotated, Any

import typer

from infra.console import emit, note, table
from infra.verbs.options import Alignment, AsJson, Face, Pose


def register(app: typer.Typer) -> None:
    """Add this verb to the command line."""
    app.command()(align)


def align(
    reference: Annotated[Path, typer.Option(help="Picture of the person (JPEG, PNG or WebP).")],
    driving: Annotated[Path, typer.Option(help="Video with the motion.")],
    report: Annotated[Path, typer.Option(help="The HTML page to write.")],
    out: Annotated[
        Path | None, typer.Option(help="Also write the aligned poses, as NAME.pose.npz.")
    ] = None,
    alignment: Alignment = "auto",
    per_frame: Annotated[
        bool, typer.Option("--per-frame", help="A transform for each frame, not one a clip.")
    ] = False,
    max_scale: Annotated[float, typer.Option(help="Scale at most by this factor.")] = 4.0,
    max_rotation: Annotated[float, typer.Option(help="Turn at most by these degrees.")] = 60.0,
    keep_aligned: Annotated[
        bool,
        typer.Option(
            "--keep-aligned/--no-keep-aligned", help="Leave poses that fit already as they are."
        ),
    ] = True,
    reference_face: Annotated[
        int, typer.Option(help="Whom to animate where there are several: 1 is the largest face.")
    ] = 1,
    face: Face = "auto",
    pose: Pose = "auto",
    as_json: AsJson = False,
) -> None:
    """Show how a video's motion would be moved onto the person of a picture.

    Needs no model of the animator. Example: animator align --reference me.jpg --driving dance.mp4
    --report align.html
    """
    from inference.alignment.report import AlignmentReport, report_alignment
    from inference.clip_alignment import AlignmentSettings
    from inference.requests import AnimationOptions
    from infra.progress import stage_bar

    settings = AlignmentSettings(
        per_frame=per_frame,
        max_scale=max_scale,
        max_rotation=max_rotation,
        keep_aligned=keep_aligned,
    )
    plain = AlignmentSettings()
    choices = {
        "--reference": reference.name,
        "--driving": driving.name,
        "--report": report.name,
        "--out": None if out is None else out.name,
        "--alignment": _unless(Path(alignment).name, "auto"),
        "--max-scale": _unless(max_scale, plain.max_scale),
        "--max-rotation": _unless(max_rotation, plain.max_rotation),
        "--reference-face": _unless(reference_face, 1),
        "--face": _unless(face, "auto"),
        "--pose": _unless(pose, "auto"),
    }
    flags = {"--per-frame": per_frame, "--no-keep-aligned": not keep_aligned}
    request = AlignmentReport(
        reference=reference,
        driving=driving,
        report=report,
        out=out,
        # Refuses the numbers that `animate` refuses.
        reference_face=AnimationOptions(reference_face=reference_face).reference_face,
        alignment=alignment,
        face=face,
        pose=pose,
        settings=settings,
        command=_command(choices, [flag for flag, given in flags.items() if given]),
    )
    with stage_bar("align") as progress:
        result = report_alignment(request, progress)
    for warning in result["warnings"]:
        note(f"warning: {warning['text']}")
    for text in result["notes"]:
        note(f"note: {text}")
    emit(result, as_json=as_json, show=lambda r: _lines(r, report))


def _unless(value: object, default: object) -> str | None:
    """As text, unless it need not be said."""
    return None if value == default else f"{value:g}" if isinstance(value, float) else str(value)


def _command(choices: dict[str, str | None], flags: list[str]) -> str:
    """The command line, with the names of files alone: a page may be passed on."""
    import shlex

    given = [part for name, value in choices.items() if value is not None for part in (name, value)]
    return shlex.join(["animator", "align", *given, *flags])


def _lines(result: dict[str, Any], report: Path) -> list[str]:
    rows = [
        (
            name.replace("_", " "),
            f"{person['scale']:.2f}",
            f"{person['degrees']:+.1f}°",
            f"{100 * row['outside']:.0f} %",
            "" if row["off"] is None else f"{100 * row['off']:.1f} %",
        )
        for name, row in result["methods"].items()
        for person in row["people"][:1]
    ]
    return [
        result["verdict"]["text"],
        result["summary"],
        *table(rows, header=("", "scale", "turned", "out of the picture", "off its pose")),
        f"Report: {report}",
    ]
