"""Commands that train, update and evaluate a run."""

from pathlib import Path
from typing import Annotated, Any

import typer

from xsmoe.cli.typer_group import make_display

Run = Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.", show_default=False)]
Device = Annotated[
    str | None,
    typer.Option("--device", help="Device: cpu, cuda, cuda:1.", show_default="the device of the training"),
]
Profile = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Profile some of the first steps: show a table of their time, and write DIR/trace.json.gz for "
        "https://ui.perfetto.dev. Results do not change.",
        show_default="no profile",
    ),
]
INTERACTIONS_HELP = "New interactions: .csv or .parquet with the columns user, item, timestamp (seconds since 1970)."
STREAM, MODEL, TRAINING, MACHINE = "Stream", "Model", "Training", "Machine"


def _setting(default: object, help_text: str, panel: str, *names: str) -> Any:
    """Return an option with default None. Only options that are given are compared with the settings of the run."""
    text = help_text if default is None else f"{help_text} Default: {default}."
    return typer.Option(*names, help=text, show_default=False, rich_help_panel=panel)


def train(
    ctx: typer.Context,
    run: Run,
    dataset: Annotated[Path | None, _setting(None, "The dataset's folder; required for a new run.", STREAM)] = None,
    store: Annotated[Path | None, _setting(None, "The hidden-state store; required for a new run.", STREAM)] = None,
    windows: Annotated[int | None, _setting(10, "Number of windows of equal interaction counts.", STREAM)] = None,
    modalities: Annotated[str | None, _setting("all", "Modalities of the store, such as image,text.", STREAM)] = None,
    missing: Annotated[str | None, _setting("drop", "Items that lack a modality: drop or zero.", STREAM)] = None,
    protocol: Annotated[
        str | None, _setting("default", "default, or paper: exactly the published evaluation.", STREAM)
    ] = None,
    ties: Annotated[
        str | None, _setting("hash", "Order of interactions with equal time: hash (seeded) or file.", STREAM)
    ] = None,
    duplicates: Annotated[
        str | None, _setting("drop", "Rows with the same user, item and time: drop or keep.", STREAM)
    ] = None,
    history: Annotated[
        str | None, _setting("all", "Train on all of a user's items in a window, or on the last ones.", STREAM)
    ] = None,
    targets: Annotated[
        str | None, _setting("all", "Items of a user's test sequence to rank: all or last.", STREAM)
    ] = None,
    k_core: Annotated[int | None, _setting(5, "Interactions that a user needs in a window.", STREAM)] = None,
    train_fraction: Annotated[float | None, _setting(0.85, "Share of a window for training.", STREAM)] = None,
    max_inputs: Annotated[int | None, _setting(10, "Number of a user's last items as inputs.", STREAM)] = None,
    repeats: Annotated[
        str | None, _setting("rank", "A target that the user has seen before: rank or miss.", STREAM)
    ] = None,
    validation_candidates: Annotated[
        str | None, _setting("known", "Validation ranks all known items, or those of the split.", STREAM)
    ] = None,
    rank: Annotated[int | None, _setting(64, "Width of an expert's bottleneck.", MODEL)] = None,
    out_dim: Annotated[int | None, _setting(128, "Width of an item embedding.", MODEL)] = None,
    condition: Annotated[
        str | None, _setting("whiten", "Conditioning of hidden states: whiten, standardize or none.", MODEL)
    ] = None,
    ids: Annotated[
        bool | None, _setting("yes", "Add a trainable embedding for each item.", MODEL, "--ids/--no-ids")
    ] = None,
    top_k: Annotated[int | None, _setting("all", "Number of experts for each item.", MODEL)] = None,
    expand: Annotated[
        bool | None, _setting("no", "Add an expert in every window.", MODEL, "--expand/--no-expand")
    ] = None,
    prune: Annotated[bool | None, _setting("no", "Remove little-used experts.", MODEL, "--prune/--no-prune")] = None,
    prune_threshold: Annotated[
        float | None, _setting(0.1, "With --prune: smallest utilization share to keep an expert.", MODEL)
    ] = None,
    new_gate: Annotated[
        str | None,
        _setting(
            "random",
            "With --expand: gate of a new expert: random, mean, or copy (a split that keeps the function).",
            MODEL,
        ),
    ] = None,
    grow: Annotated[
        str | None, _setting("every", "With --expand: windows that change experts: every or novelty.", MODEL)
    ] = None,
    prune_rule: Annotated[
        str | None,
        _setting("drop", "With --prune: drop a little-used expert, or merge it into the nearest one.", MODEL),
    ] = None,
    batch_size: Annotated[int | None, _setting(256, "Largest number of sequences in a step.", TRAINING)] = None,
    min_steps: Annotated[
        int | None, _setting(10, "Smallest number of steps in an epoch; small windows use smaller batches.", TRAINING)
    ] = None,
    epochs: Annotated[
        int | None, _setting("12, with --keep best 100", "Largest number of epochs for a window.", TRAINING)
    ] = None,
    warmup_epochs: Annotated[int | None, _setting(5, "Number of first epochs without validation.", TRAINING)] = None,
    patience: Annotated[
        int | None,
        _setting(
            "0, with --keep best 5",
            "Validations without improvement before training stops. 0: no early stopping.",
            TRAINING,
        ),
    ] = None,
    keep: Annotated[
        str | None, _setting("ema", "Weights that a window ends with: last, best or ema (moving average).", TRAINING)
    ] = None,
    id_dropout: Annotated[
        float | None, _setting(0.25, "Share of a batch's items without their ID embedding.", TRAINING)
    ] = None,
    lr: Annotated[float | None, _setting(0.001, "Adam's learning rate.", TRAINING)] = None,
    lr_decay: Annotated[float | None, _setting(0.95, "Factor of the learning rate per epoch.", TRAINING)] = None,
    min_lr: Annotated[float | None, _setting(0.0001, "Minimum of the learning rate.", TRAINING)] = None,
    seed: Annotated[int | None, _setting(0, "Seed of weights, order and dropout.", TRAINING)] = None,
    device: Annotated[str | None, _setting("cpu", "Device: cpu, cuda, cuda:1.", MACHINE)] = None,
    precision: Annotated[
        str | None,
        _setting(
            "auto",
            "float32, bfloat16, float16 (CUDA only, with a loss scaler), or auto: float32 on a CPU, bfloat16 on CUDA, "
            "float16 on CUDA with --protocol paper.",
            MACHINE,
        ),
    ] = None,
    graph: Annotated[
        bool | None,
        _setting(
            "no",
            "Replay steps on CUDA as CUDA graphs. Not tested on a GPU yet.",
            MACHINE,
            "--graph/--no-graph",
        ),
    ] = None,
    store_gib: Annotated[
        float | None,
        _setting(
            "a quarter of the free memory",
            "Limit in GiB for hidden states on the device. Above it, or with 0, steps copy rows. May change on resume.",
            MACHINE,
        ),
    ] = None,
    profile: Profile = None,
) -> None:
    """Train a run over a dataset's stream, or resume the run in RUN.

    The same command resumes an interrupted run. The results equal those of an uninterrupted run. A run keeps its
    settings: options that are not given keep the run's values, and other values are an error.
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
        Path | None,
        typer.Option(help="New items, with the columns item, text, image.", show_default="no new items"),
    ] = None,
    images_root: Annotated[
        Path | None,
        typer.Option(help="Base folder of relative image paths.", show_default="the folder of the items' file"),
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Location of the store's text encoder.", show_default="its earlier location")
    ] = None,
    image: Annotated[
        str | None, typer.Option(help="Location of the store's image encoder.", show_default="its earlier location")
    ] = None,
    profile: Profile = None,
) -> None:
    """Update a finished run with new interactions, users and items.

    They are the next window: the model is tested on them, grown and trained. New items are encoded first. The same
    command resumes after an interruption. It does nothing if the run was trained on these interactions before.
    """
    from xsmoe.cli.commands.update import update as run_update

    encoders = {name: path for name, path in (("text", text), ("image", image)) if path is not None}
    run_update(run, interactions, items, images_root, encoders, make_display(), profile=profile)


def evaluate(
    run: Run,
    interactions: Annotated[
        Path | None, typer.Option(help=INTERACTIONS_HELP, show_default="the tests recorded in training")
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(help="Items of a user's test sequence to rank: all or last.", show_default="the run's setting"),
    ] = None,
    device: Device = None,
) -> None:
    """Test a run's model on interactions without training on them, or show the tests recorded in training."""
    from xsmoe.cli.commands.evaluate import evaluate as run_evaluate

    run_evaluate(run, interactions, device, make_display(), targets=targets)


def recommend(
    run: Run,
    user: Annotated[str, typer.Argument(metavar="USER", help="A user's id, as in the dataset.", show_default=False)],
    count: Annotated[int, typer.Option("-k", "--count", help="Number of items.")] = 10,
    device: Device = None,
) -> None:
    """Show a user's last items, and the items with the highest scores that the user has not seen."""
    from xsmoe.cli.commands.recommend import recommend as run_recommend

    run_recommend(run, user, count, device, make_display())


def report(run: Run) -> None:
    """Write a run's report again: plots, and report/report.html, a single self-contained page."""
    from xsmoe.cli.commands.report import report as run_report

    run_report(run, make_display())
