"""submit: the verbs that do long work, as jobs on a Ray cluster."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from infra.console import FAILED, emit, note, table
from infra.verbs.options import AsJson

JobId = Annotated[str, typer.Argument(help="A job's id, as `submit` printed it.")]
_PASS = {"allow_extra_args": True, "ignore_unknown_options": True}


@dataclass(frozen=True, kw_only=True)
class _Options:
    """What is given before the verb."""

    address: str
    name: str | None
    env: dict[str, str]
    ship: str
    follow: bool
    manifest: Path | None
    image: str
    claim: str
    mount: str
    workers: int
    gpus: int


def register(app: typer.Typer) -> None:
    """Add these verbs to the command line."""
    submit = typer.Typer(
        no_args_is_help=True, help="Run a verb as a job on a Ray cluster; look after its jobs."
    )
    submit.callback()(_options)
    for verb in (curate, encode, train, batch):
        submit.command(context_settings=_PASS)(verb)
    submit.command()(status)
    submit.command()(logs)
    submit.command()(stop)
    app.add_typer(submit, name="submit")


def _options(
    context: typer.Context,
    address: Annotated[
        str | None,
        typer.Option(
            help="The cluster's dashboard; else RAY_API_SERVER_ADDRESS, else this machine."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The job's id; else one is made.")] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Variable for all processes; may be given often."),
    ] = None,
    ship: Annotated[
        str,
        typer.Option(
            help="What goes along: nothing (the cluster has this package), code, or all (its "
            "requirements are installed too)."
        ),
    ] = "nothing",
    follow: Annotated[bool, typer.Option(help="Show what the job prints until it ends.")] = True,
    manifest: Annotated[
        Path | None,
        typer.Option(help="Write a KubeRay RayJob to this file instead of sending the job."),
    ] = None,
    image: Annotated[str, typer.Option(help="Container image of the RayJob.")] = (
        "stableanimator-pp:latest"
    ),
    claim: Annotated[str, typer.Option(help="PersistentVolumeClaim of the RayJob.")] = "animator",
    mount: Annotated[str, typer.Option(help="Where its pods see that claim.")] = "/data",
    workers: Annotated[int, typer.Option(help="Most worker pods of the RayJob.")] = 8,
    gpus: Annotated[int, typer.Option(help="GPUs of each worker pod.")] = 0,
) -> None:
    """Run a verb as a job on a Ray cluster; look after its jobs.

    Options of `submit` come before the verb, the verb's own after it.
    """
    from infra.submit import SubmitError, default_address

    if ship not in ("nothing", "code", "all"):
        raise SubmitError(f"got --ship {ship!r}, expected nothing, code or all.")
    pairs = {}
    for text in env or ():
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise SubmitError(f"got --env {text!r}, expected NAME=VALUE.")
        pairs[key] = value
    context.obj = _Options(
        address=address or default_address(),
        name=name,
        env=pairs,
        ship=ship,
        follow=follow,
        manifest=manifest,
        image=image,
        claim=claim,
        mount=mount,
        workers=workers,
        gpus=gpus,
    )


def curate(context: typer.Context) -> None:
    """Submit `animator curate`, with its own arguments.

    Example: animator submit curate s3://bucket/videos --out /data/shards
    """
    _send(context, "curate")


def encode(context: typer.Context) -> None:
    """Submit `animator encode`, with its own arguments.

    Example: animator submit encode /data/shards --out /data/latents
    """
    _send(context, "encode")


def train(context: typer.Context) -> None:
    """Submit `animator train alignment` or `animator train animator`, with their arguments.

    Example: animator submit train animator --shards /data/shards --out /data/runs/animator
    """
    _send(context, "train")


def batch(context: typer.Context) -> None:
    """Submit `animator batch`, with its own arguments.

    Example: animator submit batch /data/jobs.jsonl --model /data/model --out /data/results
    """
    _send(context, "batch")


def status(
    context: typer.Context,
    job: Annotated[str | None, typer.Argument(help="A job's id; without it, all jobs.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say how a job stands, or list all jobs of the cluster.

    Example: animator submit status raysubmit_8cSbnTCVNu3Dhuys
    """
    from infra.submit import job_status, list_jobs

    if job is not None:
        row = job_status(job, context.obj.address)
        emit(row, as_json=as_json, show=lambda r: [f"{name}: {value}" for name, value in r.items()])
        return
    rows = list_jobs(context.obj.address)
    emit(
        rows,
        as_json=as_json,
        show=lambda found: table(
            [(row["id"], row["status"], row["command"]) for row in found],
            header=("id", "status", "command"),
        ),
    )


def logs(context: typer.Context, job: JobId) -> None:
    """Show what a job prints, until it ends.

    Example: animator submit logs raysubmit_8cSbnTCVNu3Dhuys
    """
    _show(job, context.obj.address)


def stop(context: typer.Context, job: JobId) -> None:
    """Stop a job; submitted again, it goes on where it was.

    Example: animator submit stop raysubmit_8cSbnTCVNu3Dhuys
    """
    from infra.submit import stop_job

    stopped = stop_job(job, context.obj.address)
    note(f"{job} is stopping" if stopped else f"{job} was over already")


def _send(context: typer.Context, verb: str) -> None:
    from infra import submit
    from infra.cli import app

    options: _Options = context.obj
    command = _command(app, verb)
    job = submit.checked_job(
        verb,
        context.args,
        command,
        ship=options.ship,
        env=options.env,
        name=options.name,
    )
    if options.manifest is not None:
        _write_manifest(job, options, options.manifest)
        return
    job_id = submit.submit(job, options.address)
    print(job_id, flush=True)
    note(f"animator submit logs {job_id} shows what it prints, stop {job_id} ends it")
    if options.follow:
        _show(job_id, options.address)


def _command(app: typer.Typer, verb: str) -> Any:
    verbs: Any = typer.main.get_command(app)
    return verbs.commands[verb]


def _write_manifest(job: Any, options: _Options, path: Path) -> None:
    from infra import submit
    from pipelines.shards import write_atomic

    text = submit.manifest(
        job,
        image=options.image,
        claim=options.claim,
        mount=options.mount,
        workers=options.workers,
        gpus=options.gpus,
    )
    write_atomic(path, text.encode())
    note(f"kubectl apply -f {path} starts it")


def _show(job_id: str, address: str) -> None:
    from infra.submit import follow, job_status

    try:
        for text in follow(job_id, address):
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        note(f"\nthe job goes on; animator submit stop {job_id} ends it")
        return
    state = job_status(job_id, address)
    if state["status"] != "SUCCEEDED":
        note(f"animator: {job_id} ended as {state['status']}: {state['message']}")
        raise typer.Exit(FAILED)
