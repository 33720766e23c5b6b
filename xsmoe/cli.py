"""The command line `xsmoe`: what each command takes. What it does lies in `xsmoe.app`."""

import io
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

USER_ERRORS = (ValueError, TypeError, OSError)
"""What bad input raises everywhere in the library. Anything else is a bug, and keeps its traceback."""

# Which package UsageError lives in depends on typer's version.
UsageError: Any = typer.BadParameter.__bases__[0]
MISTAKE, INTERRUPTED = 2, 130
ORDER = ("demo", "info", "prepare", "encode", "train", "update", "evaluate", "recommend", "report")


class Commands(TyperGroup):
    """Turns a user's mistake into one line on standard error and exit code 2."""

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
            typer.echo(f"xsmoe: interrupted; what was done is kept, {again} goes on from there", err=True)
            raise typer.Exit(INTERRUPTED) from None


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _fail(message: str) -> int:
    typer.echo(f"xsmoe: error: {' '.join(message.split())}", err=True)
    return MISTAKE


app = typer.Typer(
    name="xsmoe",
    cls=Commands,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
prepare = typer.Typer(invoke_without_command=True)


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


Out = Annotated[Path, typer.Argument(metavar="OUT", help="The dataset's folder.", show_default=False)]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.", show_default=False)]
Device = Annotated[
    str | None,
    typer.Option("--device", help="Where to compute: cpu, cuda, cuda:1.", show_default="where the run was trained"),
]
Profile = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Profile a few of the first steps: a table of where their time goes, and DIR/trace.json.gz for "
        "https://ui.perfetto.dev. What is trained does not change.",
        show_default="no profile",
    ),
]
INTERACTIONS_HELP = "New interactions: .csv or .parquet with the columns user, item, timestamp (seconds since 1970)."


@app.command(rich_help_panel="First steps")
def demo(
    folder: Annotated[Path, typer.Option(help="Where everything goes; also the run's folder.")] = Path("runs/demo"),
    windows: Annotated[int, typer.Option(help="Windows of the stream.")] = 6,
    epochs: Annotated[int, typer.Option(help="The most epochs a window.")] = 30,
    users: Annotated[int, typer.Option(help="Users that are active in a window.")] = 800,
    items: Annotated[int, typer.Option(help="Items at the start; more arrive with every window.")] = 600,
    seed: Annotated[int, typer.Option(help="Of the catalogue, the encoders and the training.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove what an earlier demo left, and start anew.")] = False,
) -> None:
    """Stream a synthetic catalogue that drifts, with texts and images: all stages, in a few minutes.

    Stages that are done are not done again; a demo that was interrupted goes on, a finished one shows its results.
    """
    from xsmoe.app.demo import DemoSettings
    from xsmoe.app.demo import demo as run_demo

    settings = DemoSettings(windows=windows, epochs=epochs, users=users, items=items, seed=seed)
    run_demo(folder, settings, _display(), fresh=fresh)


@app.command(rich_help_panel="First steps")
def info(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Show versions, devices, and which backend serves each operator and why the others do not."""
    from xsmoe.app.info import info as show_info

    show_info(_display(), as_json=as_json)


@prepare.callback()
def prepare_root(ctx: typer.Context) -> None:
    """Make a dataset: out of MovieLens, out of your own tables, or a synthetic one.

    A dataset is a folder with interactions.parquet (user, item, timestamp) and items.parquet (item, text, image).
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
    from xsmoe.app.prepare import movielens

    movielens(source, out, _display())


@prepare.command("table")
def prepare_table(
    out: Out,
    interactions: Annotated[Path, typer.Option(help="The log: .csv or .parquet.", show_default=False)],
    items: Annotated[Path, typer.Option(help="The items: .csv or .parquet.", show_default=False)],
    user_column: Annotated[str, typer.Option(help="The users' ids in the log.")] = "user",
    item_column: Annotated[str, typer.Option(help="The items' ids in both files.")] = "item",
    timestamp_column: Annotated[str, typer.Option(help="Whole seconds since 1970, in the log.")] = "timestamp",
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
    """Make a dataset of your own tables. Images stay where they are."""
    from xsmoe.app.prepare import table

    table(
        out,
        _display(),
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
) -> None:
    """Make a synthetic dataset with drawn images and captions, whose users follow what items look and read like."""
    from xsmoe.app.prepare import catalogue

    catalogue(out, _display(), seed=seed, windows=windows, users=users, items=items)


app.add_typer(prepare, name="prepare", rich_help_panel="Data")


@app.command(rich_help_panel="Data")
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
    from xsmoe.app.encode import EncodeSettings
    from xsmoe.app.encode import encode as run_encode

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
    run_encode(dataset, store, settings, _display())


def _setting(default: object, help_text: str, panel: str, *names: str) -> Any:
    """An option whose absence is known as None, since a run that goes on keeps the settings it was started with."""
    text = help_text if default is None else f"{help_text} Default: {default}."
    return typer.Option(*names, help=text, show_default=False, rich_help_panel=panel)


STREAM, MODEL, TRAINING, MACHINE = "Stream", "Model", "Training", "Machine"


@app.command(rich_help_panel="Runs")
def train(
    ctx: typer.Context,
    run: Run,
    dataset: Annotated[Path | None, _setting(None, "The dataset's folder; needed at the start.", STREAM)] = None,
    store: Annotated[Path | None, _setting(None, "The hidden-state store; needed at the start.", STREAM)] = None,
    windows: Annotated[int | None, _setting(10, "Windows of equally many interactions.", STREAM)] = None,
    modalities: Annotated[str | None, _setting("all", "Which of the store's, such as image,text.", STREAM)] = None,
    missing: Annotated[str | None, _setting("drop", "Items that lack a modality: drop or zero.", STREAM)] = None,
    protocol: Annotated[
        str | None, _setting("default", "default, or paper: evaluation as published, to the letter.", STREAM)
    ] = None,
    k_core: Annotated[int | None, _setting(5, "Interactions a user needs in a window.", STREAM)] = None,
    train_fraction: Annotated[float | None, _setting(0.85, "Share of a window that trains.", STREAM)] = None,
    max_inputs: Annotated[int | None, _setting(10, "A user's last items that are looked at.", STREAM)] = None,
    repeats: Annotated[
        str | None, _setting("rank", "A target that the user met before: rank it, or miss.", STREAM)
    ] = None,
    validation_candidates: Annotated[
        str | None, _setting("known", "Validation ranks all known items, or those of the split.", STREAM)
    ] = None,
    rank: Annotated[int | None, _setting(64, "Width of an expert's bottleneck.", MODEL)] = None,
    out_dim: Annotated[int | None, _setting(128, "Width of an item embedding.", MODEL)] = None,
    top_k: Annotated[int | None, _setting("all", "Experts that an item goes through.", MODEL)] = None,
    expand: Annotated[
        bool | None, _setting("yes", "Whether every window adds an expert.", MODEL, "--expand/--no-expand")
    ] = None,
    prune: Annotated[
        bool | None, _setting("yes", "Whether little-used experts are dropped.", MODEL, "--prune/--no-prune")
    ] = None,
    prune_threshold: Annotated[float | None, _setting(0.1, "Share of use below which one is.", MODEL)] = None,
    new_gate: Annotated[str | None, _setting("random", "A new expert's gate: random or mean.", MODEL)] = None,
    batch_size: Annotated[int | None, _setting(256, "Users a step.", TRAINING)] = None,
    epochs: Annotated[int | None, _setting(100, "The most epochs a window.", TRAINING)] = None,
    warmup_epochs: Annotated[int | None, _setting(5, "First epochs without validation.", TRAINING)] = None,
    patience: Annotated[int | None, _setting(5, "Validations without a better one, then stop.", TRAINING)] = None,
    lr: Annotated[float | None, _setting(0.001, "Adam's learning rate.", TRAINING)] = None,
    lr_decay: Annotated[float | None, _setting(0.95, "Its factor per epoch.", TRAINING)] = None,
    min_lr: Annotated[float | None, _setting(0.0001, "Its floor.", TRAINING)] = None,
    seed: Annotated[int | None, _setting(0, "Of weights, order and dropout.", TRAINING)] = None,
    device: Annotated[str | None, _setting("cpu", "cpu, cuda, cuda:1.", MACHINE)] = None,
    precision: Annotated[
        str | None,
        _setting(
            "auto",
            "float32, bfloat16, float16 (CUDA, with a loss scaler), or auto: float32 on a CPU, on CUDA bfloat16, with "
            "--protocol paper float16.",
            MACHINE,
        ),
    ] = None,
    graph: Annotated[
        bool | None,
        _setting(
            "no",
            "Whether steps on CUDA are replayed as CUDA graphs, which no GPU has tried yet.",
            MACHINE,
            "--graph/--no-graph",
        ),
    ] = None,
    store_gib: Annotated[
        float | None,
        _setting(
            "a quarter of what is free on a GPU",
            "GiB of the device that hidden states may take; beyond, or with 0, each step copies its rows. May change.",
            MACHINE,
        ),
    ] = None,
    profile: Profile = None,
) -> None:
    """Train a run over a dataset's stream, or go on with the one that is in RUN.

    The same command goes on where an interrupted run stopped, and ends with the numbers of an undisturbed one. A run
    keeps the settings it was started with: those left out are the run's, others are refused.
    """
    from xsmoe.app.train import train as run_train

    given = {name: value for name, value in ctx.params.items() if value is not None and name not in ("run", "profile")}
    if modalities is not None:
        given["modalities"] = tuple(name.strip() for name in modalities.split(","))
    run_train(run, given, _display(), profile=profile)


@app.command(rich_help_panel="Runs")
def update(
    run: Run,
    interactions: Annotated[Path, typer.Option(help=INTERACTIONS_HELP, show_default=False)],
    items: Annotated[
        Path | None, typer.Option(help="New items: item, text, image.", show_default="no new items")
    ] = None,
    images_root: Annotated[
        Path | None,
        typer.Option(help="What image paths are relative to.", show_default="the folder of the items' file"),
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Where the store's text encoder lies.", show_default="where it was")
    ] = None,
    image: Annotated[
        str | None, typer.Option(help="Where the store's image encoder lies.", show_default="where it was")
    ] = None,
    profile: Profile = None,
) -> None:
    """Go on with a finished run as new interactions, users and items arrive.

    They become the next window: the model is tested on them, grows and trains. New items are encoded first. The same
    command goes on after an interruption, and does nothing if these interactions were trained on before.
    """
    from xsmoe.app.update import update as run_update

    encoders = {name: path for name, path in (("text", text), ("image", image)) if path is not None}
    run_update(run, interactions, items, images_root, encoders, _display(), profile=profile)


@app.command(rich_help_panel="Runs")
def evaluate(
    run: Run,
    interactions: Annotated[
        Path | None, typer.Option(help=INTERACTIONS_HELP, show_default="the tests that training recorded")
    ] = None,
    device: Device = None,
) -> None:
    """Test a run's model on interactions without training on them, or show the tests that training recorded."""
    from xsmoe.app.evaluate import evaluate as run_evaluate

    run_evaluate(run, interactions, device, _display())


@app.command(rich_help_panel="Runs")
def recommend(
    run: Run,
    user: Annotated[str, typer.Argument(metavar="USER", help="A user's id, as in the dataset.", show_default=False)],
    count: Annotated[int, typer.Option("-k", "--count", help="How many items.")] = 10,
    device: Device = None,
) -> None:
    """Show a user's last items and, of those the user has not met, the ones that score highest."""
    from xsmoe.app.recommend import recommend as run_recommend

    run_recommend(run, user, count, device, _display())


@app.command(rich_help_panel="Runs")
def report(run: Run) -> None:
    """Write a run's report again: plots and one page, report/report.html, that needs nothing else."""
    from xsmoe.app.report import report as run_report

    run_report(run, _display())


def _display() -> Any:
    from xsmoe.app.display import Display

    return Display()


def _numbers(name: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{name} must be whole numbers with commas between them, not {text!r}") from None
