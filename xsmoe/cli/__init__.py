"""The command line `xsmoe`: what each command takes. What it does lies in `xsmoe.app`."""

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
    """Runs the command line of this process and leaves with its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a locale without some letter is no reason to stop
    app()


@app.callback()
def root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and leave.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Streaming multimodal recommendation with expandable side mixtures of experts.

    The usual way: **prepare** a dataset, **encode** its items, **train** a run; then **update** it as new interactions
    arrive. **demo** shows all of it on synthetic data.
    """
    if version:
        from xsmoe_kernels import __version__

        typer.echo(__version__)
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def demo(
    folder: Annotated[Path, typer.Option(help="Where everything goes; also the run's folder.")] = Path("runs/demo"),
    windows: Annotated[int, typer.Option(help="Windows of the stream.")] = 6,
    epochs: Annotated[int, typer.Option(help="The most epochs a window.")] = 12,
    users: Annotated[int, typer.Option(help="Users that are active in a window.")] = 800,
    items: Annotated[int, typer.Option(help="Items at the start; more arrive with every window.")] = 600,
    seed: Annotated[int, typer.Option(help="Of the catalogue, the encoders and the training.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove what an earlier demo left, and start anew.")] = False,
) -> None:
    """Stream a synthetic catalogue that drifts, with texts and images: all stages, in a few minutes.

    Stages that are done are not done again; a demo that was interrupted goes on, a finished one shows its results.
    """
    from xsmoe.cli.commands.demo import DemoSettings
    from xsmoe.cli.commands.demo import demo as run_demo

    settings = DemoSettings(windows=windows, epochs=epochs, users=users, items=items, seed=seed)
    run_demo(folder, settings, make_display(), fresh=fresh)


def info(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Show versions, devices, and which backend serves each operator and why the others do not."""
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
