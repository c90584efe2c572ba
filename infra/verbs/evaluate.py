"""evaluate: how good a curation is, measured against labels made by hand."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from infra.console import emit, note, table
from infra.verbs.options import AsJson

Labels = Annotated[Path, typer.Option(help="CSV made by hand: file, camera, cuts, face.")]
ReportFile = Annotated[Path | None, typer.Option("--report", help="JSON file to write.")]


def register(app: typer.Typer) -> None:
    """Add these verbs to the command line."""
    evaluate = typer.Typer(no_args_is_help=True, help="Measure how good a result is.")
    evaluate.command("curation")(evaluate_curation)
    app.add_typer(evaluate, name="evaluate")


def evaluate_curation(
    folder: Annotated[Path, typer.Argument(help="Folder of shards.")],
    labels: Labels,
    report: ReportFile = None,
    as_json: AsJson = False,
) -> None:
    """Compare the verdicts of a curation with labels made by hand.

    Example: animator evaluate curation shards --labels labels.csv --report curation.json
    """
    from pipelines.curation.report import evaluate_curation as compare

    result = compare(folder, labels)
    _save(result, report)
    emit(result, as_json=as_json, show=_curation_lines)


def _curation_lines(result: dict[str, Any]) -> list[str]:
    rules = {name: rule for name, rule in result.items() if isinstance(rule, dict)}
    columns = ("clips", "positives", "precision", "recall", "f1")
    rows = [[name, *(_short(rule.get(key)) for key in columns)] for name, rule in rules.items()]
    return table(rows, header=("rule", *columns))


def _short(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _save(result: dict[str, Any], report: Path | None) -> None:
    if report is not None:
        text = json.dumps(result, indent=2, ensure_ascii=False, default=str)
        report.write_text(text + "\n", encoding="utf-8")
        note(f"Report: {report}")
