"""A verb that is a command and a group at once."""

from typing import Any, ClassVar

from typer.core import TyperGroup


class RunGroup(TyperGroup):
    """A group whose command `run` may be left out: `curate videos/` is `curate run videos/`.

    A source called like one of the commands is given as `./NAME`.
    """

    default: ClassVar[str] = "run"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `run` before arguments that begin with none of the commands."""
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = [self.default, *args]
        return super().parse_args(ctx, args)
