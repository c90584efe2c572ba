"""train: the alignment block and the animator, each from a recipe; runs watched and exported."""

from pathlib import Path
from typing import Annotated

import typer

from infra.console import emit
from infra.verbs.options import AsJson, Settings

Recipe = Annotated[str, typer.Option(help="Name of a recipe, a complete set of settings.")]
Shards = Annotated[
    Path | None, typer.Option("--shards", "--data", help="Folder of shards to train on.")
]
Motion = Annotated[
    Path | None, typer.Option(help="Folder of motion capture to train on: NAME.npz with joints.")
]
Out = Annotated[Path, typer.Option(help="Folder of the run; an interrupted run continues there.")]
RunFolder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the run.")]


def register(app: typer.Typer) -> None:
    """Add these verbs to the command line."""
    train = typer.Typer(no_args_is_help=True, help="Train a model; an interrupted run continues.")
    train.command("alignment")(train_alignment)
    train.command("animator")(train_animator)
    train.command("estimate")(train_estimate)
    train.command("status")(train_status)
    train.command("export")(train_export)
    app.add_typer(train, name="train")


def train_alignment(
    out: Out,
    shards: Shards = None,
    motion: Motion = None,
    recipe: Recipe = "alignment_tiny",
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Train the pose alignment block on the poses of curated clips, or on motion capture.

    Example: animator train alignment --motion motion --recipe alignment_motion
    --out runs/alignment --set optim.lr=3e-4
    """
    _train("alignment", recipe, _data(shards=shards, motion=motion), out, settings, as_json=as_json)


def train_animator(
    out: Out,
    shards: Shards = None,
    recipe: Recipe = "animator_tiny",
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Train the animator: the video UNet with its pose, image and face conditioning.

    Example: animator train animator --shards shards --out runs/animator --set run.num_workers=2
    """
    _train("animator", recipe, _data(shards=shards), out, settings, as_json=as_json)


def train_estimate(
    recipes: Annotated[
        list[str] | None,
        typer.Option("--recipe", help="Name of a recipe; several, or none for all, as a table."),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="Card, such as a100-80gb, h100, h200, l40s, a10g-24gb or rtx4090."),
    ] = None,
    mfu: Annotated[
        float, typer.Option(help="Share of the card's peak that the model gets; an assumption.")
    ] = 0.35,
    clips: Annotated[int | None, typer.Option(help="Clips of the shards, for an epoch.")] = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Say what a run costs before it is started: memory, time, disk. Computed, not measured.

    Example: animator train estimate --recipe animator_512_8gpu --gpu h100 --clips 5000
    """
    from infra.estimate_lines import estimate_lines, estimate_table
    from pipelines.overrides import apply_overrides
    from training.estimate import default_gpu, estimate
    from training.recipes import get_recipe, gpu_recipes

    found = {}
    for name in recipes or gpu_recipes():
        config = apply_overrides(get_recipe(name), settings or [])
        card = gpu or default_gpu(name)
        found[name] = estimate(config, gpu=card, mfu=mfu, clips=clips)
    one = next(iter(found.values())) if len(found) == 1 else None
    if one is None:
        emit(found, as_json=as_json, show=estimate_table)
    else:
        emit(one, as_json=as_json, show=estimate_lines)


def train_status(
    folder: RunFolder,
    page: Annotated[
        Path | None, typer.Option(help="Also write an HTML page with curves and pictures.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a run does, what it has reached and whether it is well.

    Example: animator train status runs/animator --page status.html
    """
    from pipelines.shards import write_atomic
    from training.status import read_status
    from training.status_text import status_lines

    status = read_status(folder.resolve())
    if page is not None:
        from training.status_page import render_page

        if page.suffix.lower() != ".html":
            raise ValueError(f"got {page} for the page, expected a name that ends in .html.")
        write_atomic(page.absolute(), render_page(folder.resolve(), status).encode())
        status = {**status, "page": str(page)}
    emit(
        status,
        as_json=as_json,
        show=lambda r: [*status_lines(r), *([f"Page: {page}"] if page else [])],
    )


def train_export(
    folder: RunFolder,
    out: Annotated[Path, typer.Option(help="Folder to write the model to; new or empty.")],
    at: Annotated[
        str | None,
        typer.Option(help="Samples of the checkpoint, or best; the newest checkpoint otherwise."),
    ] = None,
    half: Annotated[
        bool, typer.Option("--half", help="Half precision (fp16), but for the alignment block.")
    ] = False,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Write the model of a checkpoint as a folder that --model takes, also while it trains.

    Example: animator train export runs/animator --at best --out models/mine --half
    """
    from infra.console import note
    from training.recipes import TASKS
    from training.release import export_checkpoint

    if at is not None and at != "best" and not at.isdigit():
        raise ValueError(f"got --at {at}, expected a number of samples, or best.")
    place = "best" if at == "best" else None if at is None else int(at)
    result = export_checkpoint(
        folder, out, TASKS, at=place, half=half, settings=settings or [], note=note
    )
    emit(
        result,
        as_json=as_json,
        show=lambda r: [
            f"The model after {r['samples_seen']} samples, {r['bytes'] / 1e6:.1f} MB: {r['model']}"
        ],
    )


def _data(**folders: Path | None) -> list[str]:
    """The folders that were given, as settings."""
    return [f"task.{name}={folder}" for name, folder in folders.items() if folder is not None]


def _train(
    kind: str,
    recipe: str,
    data: list[str],
    out: Path,
    settings: list[str] | None,
    *,
    as_json: bool,
) -> None:
    from pipelines.overrides import apply_overrides, to_dict
    from training.launch import train
    from training.recipes import get_recipe

    config = get_recipe(recipe)
    if config.task.name != kind:
        raise ValueError(f"recipe {recipe!r} does not train the {kind}; choose one named {kind}_…")
    summary = train(apply_overrides(config, [*data, *(settings or [])]), out)
    emit(
        to_dict(summary),
        as_json=as_json,
        show=lambda r: [
            f"{r['samples_seen']} samples in {r['steps']} steps, loss {r['loss']:.4g}, "
            f"{r['seconds']:.0f} s",
            f"Model: {r['model']}",
        ],
    )
