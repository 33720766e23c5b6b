"""Common behaviour of all commands: their order in help, the display, and the handling of errors and interruptions."""

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from xsmoe.extras import MissingExtra

USER_ERRORS = (ValueError, TypeError, OSError, MissingExtra)
"""Exceptions that invalid input raises. Any other exception is a bug and keeps its traceback."""

# The package that defines UsageError depends on typer's version.
UsageError: Any = typer.BadParameter.__bases__[0]
MISTAKE, INTERRUPTED = 2, 130
ORDER = ("demo", "info", "prepare", "encode", "train", "update", "evaluate", "recommend", "report")


class Commands(TyperGroup):
    """Converts a user error into one line on standard error and exit code 2."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        try:
            code = super().main(*arguments, **(options | {"prog_name": "xsmoe", "standalone_mode": False}))
        except UsageError as error:
            command = error.ctx.command_path if error.ctx is not None else "xsmoe"
            code = _fail(f"{error.format_message().rstrip('.')} (see `{command} --help`)")
        sys.exit(code if isinstance(code, int) else 0)

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=ORDER.index)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except USER_ERRORS as error:
            if ctx.params["debug"]:
                raise
            raise typer.Exit(_fail(_message(error))) from None
        except KeyboardInterrupt:
            if ctx.params["debug"]:
                raise
            again = "the same command without --fresh" if "--fresh" in sys.argv else "the same command"
            typer.echo(f"xsmoe: interrupted; finished work is saved, run {again} to resume", err=True)
            raise typer.Exit(INTERRUPTED) from None


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _fail(message: str) -> int:
    typer.echo(f"xsmoe: error: {' '.join(message.split())}", err=True)
    return MISTAKE


def make_display() -> Any:
    """Return the display of a command."""
    from xsmoe.cli.display import Display

    return Display()
