"""Commands that create datasets and encode their items."""

from pathlib import Path
from typing import Annotated

import typer

from xsmoe.cli.typer_group import make_display

prepare = typer.Typer(invoke_without_command=True)

Out = Annotated[Path, typer.Argument(metavar="OUT", help="The dataset's folder.", show_default=False)]


@prepare.callback()
def prepare_root(ctx: typer.Context) -> None:
    """Create a dataset from MovieLens, from your own tables, or from a synthetic generator.

    A dataset is a folder with interactions.parquet (user, item, timestamp, row) and items.parquet (item, text, image).
    Every row of the log is kept with its row number. Repeats and ties are counted here and resolved by training.
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
    """Create a dataset from a MovieLens release in CSV format, such as ml-latest-small. Texts are titles and genres."""
    from xsmoe.cli.commands.prepare import movielens

    movielens(source, out, make_display())


@prepare.command("table")
def prepare_table(
    out: Out,
    interactions: Annotated[Path, typer.Option(help="Interaction log: .csv or .parquet.", show_default=False)],
    items: Annotated[Path, typer.Option(help="Items: .csv or .parquet.", show_default=False)],
    user_column: Annotated[str, typer.Option(help="Column of user ids in the log.")] = "user",
    item_column: Annotated[str, typer.Option(help="Column of item ids in both files.")] = "item",
    timestamp_column: Annotated[
        str, typer.Option(help="Column of timestamps in the log (seconds since 1970).")
    ] = "timestamp",
    text_column: Annotated[
        str | None, typer.Option(help="Column of item texts.", show_default="text, if it exists")
    ] = None,
    image_column: Annotated[
        str | None, typer.Option(help="Column of image paths.", show_default="image, if it exists")
    ] = None,
    images_root: Annotated[
        Path | None,
        typer.Option(help="Base folder of relative image paths.", show_default="the folder of the items' file"),
    ] = None,
) -> None:
    """Create a dataset from your own tables. Images are not copied.

    Timestamps in milliseconds, microseconds, nanoseconds or as yyyymmdd are converted to seconds. Mixed units are an
    error. Quoted fields may contain line breaks only in item texts. Elsewhere an open quote is an error with its line.
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
    windows: Annotated[int, typer.Option(help="Number of windows; tastes drift from window to window.")] = 6,
    users: Annotated[int, typer.Option(help="Active users in a window.")] = 800,
    items: Annotated[int, typer.Option(help="Items at the start; every window adds more.")] = 600,
    seed: Annotated[int, typer.Option(help="Seed of the catalogue.")] = 0,
    returning: Annotated[
        int, typer.Option(help="Number of taste regimes that alternate from window to window and return; 0: drift.")
    ] = 0,
) -> None:
    """Create a synthetic dataset with drawn images and captions. Its users' tastes depend on both."""
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
    pooling: Annotated[str, typer.Option(help="Pooling over tokens: mean, or cls as in the paper.")] = "mean",
    levels: Annotated[
        str | None, typer.Option(help="Layers to store, such as 0,6,12.", show_default="first, middle and last")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of the store: float16, bfloat16 or float32.")] = "float16",
    compute_dtype: Annotated[str, typer.Option(help="Dtype of the encoders' computation.")] = "float32",
    batch_size: Annotated[int, typer.Option(help="Number of texts or images in an encoder batch.")] = 64,
    max_tokens: Annotated[int, typer.Option(help="Texts are truncated to this number of tokens.")] = 40,
    image_size: Annotated[
        int | None, typer.Option(help="Image size in pixels.", show_default="the encoder's size")
    ] = None,
    device: Annotated[str, typer.Option(help="Device of the encoders: cpu, cuda, cuda:1.")] = "cpu",
) -> None:
    """Encode a dataset's items with frozen encoders into a hidden-state store.

    After an interruption, the same command resumes. Items in the store are not encoded again, even if their texts or
    images have changed. To encode these again, use a new folder.
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
        raise ValueError(f"{name} must be integers separated by commas, such as 0,6,12, not {text!r}") from None
