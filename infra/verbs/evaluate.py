"""evaluate: how good a curation, an alignment or an animator is, measured."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from infra.console import emit, note, table
from infra.verbs.options import AsJson, Model

Labels = Annotated[Path, typer.Option(help="CSV made by hand: file, camera, cuts, face.")]
ReportFile = Annotated[Path | None, typer.Option("--report", help="JSON file to write.")]


def register(app: typer.Typer) -> None:
    """Add these verbs to the command line."""
    evaluate = typer.Typer(no_args_is_help=True, help="Measure how good a result is.")
    evaluate.command("alignment")(evaluate_alignment)
    evaluate.command("curation")(evaluate_curation)
    evaluate.command("animator")(evaluate_animator)
    app.add_typer(evaluate, name="evaluate")


def evaluate_alignment(
    motion: Annotated[
        Path | None, typer.Option(help="Folder of motion capture: NAME.npz with joints.")
    ] = None,
    poses: Annotated[
        Path | None, typer.Option(help="Or a folder of recorded 2-D poses: NAME.npz, NAME.mp4.")
    ] = None,
    report: ReportFile = None,
    alignment: Annotated[
        str, typer.Option(help="Block to measure: shipped, closed-form (none), or a model folder.")
    ] = "shipped",
    clips: Annotated[int, typer.Option(help="Clips to measure on.")] = 300,
    seed: Annotated[int, typer.Option(help="Chooses clips and misalignments.")] = 0,
    setting: Annotated[
        str,
        typer.Option(
            help="With --motion, poses to measure on: full, short, half, close, missing, noisy, "
            "turned, mirrored, walking, several, aligned; or all."
        ),
    ] = "full",
    as_json: AsJson = False,
) -> None:
    """Misalign poses of known place and compare what each method makes of them.

    Dis is the mean distance of the joints to where they were, in units of the frame's longer side.

    Example: animator evaluate alignment --motion motion/val --report alignment.json
    --alignment runs/alignment/model --setting all
    """
    from inference.alignment.benchmark import evaluate_alignment as measure
    from infra.progress import stage_bar

    _check_report(report)
    with stage_bar("evaluate") as progress:
        result = measure(
            motion,
            poses=poses,
            clips=clips,
            seed=seed,
            alignment=alignment,
            setting=setting,
            on_step=lambda done, total: progress(done / total, "clips"),
        )
    _save(result, report)
    emit(result, as_json=as_json, show=_alignment_lines)


def evaluate_curation(
    folder: Annotated[Path, typer.Argument(help="Folder of shards.")],
    labels: Labels,
    report: ReportFile = None,
    as_json: AsJson = False,
) -> None:
    """Compare the verdicts of a curation with labels made by hand.

    Example: animator evaluate curation shards --labels labels.csv --report curation.json
    """
    from pipelines.curation.evaluation import evaluate_curation as compare

    result = compare(folder, labels)
    _save(result, report)
    emit(result, as_json=as_json, show=_curation_lines)


def evaluate_animator(
    model: Model,
    shards: Annotated[Path, typer.Option(help="Folder of shards the model was trained on.")],
    tail: Annotated[float, typer.Option(help="Share of the clip that was held out.")] = 0.2,
    clip: Annotated[int, typer.Option(help="Number of the clip in the shards.")] = 0,
    seed: Annotated[int, typer.Option(help="Chooses the noise.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Sampling steps.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the video and pictures.")] = None,
    report: ReportFile = None,
    as_json: AsJson = False,
) -> None:
    """Animate the held-out end of a clip by its own poses and compare it with the truth.

    Example: animator evaluate animator --model runs/animator/model --shards shards
    --report animator.json
    """
    from inference.evaluate import evaluate_animator as measure
    from infra.progress import stage_bar

    with stage_bar("evaluate") as progress:
        result = measure(
            model,
            shards,
            tail=tail,
            clip=clip,
            seed=seed,
            steps=steps,
            out=out,
            on_step=lambda done, total: progress(done / total, f"step {done}/{total}"),
        )
    _save(result, report)
    emit(result, as_json=as_json, show=_animator_lines)


def _alignment_lines(result: dict[str, Any]) -> list[str]:
    lines = []
    for name, measured in result["settings"].items():
        rows = measured["rows"]
        columns = tuple(next(iter(rows.values())))
        cells = [[row, *(f"{rows[row][key]:.4f}" for key in columns)] for row in rows]
        lines += [f"{name}: {measured['about']}", *table(cells, header=("", *columns)), ""]
    return [*lines, f"{result['clips']} clips; learned: {_block_line(result['alignment'])}"]


def _block_line(about: dict[str, Any]) -> str:
    if about["licence"] is None:
        return f"left out ({about['name']})"
    return f"{about['name']} ({about['sha256']}; {about['licence']})"


def _animator_lines(result: dict[str, Any]) -> list[str]:
    rows = result["rows"]
    columns = tuple(next(iter(rows.values())))
    cells = [[name, *(_short(row[key]) for key in columns)] for name, row in rows.items()]
    return table(cells, header=(f"{result['frames_held_out']} frames held out", *columns))


def _curation_lines(result: dict[str, Any]) -> list[str]:
    rules = {name: rule for name, rule in result.items() if isinstance(rule, dict) and "f1" in rule}
    columns = ("clips", "positives", "precision", "recall", "f1")
    rows = [[name, *(_short(rule[key]) for key in columns)] for name, rule in rules.items()]
    lines = table(rows, header=("rule", *columns))
    people = result["people"]
    if people["clips"]:
        lines.append(f"number of people right for {people['accuracy']:.0%} of {people['clips']}")
    lines.append(_failed_line(len(result["failed"]), result["labelled"]))
    for name, rule in rules.items():
        lines += [f"{name}: missed {file}" for file in rule["missed"]]
        lines += [f"{name}: false alarm {file}" for file in rule["false_alarms"]]
    return lines + [f"people: {file}: {text}" for file, text in people["wrong"].items()]


def _failed_line(failed: int, labelled: int) -> str:
    if not failed:
        return f"none of {labelled} sources failed"
    return f"{failed} of {labelled} sources failed, and count as not recognised"


def _short(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _check_report(report: Path | None) -> None:
    """Before the work, since it would be lost."""
    if report is not None and not report.absolute().parent.is_dir():
        raise ValueError(f"{report} cannot be written: make the folder {report.parent} first.")


def _save(result: dict[str, Any], report: Path | None) -> None:
    if report is not None:
        text = json.dumps(result, indent=2, ensure_ascii=False, default=str)
        report.write_text(text + "\n", encoding="utf-8")
        note(f"Report: {report}")
