"""doctor, demo: what this machine has, and the whole chain on built-in material."""

from pathlib import Path
from typing import Annotated

import typer

from infra.console import emit, note
from infra.verbs.options import AsJson


def register(app: typer.Typer) -> None:
    """Add these verbs to the command line."""
    app.command()(doctor)
    app.command()(demo)


def doctor(as_json: AsJson = False) -> None:
    """Show devices, versions, models present, and what would run where.

    Example: animator doctor --json
    """
    from infra.doctor import examine, lines

    emit(examine(), as_json=as_json, show=lines)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the demonstration's files.")] = Path("demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Train a few steps only: shows the chain, not quality.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Curate, train, align and animate on built-in material; writes OUT/report.html.

    An interrupted demonstration continues where it stopped. Example: animator demo --out demo
    """
    from infra.demo.demo import run_demo

    result = run_demo(out, quick=quick)
    note("")
    emit(
        result,
        as_json=as_json,
        show=lambda r: [f"{r['summary']}", f"Open {r['report']} in a browser."],
    )
