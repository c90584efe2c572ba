"""shards: check a folder of shards, count, look inside, and exchange with other layouts."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from infra.console import FAILED, emit, note, table
from infra.verbs.options import AsJson, Face, OutFolder, Pose, Settings

Folder = Annotated[Path, typer.Argument(help="Folder of shards.")]
_MAX_ERRORS = 12
_LINE_SECONDS = 15.0


def register(app: typer.Typer) -> None:
    """Add these verbs to the command line."""
    shards = typer.Typer(
        no_args_is_help=True, help="Shards of clips: check, count, look inside, import, export."
    )
    shards.command("verify")(verify)
    shards.command("stats")(stats)
    shards.command("show")(show)
    shards.command("import")(import_)
    shards.command("export")(export)
    app.add_typer(shards, name="shards")


def verify(folder: Folder, as_json: AsJson = False) -> None:
    """Check every byte and every member; exit code 1 if anything is wrong.

    Example: animator shards verify shards
    """
    from pipelines.overrides import to_dict
    from pipelines.shards import record_paths
    from pipelines.shards import verify as verify_shards

    total, done = len(record_paths(folder)), 0
    with _progress("checking") as tell:

        def advance(name: str) -> None:
            nonlocal done
            done += 1
            tell(done, total, name)

        report = to_dict(verify_shards(folder, advance))
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


def stats(folder: Folder, as_json: AsJson = False) -> None:
    """Count sources, clips, seconds and the reasons for rejection.

    Example: animator shards stats shards --json
    """
    from pipelines.curation.config import CurationConfig
    from pipelines.curation.tally import Tally
    from pipelines.shards import iter_records

    # The rules do not matter: what a run decided is in its records.
    counted = Tally(CurationConfig())
    for record in iter_records(folder):
        counted.add(record)
    emit(counted.summary(), as_json=as_json, show=totals)


def show(
    folder: Folder,
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[KEY]",
            help="A clip's key, or a source's id or file name; without it, all clips are listed.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The contact sheet's file; KEY.png in this folder by default."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the clips of a folder, or show one: a contact sheet and all that is known of it.

    Clips that were rejected have a sheet too: why, every score, and a thumbnail.

    Example: animator shards show shards 1c32b457c6d97f6e_000
    """
    import json
    from dataclasses import replace

    from pipelines.lookup import find
    from pipelines.overrides import to_dict

    if name is None:
        _list(folder, as_json)
        return
    found = find(folder, name)
    kept = [clip for clip in found.source.clips if clip.verdict == "kept"]
    if found.clip is None and kept:
        found = replace(found, clip=kept[0])
        if len(kept) > 1:
            note(f"{name} has {len(kept)} clips: {', '.join(clip.key for clip in kept[:8])}")
    title = found.clip.key if found.clip else found.source.id
    path = out or Path(f"{title}.png")
    path = path / f"{title}.png" if path.is_dir() else path
    if path.suffix.lower() != ".png":
        raise ValueError(f"got --out {path}, expected a name that ends in .png.")
    known = _draw_sheet(folder, found, path)
    result = {"sheet": str(path), "shard": found.shard, **to_dict(known)}
    emit(
        result,
        as_json=as_json,
        show=lambda r: [json.dumps(r, indent=2, ensure_ascii=False), f"Sheet: {path}"],
    )


def _draw_sheet(folder: Path, found: Any, path: Path) -> Any:
    """Write the sheet of a clip or source; returns what is known of it."""
    from pipelines.clips import ClipStore
    from pipelines.curation.ledger import THUMBS_FOLDER
    from pipelines.curation.thumbnails import contact_sheet, record_sheet

    clip, source = found.clip, found.source
    if clip is not None and clip.verdict == "kept":
        contact_sheet(folder, clip.key, path)
        store = ClipStore(folder)
        return {"verdict": "kept"} | store.meta(store.index(clip.key))
    thumbnail = folder / THUMBS_FOLDER / f"{source.id}.jpg"
    picture = thumbnail.read_bytes() if thumbnail.is_file() else None
    record_sheet(source, clip, picture, path)
    if clip is None:
        return source
    return {"clip": clip, "source": source.uris, "provenance": source.provenance}


def _list(folder: Path, as_json: bool) -> None:
    from pipelines.shards import iter_records

    rows = [
        {
            "key": clip.key,
            "frames": clip.num_frames,
            "fps": round(clip.fps, 3),
            "size": [clip.height, clip.width],
            "seconds": round(clip.end - clip.start, 2),
            "source": source.uris[0],
        }
        for record in iter_records(folder)
        for source in record.sources
        for clip in source.clips
        if clip.verdict == "kept"
    ]
    if not as_json and not rows:
        note(f"{folder} holds no kept clips; `animator shards stats {folder}` says why")
        return
    emit(
        rows,
        as_json=as_json,
        show=lambda r: table(
            [
                (*list(row.values())[:3], "{1}x{0}".format(*row["size"]), *list(row.values())[4:])
                for row in r
            ],
            header=tuple(rows[0]),
        ),
    )


def import_(
    source: Annotated[
        Path, typer.Argument(help="Folder in another layout, or a video_path.txt in it.")
    ],
    out: OutFolder,
    layout: Annotated[
        str, typer.Option(help="stableanimator, tiktok, dwpose, or auto to find out.")
    ] = "auto",
    fps: Annotated[float, typer.Option(help="Frames a second, where a folder does not say.")] = 30,
    jobs: Annotated[int, typer.Option(help="Processes, each with its own models.")] = 1,
    pose: Pose = "auto",
    face: Face = "auto",
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Take clips that others prepared into shards; a stopped import goes on where it was.

    \b
    stableanimator  NAME/images/frame_0.png …, with NAME/poses and NAME/faces, in rec/ and vec/
    tiktok          NAME/images/0001.png …
    dwpose          NAME.mp4 with NAME.dwpose.npz, beside it or elsewhere in the folder

    Example: animator shards import animation_data --out shards --fps 30
    """
    from pipelines.exchange.import_config import ImportConfig
    from pipelines.exchange.importing import import_shards
    from pipelines.overrides import apply_overrides, to_dict

    config = apply_overrides(ImportConfig(fps=fps, pose=pose, face=face), settings or [])
    with _progress("importing") as tell:
        summary = import_shards(source, out, layout=layout, config=config, jobs=jobs, progress=tell)
    for text in summary.notes:
        note(text)
    emit(to_dict(summary), as_json=as_json, show=_import_lines)


def export(
    folder: Folder,
    out: OutFolder,
    layout: Annotated[str, typer.Option(help="stableanimator.")] = "stableanimator",
    limit: Annotated[int | None, typer.Option(help="Only so many clips, the first.")] = None,
    jobs: Annotated[int, typer.Option(help="Threads, a clip each.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Write clips as pictures, poses and face masks that StableAnimator's own trainer reads.

    Run again, it writes what is missing. Train on OUT/video_rec_path.txt and video_vec_path.txt.

    Example: animator shards export shards --out animation_data
    """
    from pipelines.exchange.exporting import export_shards
    from pipelines.overrides import to_dict

    with _progress("exporting") as tell:
        summary = export_shards(folder, out, layout=layout, limit=limit, jobs=jobs, progress=tell)
    if summary.stretched:
        note(
            f"{len(summary.stretched)} clips are neither square nor 9:16, and will be distorted "
            f"by the trainer, which stretches to 512x512 or 576x1024; the first is "
            f"{summary.stretched[0]}"
        )
    emit(to_dict(summary), as_json=as_json, show=_export_lines)
    if summary.failures:
        raise typer.Exit(FAILED)


def totals(counts: dict[str, Any]) -> list[str]:
    """A run's counts, as `Tally.summary` gives them, in lines for people."""
    lines = [
        f"{counts['sources']} videos: {counts['kept']} kept, {counts['rejected']} rejected, "
        f"{counts['failed']} failed",
        f"{counts['clips_kept']} clips, {counts['frames_kept']} frames, "
        f"{counts['seconds_kept']:.1f} s, {counts['bytes'] / 1e6:.1f} MB "
        f"in {counts['shards']} shards",
    ]
    lines += [f"{count:7} {reason}" for reason, count in counts["reasons"].items()]
    errors = sorted(counts["errors"].items(), key=lambda item: (-item[1], item[0]))
    lines += [f"{count:7} {error}" for error, count in errors[:_MAX_ERRORS]]
    rest = errors[_MAX_ERRORS:]
    if rest:
        lines.append(f"{sum(count for _, count in rest):7} and {len(rest)} more kinds of errors")
    return lines


def _import_lines(summary: dict[str, Any]) -> list[str]:
    failures = summary["failures"]
    listed = [f"  {name}: {error}" for name, error in list(failures.items())[:20]]
    more = [f"  and {len(failures) - 20} more"] if len(failures) > 20 else []
    return [
        f"{summary['items']} clips of layout {summary['layout']}: {summary['kept']} kept, "
        f"{summary['rejected']} rejected, {summary['failed']} failed",
        *listed,
        *more,
        *(
            f"{count:7} {reason}"
            for reason, count in summary["reasons"].items()
            if reason != "unreadable"
        ),
        f"{summary['frames']} frames, {summary['seconds']:.1f} s, {summary['bytes'] / 1e6:.1f} MB "
        f"in {summary['shards_done'] + summary['shards_resumed']} shards of {summary['out']}",
    ]


def _export_lines(summary: dict[str, Any]) -> list[str]:
    return [
        *(f"failed: {key}: {error}" for key, error in (summary["failures"] or {}).items()),
        f"{summary['written']} clips written ({summary['bytes'] / 1e6:.1f} MB), "
        f"{summary['skipped']} were there; {summary['clips']} in {summary['out']}",
    ]


@contextmanager
def _progress(verb: str) -> Iterator[Callable[[int, int, str], None]]:
    """A function for (done, in all, name of the last), drawn on stderr as a bar or as lines."""
    if not sys.stderr.isatty():
        yield _lines(verb)
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[name]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(verb, total=None, name="")
        yield lambda done, total, name: bar.update(
            task, completed=done, total=total, name=escape(name[-60:])
        )


def _lines(verb: str) -> Callable[[int, int, str], None]:
    import time

    last = time.monotonic()

    def show_line(done: int, total: int, name: str) -> None:
        nonlocal last
        if done == total or time.monotonic() - last >= _LINE_SECONDS:
            last = time.monotonic()
            note(f"{verb} {done}/{total} {name}")

    return show_line
