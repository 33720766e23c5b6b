"""Command line `xsmoe`. This file and `*_commands.py` declare options; `xsmoe.cli.commands` has the implementations."""

import io
import sys
from pathlib import Path
from typing import Annotated

from xsmoe.extras import extra

with extra("train"):
    import typer

    from xsmoe.cli.data_commands import encode, prepare
    from xsmoe.cli.run_commands import evaluate, recommend, report, train, update
    from xsmoe.cli.typer_group import ORDER, Commands, make_display

__all__ = ["ORDER", "app", "main"]

app = typer.Typer(
    name="xsmoe",
    cls=Commands,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line of this process and exit with its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a locale may not support all characters
    app()


@app.callback()
def root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Streaming multimodal recommendation with expandable side mixtures of experts.

    Usual workflow: **prepare** a dataset, **encode** its items, **train** a run, then **update** it with new
    interactions. **demo** runs the whole workflow on synthetic data.
    """
    if version:
        from xsmoe_kernels import __version__

        typer.echo(__version__)
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def demo(
    folder: Annotated[Path, typer.Option(help="Folder for all files; also the run's folder.")] = Path("runs/demo"),
    windows: Annotated[int, typer.Option(help="Number of windows in the stream.")] = 6,
    epochs: Annotated[int, typer.Option(help="Largest number of epochs for a window.")] = 12,
    users: Annotated[int, typer.Option(help="Active users in a window.")] = 800,
    items: Annotated[int, typer.Option(help="Items at the start; every window adds more.")] = 600,
    seed: Annotated[int, typer.Option(help="Seed of the catalogue, the encoders and the training.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove the files of an earlier demo first.")] = False,
) -> None:
    """Run all stages on a synthetic, drifting catalogue with texts and images, in a few minutes.

    Finished stages are skipped. An interrupted demo is resumed; a finished one shows its results again.
    """
    from xsmoe.cli.commands.demo import DemoSettings
    from xsmoe.cli.commands.demo import demo as run_demo

    settings = DemoSettings(windows=windows, epochs=epochs, users=users, items=items, seed=seed)
    run_demo(folder, settings, make_display(), fresh=fresh)


def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, devices, and the backend of each operator, with the reasons why others are unavailable."""
    from xsmoe.cli.commands.info import info as show_info

    show_info(make_display(), as_json=as_json)


for panel, commands in (
    ("First steps", (demo, info)),
    ("Data", (encode,)),
    ("Runs", (train, update, evaluate, recommend, report)),
):
    for command in commands:
        app.command(rich_help_panel=panel)(command)
app.add_typer(prepare, name="prepare", rich_help_panel="Data")
