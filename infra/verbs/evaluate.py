"""evaluate: how good a curation or an animator is, measured."""

import typer


def register(app: typer.Typer) -> None:
    """Add these verbs to the command line."""
