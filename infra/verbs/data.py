"""curate: from raw video to checked shards of clips."""

from typing import Annotated

import typer

from infra.console import emit, note
from infra.verbs.options import AsJson, OutFolder, Settings
from infra.verbs.shards import totals


def register(app: typer.Typer) -> None:
    """Add this verb to the command line."""
    app.command()(curate)


def curate(
    sources: Annotated[list[str], typer.Argument(help="Folders, videos, globs or .txt lists.")],
    out: OutFolder,
    workers: Annotated[int | None, typer.Option(help="Processes; by default one a CPU.")] = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Filter and annotate videos into shards; a stopped run goes on where it was.

    Example: animator curate videos/ --out shards --set camera.max_percent_per_second=8
    """
    from pipelines.curation.config import CurationConfig
    from pipelines.curation.pipeline import curate as run_curation
    from pipelines.curation.progress import progress_bar
    from pipelines.overrides import apply_overrides, to_dict

    config = apply_overrides(CurationConfig(), settings or [])
    with progress_bar() as progress:
        summary = run_curation(sources, out, config, workers=workers, progress=progress)
    for text in summary.notes:
        note(text)
    emit(
        to_dict(summary),
        as_json=as_json,
        show=lambda s: [*totals(s["totals"]), f"Report: {out / 'report.html'}"],
    )
