"""curate, shards: from raw video to checked shards of clips."""

from pathlib import Path
from typing import Annotated, Any

import typer

from infra.console import FAILED, emit, note, table
from infra.verbs.options import AsJson, OutFolder, Settings

Folder = Annotated[Path, typer.Argument(help="Folder of shards.")]


def register(app: typer.Typer) -> None:
    """Add these verbs to the command line."""
    app.command()(curate)
    shards = typer.Typer(no_args_is_help=True, help="Shards of clips: check, count, look inside.")
    shards.command("verify")(shards_verify)
    shards.command("stats")(shards_stats)
    shards.command("show")(shards_show)
    app.add_typer(shards, name="shards")


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
        show=lambda s: [*_totals(s["totals"]), f"Report: {out / 'report.html'}"],
    )


def shards_verify(folder: Folder, as_json: AsJson = False) -> None:
    """Check every byte and every member; exit code 1 if anything is wrong.

    Example: animator shards verify shards
    """
    from pipelines.overrides import to_dict
    from pipelines.shards import verify

    report = to_dict(verify(folder))
    emit(
        report,
        as_json=as_json,
        show=lambda r: [
            *(f"problem: {text}" for text in r["problems"]),
            f"{r['shards']} shards, {r['clips']} clips, {r['bytes'] / 1e6:.1f} MB, "
            f"{len(r['problems']) or 'no'} problems",
        ],
    )
    if report["problems"]:
        raise typer.Exit(FAILED)


def shards_stats(folder: Folder, as_json: AsJson = False) -> None:
    """Count sources, clips, seconds and the reasons for rejection.

    Example: animator shards stats shards --json
    """
    from pipelines.curation.report import stats

    emit(stats(folder), as_json=as_json, show=_totals)


def shards_show(
    folder: Folder,
    key: Annotated[str | None, typer.Argument(help="A clip's key; without it, all are listed.")] = (
        None
    ),
    as_json: AsJson = False,
) -> None:
    """List the clips of a folder, or show all that is known of one.

    Example: animator shards show shards
    """
    import json

    from pipelines.clips import ClipStore

    store = ClipStore(folder)
    if key is None:
        rows = [
            {
                "key": name,
                "frames": store.num_frames(i),
                "fps": store.fps(i),
                "size": list(store.size(i)),
                "source": store.meta(i).get("source"),
            }
            for i, name in enumerate(store.keys)
        ]
        emit(
            rows,
            as_json=as_json,
            show=lambda r: table([tuple(row.values()) for row in r], header=tuple(rows[0])),
        )
        return
    if key not in store.keys:
        import difflib

        near = difflib.get_close_matches(key, store.keys, n=1)
        raise ValueError(
            f"no clip {key!r} in {folder}; "
            + (f"the nearest is {near[0]!r}" if near else "list them with `animator shards show`")
        )
    meta = store.meta(list(store.keys).index(key))
    emit(meta, as_json=as_json, show=lambda m: [json.dumps(m, indent=2, ensure_ascii=False)])


def _totals(totals: dict[str, Any]) -> list[str]:
    lines = [
        f"{totals['sources']} videos: {totals['kept']} kept, {totals['rejected']} rejected, "
        f"{totals['failed']} failed",
        f"{totals['clips_kept']} clips, {totals['frames_kept']} frames, "
        f"{totals['seconds_kept']:.1f} s, {totals['bytes'] / 1e6:.1f} MB "
        f"in {totals['shards']} shards",
    ]
    why = {**totals["reasons"], **totals["errors"]}
    return lines + [f"{count:7} {reason}" for reason, count in why.items()]
