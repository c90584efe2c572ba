"""animate, batch, serve: one video, a list of them, or a server."""

from pathlib import Path
from typing import Annotated

import typer

from infra.console import FAILED, emit
from infra.verbs.options import Alignment, AsJson, Face, Model, OutFolder, Pose, Settings


def register(app: typer.Typer) -> None:
    """Add these verbs to the command line."""
    app.command()(animate)
    app.command()(batch)
    app.command()(serve)


def animate(
    reference: Annotated[Path, typer.Option(help="Picture of the person (JPEG, PNG or WebP).")],
    driving: Annotated[Path, typer.Option(help="Video with the motion.")],
    out: Annotated[Path, typer.Option(help="The mp4 to write; its record goes beside it.")],
    model: Model,
    seed: Annotated[int, typer.Option(help="Chooses the noise; the same seed repeats.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Sampling steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Strength of guidance, 1 = none.")] = None,
    reference_face: Annotated[
        int, typer.Option(help="Whom to animate where there are several: 1 is the largest face.")
    ] = 1,
    size: Annotated[
        str | None, typer.Option(help="Height and width to work at, as 1024x576.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Type of weights: auto, fp32, bf16 or fp16.")] = "auto",
    changes: Settings = None,
    align: Annotated[
        bool, typer.Option("--align/--no-align", help="Move the motion to where the person is.")
    ] = True,
    alignment: Alignment = "auto",
    per_frame: Annotated[
        bool, typer.Option("--per-frame", help="Align each frame by itself, not the whole clip.")
    ] = False,
    max_scale: Annotated[
        float | None, typer.Option(help="Scale the motion at most by this factor.")
    ] = None,
    max_rotation: Annotated[
        float | None, typer.Option(help="Turn the motion at most by these degrees.")
    ] = None,
    framing: Annotated[str, typer.Option(help="Fit the picture by pad or by crop.")] = "pad",
    face: Face = "auto",
    pose: Pose = "auto",
    as_json: AsJson = False,
) -> None:
    """Animate the person in a picture by the motion in a video.

    --set changes the model's own sampler and guidance: --set sampling.solver=heun --set
    guidance.sigma_max=80. `animator align` shows the alignment before anything is computed.

    Example: animator animate --model runs/animator/model --reference me.jpg --driving dance.mp4
    --out me.mp4
    """
    from inference.engine import AnimationEngine
    from inference.requests import AnimationRequest
    from infra.progress import stage_bar

    request = AnimationRequest(
        reference=reference,
        driving=driving,
        output=out,
        seed=seed,
        steps=steps,
        guidance=guidance,
        reference_face=reference_face,
    )
    frame_size = _size(size)
    given = {"max_scale": max_scale, "max_rotation": max_rotation}
    aligned = [f"alignment.{name}={value}" for name, value in given.items() if value is not None]
    if per_frame:
        aligned.append("alignment.per_frame=true")
    with stage_bar("animate") as progress:
        engine = AnimationEngine(
            model,
            face=face,
            pose=pose,
            alignment=alignment,
            dtype=dtype,
            changes=[*(changes or ()), *aligned],
        )
        record = engine.run(request, progress, align=align, framing=framing, size=frame_size)
    emit(record, as_json=as_json, show=lambda r: _animation_lines(r, out))


def batch(
    manifest: Annotated[Path, typer.Argument(help="JSONL; a line has reference and driving.")],
    out: OutFolder,
    model: Model,
    engines: Annotated[int, typer.Option(help="Engines at work at the same time.")] = 1,
    face: Face = "auto",
    pose: Pose = "auto",
    alignment: Alignment = "auto",
    as_json: AsJson = False,
) -> None:
    """Animate every line of a manifest; done lines are not done again.

    Exit code 1 if a line failed. Example: animator batch jobs.jsonl --model runs/animator/model
    --out results
    """
    from inference.batch import BatchConfig, animate_batch

    config = BatchConfig(
        manifest=manifest,
        out=out,
        model_dir=model,
        engines=engines,
        face=face,
        pose=pose,
        alignment=alignment,
    )
    summary = animate_batch(config)
    emit(summary, as_json=as_json, show=lambda s: _batch_lines(s, out))
    if summary["failed"]:
        raise typer.Exit(FAILED)


def serve(
    model: Model,
    data: Annotated[Path, typer.Option(help="Folder for jobs and results.")] = Path("jobs"),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    engines: Annotated[int, typer.Option(help="Engines at work at the same time.")] = 1,
    face: Face = "auto",
    pose: Pose = "auto",
    alignment: Alignment = "auto",
) -> None:
    """Serve an HTTP interface that queues animation jobs; /docs describes it.

    Other machines reach it with --host 0.0.0.0 and a key in ANIMATOR_API_KEY.
    Example: animator serve --model runs/animator/model --port 8000
    """
    from inference.serve import ServerConfig
    from inference.serve import serve as run_server

    run_server(
        ServerConfig(
            model_dir=model,
            data_dir=data,
            host=host,
            port=port,
            engines=engines,
            face=face,
            pose=pose,
            alignment=alignment,
        )
    )


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise ValueError(f"--size is {text!r}, expected height and width as 1024x576.")
    return int(height), int(width)


def _batch_lines(summary: dict, out: Path) -> list[str]:
    counts = {name: summary[name] for name in ("done", "skipped", "failed") if name in summary}
    return [", ".join(f"{count} {name}" for name, count in counts.items()), f"Results in {out}"]


def _animation_lines(record: dict, out: Path) -> list[str]:
    video, seconds = record["video"], sum(record["timings"].values())
    return [
        *(f"warning: {text}" for text in record["warnings"]),
        record["alignment"]["summary"],
        f"{out}: {video['frames']} frames of {video['width']}x{video['height']}, {seconds:.1f} s",
    ]
