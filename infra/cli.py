"""The `animator` command. Every verb lives in `infra.verbs`; its work lives in its own room.

Nothing heavy is imported here, so that `animator --help` answers at once.
"""

import sys

import typer

from infra.console import report_error
from infra.verbs import (
    align,
    bench,
    create,
    curate,
    encode,
    evaluate,
    machine,
    models,
    shards,
    submit,
    train,
    weights,
)

app = typer.Typer(
    name="animator",
    help="Animate a person in a picture by the motion in a video, and keep their identity.\n\n"
    "Start with `animator doctor` and `animator demo`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

machine.register(app)
models.register(app)
curate.register(app)
shards.register(app)
encode.register(app)
train.register(app)
align.register(app)
create.register(app)
evaluate.register(app)
weights.register(app)
bench.register(app)
submit.register(app)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; ends the process with 0 done, 1 failed or 2 wrong use."""
    try:
        app(args=arguments, prog_name="animator")
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(report_error(error))
