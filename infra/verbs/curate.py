"""curate: from raw video to shards; other thresholds afterwards; the report."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from infra.console import emit, note, table
from infra.verbs.groups import RunGroup
from infra.verbs.options import AsJson, OutFolder, Settings
from infra.verbs.shards import totals

Folder = Annotated[Path, typer.Argument(help="Folder that `animator curate` wrote.")]


def register(app: typer.Typer) -> None:
    """Add these verbs to the command line."""
    curate = typer.Typer(
        cls=RunGroup,
        no_args_is_help=True,
        help="From raw video to checked shards: `animator curate videos/ --out shards`.",
    )
    curate.command("run")(run)
    curate.command("revise")(revise)
    curate.command("report")(report)
    app.add_typer(curate, name="curate")


def run(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Folders, videos, globs, addresses (https://, s3://, gs://), and manifests with a "
            "video a row: .txt, .csv, .tsv, .jsonl, .parquet."
        ),
    ],
    out: OutFolder,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes with models: one a GPU, else one a CPU."),
    ] = None,
    decoders: Annotated[
        int | None,
        typer.Option(help="Processes that decode for each; by default the CPUs that a GPU has."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Take only the first so many sources.")] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Work once more on the sources that failed.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done and what it would cost.")
    ] = False,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Filter and annotate videos into shards; a stopped run goes on where it was.

    The word `run` may be left out. Example: animator curate run videos/ list.csv --out shards
    --set camera.max_percent_per_second=8
    """
    from pipelines.curation.config import CurationConfig
    from pipelines.curation.pipeline import curate as run_curation
    from pipelines.curation.progress import progress_bar
    from pipelines.overrides import apply_overrides, to_dict

    config = apply_overrides(CurationConfig(), settings or [])
    if dry_run:
        _dry_run(
            sources,
            out,
            config,
            limit,
            as_json=as_json,
            workers=workers,
            decoders=decoders,
            retry_failed=retry_failed,
        )
        return
    with progress_bar() as progress:
        summary = run_curation(
            sources,
            out,
            config,
            workers=workers,
            decoders=decoders,
            progress=progress,
            limit=limit,
            retry_failed=retry_failed,
        )
    for text in summary.notes:
        note(text)
    emit(
        to_dict(summary),
        as_json=as_json,
        show=lambda s: [*totals(s["totals"]), f"Report: {out / 'report.html'}"],
    )


def revise(
    folder: Folder,
    settings: Settings = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would change.")] = False,
    as_json: AsJson = False,
) -> None:
    """Judge all clips anew by other thresholds and repack the shards; no video is decoded.

    Example: animator curate revise shards --set faces.min_share=0.5 --set pose.max_missing=0.6
    """
    from pipelines.curation.progress import progress_bar
    from pipelines.curation.revise import revise as run_revision
    from pipelines.overrides import to_dict

    with progress_bar() as progress:
        summary = run_revision(folder, settings or [], dry_run=dry_run, progress=progress)
    emit(to_dict(summary), as_json=as_json, show=_revision_lines)


def report(folder: Folder, as_json: AsJson = False) -> None:
    """Write the page that shows what was kept and why, with pictures; --json gives its figures.

    Example: animator curate report shards
    """
    from pipelines.curation.report import REPORT_FILE, write_report

    content = write_report(folder)
    emit(content, as_json=as_json, show=lambda c: _report_lines(c, folder / REPORT_FILE))


def _dry_run(
    sources: list[str],
    out: Path,
    config: Any,
    limit: int | None,
    *,
    as_json: bool,
    **how: Any,
) -> None:
    from pipelines.curation.estimate import estimate
    from pipelines.curation.plan import make_plan
    from pipelines.curation.sources import read_sources
    from pipelines.overrides import to_dict

    plan = make_plan(read_sources(sources, limit=limit), config)
    found = to_dict(estimate(plan, out, **how))
    emit(found, as_json=as_json, show=_estimate_lines)


def _estimate_lines(found: dict[str, Any]) -> Iterator[str]:
    places = ", ".join(f"{count} {place}" for place, count in found["places"].items())
    yield f"{found['sources']} sources ({places})"
    yield (
        f"{found['shards']} shards of {found['sources_per_shard']}, {found['shards_done']} done; "
        f"{found['sources_left']} sources left"
    )
    hours, size, disk = (found[name] for name in ("video_hours", "source_bytes", "disk_bytes"))
    yield f"video: {_amount(hours, 'hours')}, {_amount(size and size / 1e9, 'GB')}"
    yield (
        f"work left: {_amount(found['cpu_hours'], 'hours of one worker')}, "
        f"{_amount(found['wall_hours'], 'hours')} with {found['workers']} workers"
    )
    yield f"disk: {_amount(disk and disk / 1e9, 'GB')} when finished"
    yield from (f"note: {text}" for text in found["notes"])


def _amount(value: float | None, unit: str) -> str:
    return f"unknown {unit}" if value is None else f"{value:.3g} {unit}"


def _revision_lines(found: dict[str, Any]) -> Iterator[str]:
    yield from found["changes"] or ("nothing changes",)
    before, after = found["reasons_before"], found["reasons_after"]
    rows = [("kept", found["clips_before"], found["clips_after"])]
    rows += [
        (reason, before.get(reason, 0), after.get(reason, 0))
        for reason in dict.fromkeys([*before, *after])
    ]
    yield from table(rows, header=("clips", "before", "after"))
    for name in found["damaged"]:
        yield f"{name} is damaged and was taken out"
    if found["not_stored"]:
        yield f"{found['not_stored']} clips would be kept, but were never stored"
    if found["shards_left_out"]:
        yield f"{found['shards_left_out']} shards are not there yet"
    if found["command"]:
        yield f"this makes what is missing, and nothing else:\n  {found['command']}"


def _report_lines(content: dict[str, Any], page: Path) -> Iterator[str]:
    yield from totals(content["summary"])
    rows = [
        (row["stage"], f"{row['seconds']:.1f} s", f"{row['share']:.0%}")
        for row in content["timings"]["stages"]
    ]
    if rows:
        yield from table(rows, header=("stage", "time", "share"))
    yield f"Report: {page}"
