"""animate, batch, serve: one video, a list of them, or a server."""

from pathlib import Path
from typing import Annotated

import typer

from infra.console import FAILED, emit
from infra.verbs.options import (
    Align,
    Alignment,
    AsJson,
    Dtype,
    Face,
    Framing,
    MaxRotation,
    MaxScale,
    Model,
    OutFolder,
    PerFrame,
    Pose,
    Preset,
    Settings,
    Size,
)


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
    size: Size = None,
    dtype: Dtype = "auto",
    preset: Preset = None,
    changes: Settings = None,
    align: Align = True,
    alignment: Alignment = "auto",
    per_frame: PerFrame = False,
    max_scale: MaxScale = None,
    max_rotation: MaxRotation = None,
    framing: Framing = "pad",
    work: Annotated[
        Path | None,
        typer.Option(help="Folder to continue an ended run from; removed when the video is done."),
    ] = None,
    face: Face = "auto",
    pose: Pose = "auto",
    as_json: AsJson = False,
) -> None:
    """Animate the person in a picture by the motion in a video.

    --preset trades quality for time or memory, within limits that the record states. --set changes
    the model's own settings, or the preset's: --set sampling.solver=heun --set
    guidance.sigma_max=80. `animator align` shows the alignment before anything is computed.

    A run of more than 64 frames that was ended continues when the same command is given again:
    until the video is done its state is kept in .NAME.work beside it, or in --work.

    Example: animator animate --model runs/animator/model --reference me.jpg --driving dance.mp4
    --out me.mp4
    """
    from inference.engine import AnimationEngine
    from inference.requests import AnimationRequest, parse_size
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
    frame_size = None if size is None else parse_size(size, "--size")
    with stage_bar("animate") as progress:
        engine = AnimationEngine(
            model,
            face=face,
            pose=pose,
            alignment=alignment,
            dtype=dtype,
            preset=preset,
            changes=_changes(changes, per_frame, max_scale, max_rotation),
        )
        record = engine.run(
            request,
            progress,
            align=align,
            framing=framing,
            size=frame_size,
            work=work,
            resumable=True,
        )
    emit(record, as_json=as_json, show=lambda r: _animation_lines(r, out))


def batch(
    manifest: Annotated[Path, typer.Argument(help="JSONL; a line has reference and driving.")],
    out: OutFolder,
    model: Model,
    engines: Annotated[
        int | None,
        typer.Option(
            help="Engines at work at the same time; one, and on a cluster as many as there are "
            "GPUs, without."
        ),
    ] = None,
    cpus: Annotated[int | None, typer.Option(help="CPUs of each engine.")] = None,
    size: Size = None,
    dtype: Dtype = "auto",
    preset: Preset = None,
    changes: Settings = None,
    align: Align = True,
    alignment: Alignment = "auto",
    per_frame: PerFrame = False,
    max_scale: MaxScale = None,
    max_rotation: MaxRotation = None,
    framing: Framing = "pad",
    face: Face = "auto",
    pose: Pose = "auto",
    as_json: AsJson = False,
) -> None:
    """Animate every line of a manifest; done lines are not done again.

    A line is {"reference": …, "driving": …}, with "output", "seed", "steps", "guidance",
    "reference_face", "size", "framing" and "id" where wanted. The other options are animate's own
    and hold for all lines.

    Exit code 1 if a line failed. Example: animator batch jobs.jsonl --model runs/animator/model
    --out results
    """
    from inference.batch.run import BatchConfig, animate_batch
    from inference.requests import parse_size

    config = BatchConfig(
        manifest=manifest,
        out=out,
        model_dir=model,
        engines=engines,
        cpus_per_engine=cpus,
        face=face,
        pose=pose,
        alignment=alignment,
        align=align,
        dtype=dtype,
        preset=preset,
        changes=tuple(_changes(changes, per_frame, max_scale, max_rotation)),
        size=None if size is None else parse_size(size, "--size"),
        framing=framing,
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
    preset: Preset = None,
    changes: Settings = None,
    face: Face = "auto",
    pose: Pose = "auto",
    alignment: Alignment = "auto",
) -> None:
    """Serve an HTTP interface that queues animation jobs; /docs describes it.

    --preset and --set hold for all jobs, as those of `animator animate` do for one; a job's own
    steps and guidance come after them. Other machines reach it with --host 0.0.0.0 and a key in
    ANIMATOR_API_KEY.

    Example: animator serve --model runs/animator/model --port 8000 --preset fast --set
    provenance.watermark=AI-generated
    """
    from inference.serving.serve import ServerConfig
    from inference.serving.serve import serve as run_server

    run_server(
        ServerConfig(
            model_dir=model,
            data_dir=data,
            host=host,
            port=port,
            engines=engines,
            preset=preset,
            changes=tuple(changes or ()),
            face=face,
            pose=pose,
            alignment=alignment,
        )
    )


def _changes(
    given: list[str] | None, per_frame: bool, max_scale: float | None, max_rotation: float | None
) -> list[str]:
    """Changes of a model's settings, those with an option of their own last."""
    limits = {"max_scale": max_scale, "max_rotation": max_rotation}
    named = [f"alignment.{name}={value}" for name, value in limits.items() if value is not None]
    return [*(given or ()), *named, *(["alignment.per_frame=true"] if per_frame else [])]


def _batch_lines(summary: dict, out: Path) -> list[str]:
    counts = ", ".join(f"{summary[name]} {name}" for name in ("done", "skipped", "failed"))
    if summary["done"]:
        speed = summary["items_per_hour"]
        counts += f"; {speed:.{0 if speed >= 10 else 1}f} items/h on {summary['engines']} engine(s)"
    reused = summary["reused"]
    return [
        counts,
        f"seen before and not looked at again: {reused['driving']} clips, "
        f"{reused['reference']} pictures",
        f"Results in {out}",
    ]


def _animation_lines(record: dict, out: Path) -> list[str]:
    video, seconds = record["video"], sum(record["timings"].values())
    return [
        *(f"warning: {text}" for text in record["warnings"]),
        record["alignment"]["summary"],
        f"{out}: {video['frames']} frames of {video['width']}x{video['height']}, {seconds:.1f} s",
    ]
