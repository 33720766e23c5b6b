"""Commands that train a run, go on with it, and show what it has learned."""

from pathlib import Path
from typing import Annotated, Any

import typer

from xsmoe.cli.typer_group import make_display

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
STREAM, MODEL, TRAINING, MACHINE = "Stream", "Model", "Training", "Machine"


def _setting(default: object, help_text: str, panel: str, *names: str) -> Any:
    """An option whose absence is known as None, since a run that goes on keeps the settings it was started with."""
    text = help_text if default is None else f"{help_text} Default: {default}."
    return typer.Option(*names, help=text, show_default=False, rich_help_panel=panel)


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
    ties: Annotated[
        str | None, _setting("hash", "Order of interactions of equal time: a seeded hash, or the file's.", STREAM)
    ] = None,
    duplicates: Annotated[
        str | None, _setting("drop", "Rows that repeat a user, item and time: drop or keep.", STREAM)
    ] = None,
    history: Annotated[
        str | None, _setting("all", "Train on all of a user's items in a window, or the last ones.", STREAM)
    ] = None,
    targets: Annotated[
        str | None, _setting("all", "Items of a user's test sequence to rank: all, or the last.", STREAM)
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
    condition: Annotated[
        str | None, _setting("whiten", "Hidden states are conditioned: whiten, standardize or none.", MODEL)
    ] = None,
    ids: Annotated[
        bool | None, _setting("yes", "Whether each item has an embedding beside its content.", MODEL, "--ids/--no-ids")
    ] = None,
    top_k: Annotated[int | None, _setting("all", "Experts that an item goes through.", MODEL)] = None,
    expand: Annotated[
        bool | None, _setting("no", "Whether every window adds an expert.", MODEL, "--expand/--no-expand")
    ] = None,
    prune: Annotated[
        bool | None, _setting("no", "Whether little-used experts are dropped.", MODEL, "--prune/--no-prune")
    ] = None,
    prune_threshold: Annotated[
        float | None, _setting(0.1, "With --prune: share of use below which one is.", MODEL)
    ] = None,
    new_gate: Annotated[
        str | None,
        _setting(
            "random", "With --expand, a new expert's gate: random, mean, or copy: a split that changes nothing.", MODEL
        ),
    ] = None,
    grow: Annotated[
        str | None, _setting("every", "With --expand, windows that change experts: every, or those of novelty.", MODEL)
    ] = None,
    prune_rule: Annotated[
        str | None,
        _setting("drop", "With --prune, a little-used expert: drop it, or merge it into the nearest.", MODEL),
    ] = None,
    batch_size: Annotated[int | None, _setting(256, "The most sequences a step.", TRAINING)] = None,
    min_steps: Annotated[
        int | None, _setting(10, "Least steps of an epoch: batches of small windows shrink.", TRAINING)
    ] = None,
    epochs: Annotated[int | None, _setting("12, with --keep best 100", "The most epochs a window.", TRAINING)] = None,
    warmup_epochs: Annotated[int | None, _setting(5, "First epochs without validation.", TRAINING)] = None,
    patience: Annotated[
        int | None,
        _setting("0, with --keep best 5", "Validations without a better one, then stop; 0 never stops.", TRAINING),
    ] = None,
    keep: Annotated[
        str | None, _setting("ema", "Weights of a window to keep: last, best or ema (their moving average).", TRAINING)
    ] = None,
    id_dropout: Annotated[
        float | None, _setting(0.25, "Share of a batch's items whose ID is left out.", TRAINING)
    ] = None,
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
            "a quarter of what is free",
            "GiB of memory on the device that hidden states may take; beyond, or with 0, steps copy rows. May change.",
            MACHINE,
        ),
    ] = None,
    profile: Profile = None,
) -> None:
    """Train a run over a dataset's stream, or go on with the one that is in RUN.

    The same command goes on where an interrupted run stopped, and ends with the numbers of an undisturbed one. A run
    keeps the settings it was started with: those left out are the run's, others are refused.
    """
    from xsmoe.cli.commands.train import train as run_train

    given = {name: value for name, value in ctx.params.items() if value is not None and name not in ("run", "profile")}
    if modalities is not None:
        given["modalities"] = tuple(name.strip() for name in modalities.split(","))
    run_train(run, given, make_display(), profile=profile)


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
    from xsmoe.cli.commands.update import update as run_update

    encoders = {name: path for name, path in (("text", text), ("image", image)) if path is not None}
    run_update(run, interactions, items, images_root, encoders, make_display(), profile=profile)


def evaluate(
    run: Run,
    interactions: Annotated[
        Path | None, typer.Option(help=INTERACTIONS_HELP, show_default="the tests that training recorded")
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(help="Items of a user's test sequence to rank: all, or the last.", show_default="the run's"),
    ] = None,
    device: Device = None,
) -> None:
    """Test a run's model on interactions without training on them, or show the tests that training recorded."""
    from xsmoe.cli.commands.evaluate import evaluate as run_evaluate

    run_evaluate(run, interactions, device, make_display(), targets=targets)


def recommend(
    run: Run,
    user: Annotated[str, typer.Argument(metavar="USER", help="A user's id, as in the dataset.", show_default=False)],
    count: Annotated[int, typer.Option("-k", "--count", help="How many items.")] = 10,
    device: Device = None,
) -> None:
    """Show a user's last items and, of those the user has not met, the ones that score highest."""
    from xsmoe.cli.commands.recommend import recommend as run_recommend

    run_recommend(run, user, count, device, make_display())


def report(run: Run) -> None:
    """Write a run's report again: plots and one page, report/report.html, that needs nothing else."""
    from xsmoe.cli.commands.report import report as run_report

    run_report(run, make_display())
