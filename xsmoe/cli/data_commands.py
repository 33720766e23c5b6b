"""Commands that make datasets, and encode their items."""

from pathlib import Path
from typing import Annotated

import typer

from xsmoe.cli.typer_group import make_display

prepare = typer.Typer(invoke_without_command=True)

Out = Annotated[Path, typer.Argument(metavar="OUT", help="The dataset's folder.", show_default=False)]


@prepare.callback()
def prepare_root(ctx: typer.Context) -> None:
    """Make a dataset: out of MovieLens, out of your own tables, or a synthetic one.

    A dataset is a folder with interactions.parquet (user, item, timestamp, row) and items.parquet (item, text, image).
    Every row of a log is kept with its row number, and repeats and ties are counted; training resolves them.
    """
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@prepare.command("movielens")
def prepare_movielens(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="The folder with movies.csv and ratings.csv.", show_default=False),
    ],
    out: Out,
) -> None:
    """Make a dataset of a MovieLens release in CSV form, such as ml-latest-small: titles and genres as texts."""
    from xsmoe.cli.commands.prepare import movielens

    movielens(source, out, make_display())


@prepare.command("table")
def prepare_table(
    out: Out,
    interactions: Annotated[Path, typer.Option(help="The log: .csv or .parquet.", show_default=False)],
    items: Annotated[Path, typer.Option(help="The items: .csv or .parquet.", show_default=False)],
    user_column: Annotated[str, typer.Option(help="The users' ids in the log.")] = "user",
    item_column: Annotated[str, typer.Option(help="The items' ids in both files.")] = "item",
    timestamp_column: Annotated[str, typer.Option(help="Seconds since 1970, in the log.")] = "timestamp",
    text_column: Annotated[
        str | None, typer.Option(help="The items' texts.", show_default="text, if it is there")
    ] = None,
    image_column: Annotated[
        str | None, typer.Option(help="Paths of the items' images.", show_default="image, if it is there")
    ] = None,
    images_root: Annotated[
        Path | None,
        typer.Option(help="What image paths are relative to.", show_default="the folder of the items' file"),
    ] = None,
) -> None:
    """Make a dataset of your own tables. Images stay where they are.

    Timestamps in milliseconds, microseconds, nanoseconds or as yyyymmdd become seconds; mixed units are refused. Quoted
    fields may span lines in the items' texts only: elsewhere a quote that hides rows is refused with its line.
    """
    from xsmoe.cli.commands.prepare import table

    table(
        out,
        make_display(),
        interactions=interactions,
        items=items,
        columns={"user": user_column, "item": item_column, "timestamp": timestamp_column},
        text_column=text_column,
        image_column=image_column,
        images_root=images_root,
    )


@prepare.command("catalogue")
def prepare_catalogue(
    out: Out,
    windows: Annotated[int, typer.Option(help="Windows of the stream, between which the world drifts.")] = 6,
    users: Annotated[int, typer.Option(help="Users that are active in a window.")] = 800,
    items: Annotated[int, typer.Option(help="Items at the start; more arrive with every window.")] = 600,
    seed: Annotated[int, typer.Option(help="The same seed draws the same catalogue.")] = 0,
    returning: Annotated[
        int, typer.Option(help="Regimes of tastes that alternate, a window each, and come back; 0: the world drifts.")
    ] = 0,
) -> None:
    """Make a synthetic dataset with drawn images and captions, whose users follow what items look and read like."""
    from xsmoe.cli.commands.prepare import catalogue

    catalogue(out, make_display(), seed=seed, windows=windows, users=users, items=items, returning=returning)


def encode(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="The dataset's folder.", show_default=False)],
    store: Annotated[Path, typer.Argument(metavar="STORE", help="The store's folder.", show_default=False)],
    text: Annotated[
        str | None,
        typer.Option(help="The text encoder: a folder, a Hugging Face name, or minilm.", show_default="none"),
    ] = None,
    image: Annotated[
        str | None, typer.Option(help="The image encoder: a folder or a Hugging Face name.", show_default="none")
    ] = None,
    pooling: Annotated[str, typer.Option(help="Over tokens: mean, or cls as in the paper.")] = "mean",
    levels: Annotated[
        str | None, typer.Option(help="Layers to take, such as 0,6,12.", show_default="first, middle and last")
    ] = None,
    dtype: Annotated[str, typer.Option(help="What is stored: float16, bfloat16 or float32.")] = "float16",
    compute_dtype: Annotated[str, typer.Option(help="What the encoders compute in.")] = "float32",
    batch_size: Annotated[int, typer.Option(help="Texts or images that go through an encoder at once.")] = 64,
    max_tokens: Annotated[int, typer.Option(help="Texts are cut to so many tokens.")] = 40,
    image_size: Annotated[int | None, typer.Option(help="In pixels.", show_default="the encoder's own")] = None,
    device: Annotated[str, typer.Option(help="Where the encoders compute: cpu, cuda, cuda:1.")] = "cpu",
) -> None:
    """Encode a dataset's items with frozen encoders into a hidden-state store.

    The same command goes on after an interruption. Items that the store holds already are not encoded again, even if
    their texts or images have changed since: encode into a new folder then.
    """
    from xsmoe.cli.commands.encode import EncodeSettings
    from xsmoe.cli.commands.encode import encode as run_encode

    settings = EncodeSettings(
        text=text,
        image=image,
        pooling=pooling,  # type: ignore[arg-type] # the encoder checks it
        levels=_numbers("levels", levels),
        dtype=dtype,
        compute_dtype=compute_dtype,
        max_tokens=max_tokens,
        image_size=image_size,
        batch_size=batch_size,
        device=device,
    )
    run_encode(dataset, store, settings, make_display())


def _numbers(name: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{name} must be whole numbers with commas between them, not {text!r}") from None
