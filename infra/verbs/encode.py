"""encode: latents, image tokens and face embeddings of curated clips, computed once."""

from pathlib import Path
from typing import Annotated, Any

import typer

from infra.console import emit, note
from infra.verbs.options import AsJson, OutFolder

Shards = Annotated[Path, typer.Argument(help="Folder of shards that `animator curate` wrote.")]
ModelFolder = Annotated[
    Path | None,
    typer.Option(
        "--model",
        help="Folder of a model, or of Stable Video Diffusion; without it, the tiny preset.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add these verbs to the command line."""
    app.command()(encode)


def encode(
    shards: Shards,
    out: OutFolder,
    model: ModelFolder = None,
    latents: Annotated[bool, typer.Option(help="Latents of every frame.")] = True,
    image_tokens: Annotated[
        bool, typer.Option("--image-tokens", help="Image tokens of sampled frames.")
    ] = False,
    faces: Annotated[
        bool,
        typer.Option(
            "--faces", help="Face embeddings of sampled frames: personal data, so only if asked."
        ),
    ] = False,
    size: Annotated[
        str, typer.Option(help="HEIGHTxWIDTH, model (its own) or native (each clip's shape).")
    ] = "model",
    fit: Annotated[str, typer.Option(help="How other shapes are fitted: pad or crop.")] = "pad",
    samples_per_second: Annotated[
        float, typer.Option(help="Frames a second that get image tokens and face embeddings.")
    ] = 2.0,
    face: Annotated[
        str, typer.Option(help="Face pack: auto, insightface or insightface:NAME.")
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help="Type of the weights: auto, fp32, bf16 or fp16.")
    ] = "auto",
    workers: Annotated[
        int | None, typer.Option(help="Processes; by default one a CPU, or four a GPU.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Encode at most so many shards now.")] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Encode shards with failed clips once more.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done, and its size.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Encode clips into shards of latents; a stopped run goes on where it was.

    Example: animator encode shards --out latents --model models/animator --image-tokens
    """
    from pipelines.encode.config import EncodeConfig
    from pipelines.encode.progress import progress_bar
    from pipelines.encode.run import encode as run_encoding
    from pipelines.overrides import from_dict, to_dict

    settings = {
        "latents": latents,
        "image_tokens": image_tokens,
        "faces": faces,
        "size": size,
        "fit": fit,
        "samples_per_second": samples_per_second,
        "face": face,
        "dtype": dtype,
    }
    config = from_dict(EncodeConfig, settings)
    with progress_bar() as progress:
        summary = run_encoding(
            shards,
            out,
            config,
            model=model,
            workers=workers,
            limit=limit,
            retry_failed=retry_failed,
            dry_run=dry_run,
            progress=progress,
        )
    if summary.shards_changed:
        note(f"{summary.shards_changed} shards were encoded before from other clips than now.")
    for text in summary.notes:
        note(text)
    emit(to_dict(summary), as_json=as_json, show=_lines)


def _lines(summary: dict[str, Any]) -> list[str]:
    estimate, totals = summary["estimate"], summary["totals"]
    lines = [
        f"{name}: {model['name']} ({model['licence']})" for name, model in summary["models"].items()
    ]
    if summary["dry_run"]:
        return [
            *lines,
            f"{summary['shards_todo']} shards to encode: {estimate['clips']} clips, "
            f"{estimate['frames']} frames, {estimate['seconds']:.1f} s of video, "
            f"{estimate['latent_bytes'] / 1e6:.1f} MB of latents at {summary['settings']['size']}",
            f"{summary['shards_resumed']} are done, {summary['shards_left']} would be left.",
        ]
    speed = f", {summary['frames_per_second']:.0f} frames/s" if summary["shards_done"] else ""
    lines += [
        f"{summary['shards_done']} shards encoded, {summary['shards_resumed']} were done before, "
        f"{summary['shards_left']} left{speed}",
        f"{summary['out']} holds {totals['clips']} clips, {totals['frames']} frames, "
        f"{totals['bytes'] / 1e6:.1f} MB in {totals['shards']} shards; {totals['failed']} clips "
        "failed",
    ]
    if summary["shares"]:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in summary["shares"].items())
        lines.append(f"time: {shares}")
    return lines + [f"failed: {key}: {error}" for key, error in summary["failures"].items()]
