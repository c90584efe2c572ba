"""models: what is known and present, and getting what is not, from the network or a folder."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infra.console import FAILED, emit, note, stop, table
from infra.verbs.options import AsJson

if TYPE_CHECKING:
    from pipelines.model_catalogue import Terms
    from pipelines.model_pull import PullPlan


def register(app: typer.Typer) -> None:
    """Add these verbs to the command line."""
    models = typer.Typer(
        no_args_is_help=True, help="Published models: what is known and present, pull, import."
    )
    models.command("list")(models_list)
    models.command("pull")(models_pull)
    models.command("import")(models_import)
    app.add_typer(models, name="models")


def models_list(as_json: AsJson = False) -> None:
    """List the known models: present or not, their size and licence, where they come from.

    Files are looked for in the folders of ANIMATOR_MODELS, then in the cache.
    Example: animator models list
    """
    from infra.doctor import known_models
    from pipelines.model_cache import size_text

    def lines(models: list[dict[str, Any]]) -> list[str]:
        rows = [
            (
                m["name"],
                "here" if m["path"] else "absent",
                size_text(m["size"]),
                {True: "yes", False: "no", None: "unknown"}[m["non_commercial"]],
                m["licence"],
                m["path"] or _way_to_get(m["name"], m["source"]),
            )
            for m in models
        ]
        header = ("model", "", "size", "non-commercial", "licence", "lies in / how to get it")
        return table(rows, header=header)

    emit(known_models(), as_json=as_json, show=lines)


def models_pull(
    names: Annotated[list[str], typer.Argument(help="Names as `animator models list` has them.")],
    accept_licence: Annotated[
        bool, typer.Option("--accept-licence", help="Accept the licences; asked once where typed.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Fetch models into the cache, verified; a pull that broke off continues.

    HF_TOKEN opens gated models; HF_ENDPOINT or ANIMATOR_MODELS_MIRROR name a mirror.
    Example: animator models pull dwpose --accept-licence
    """
    from pipelines.model_cache import SourceError, accept_licences
    from pipelines.model_download import Downloader
    from pipelines.model_pull import plan_pull, pull, with_needs

    try:
        with Downloader() as downloader, ExitStack() as bars:
            plan = plan_pull(with_needs(names), downloader)
            for line in _plan_lines(plan):
                note(line)
            if plan.licences and (accept_licence or _asked(plan.licences)):
                accept_licences(plan.licences)
            result = pull(plan, downloader, _Bars(bars))
    except SourceError as error:
        stop(str(error), FAILED)
    emit(result, as_json=as_json, show=_pulled)


def models_import(
    folder: Annotated[Path, typer.Argument(help="Folder with the files; sub folders count too.")],
    name: Annotated[
        str | None,
        typer.Option(help="Take only this model; a new name makes a face pack of .onnx files."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Copy model files that were fetched elsewhere into the cache, verified.

    Takes hub snapshots, zips of face packs, single ONNX files. Example: animator models import DIR
    """
    from infra.progress import stage_bar
    from pipelines.model_cache import SourceError
    from pipelines.model_import import import_models

    try:
        with stage_bar("import") as report:
            result = import_models(folder, name=name, progress=report)
    except SourceError as error:
        stop(str(error), FAILED)
    emit(result, as_json=as_json, show=_imported)


def _way_to_get(name: str, source: str) -> str:
    from pipelines.model_catalogue import known

    return f"animator models pull {name}" if known(name).files else source


class _Bars:
    """One progress bar a model, the next begun when the one before it is done."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack, self._model = stack, None

    def __call__(self, model: str, share: float, stage: str) -> None:
        from infra.progress import stage_bar

        if model != self._model:
            self._stack.close()
            self._model, self._report = model, self._stack.enter_context(stage_bar(model))
        self._report(share, stage)


def _plan_lines(plan: "PullPlan") -> Iterator[str]:
    from pipelines.model_cache import size_text
    from pipelines.model_source import shown

    for planned in plan.models:
        model = planned.model
        if planned.present is not None:
            yield f"{model.name} is here already: {planned.present}"
            continue
        yield f"{model.name}: {model.purpose}"
        yield f"  licence  {model.licence}"
        for file in planned.files:
            yield f"  {size_text(file.size):>8}  {file.file.path}  from {shown(file.source.url)}"
    if len(plan.wanted) > 1:
        yield f"{size_text(plan.size)} in all"


def _asked(licences: "list[Terms]") -> bool:
    if not sys.stdin.isatty():
        return False
    for terms in licences:
        note(f"{terms.name}: {terms.url}")
        if terms.non_commercial:
            note("  not for commercial use")
    return typer.confirm("Do you accept these licences?", err=True)


def _pulled(result: list[dict[str, Any]]) -> Iterator[str]:
    for model in result:
        yield f"{model['name']}  {model['path']}"
        for against in dict.fromkeys(file["verified_against"] for file in model["files"]):
            yield f"  verified against {against}"


def _imported(result: dict[str, Any]) -> Iterator[str]:
    for model in result["imported"]:
        yield f"{model['name']}  {model['path']}  ({model['licence']})"
        for file in model["files"]:
            yield f"  {file['path']}  verified against {file['verified_against']}"
    for model in result["incomplete"]:
        yield f"{model['name']} is incomplete and was left out: lacks {', '.join(model['missing'])}"
    if other := result["unrecognised"]:
        shown = ", ".join(other[:20]) + (f" and {len(other) - 20} more" if len(other) > 20 else "")
        yield f"Not recognised: {shown}"
