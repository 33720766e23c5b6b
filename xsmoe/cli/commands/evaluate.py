"""Command `xsmoe evaluate`: test a run's model without training it."""

from pathlib import Path

from xsmoe.cli.commands.train import cut_settings, say_dropped, say_notes, show_comparison, show_tests
from xsmoe.cli.display import Display
from xsmoe.cli.run_config import RunConfig
from xsmoe.cli.trained_run import TrainedRun
from xsmoe.data import read_interactions
from xsmoe.report import results, tables
from xsmoe.stream import Stream, StreamConfig
from xsmoe.stream.evaluation.window_evaluation import evaluate_window
from xsmoe.stream.state.run_folder import read_metrics


def evaluate(
    folder: Path, interactions: Path | None, device: str | None, display: Display, *, targets: str | None = None
) -> None:
    """Test a run's model on interactions, or show the tests recorded in training.

    Args:
        folder: folder of the run.
        interactions: a .csv or .parquet file with the columns user, item and timestamp; None shows the recorded tests.
        device: device of the model; None uses the device of the training.
        display: display of the command.
        targets: items of a user's sequence that are ranked, "all" or "last"; None uses the run's setting.

    Raises:
        ValueError: there is no run or no recorded test, targets are given without interactions, or the file is invalid.
    """
    if interactions is None:
        if targets is not None:
            raise ValueError("--targets needs --interactions: recorded tests were ranked with the run's setting")
        _show_recorded(folder, display)
        return
    log = read_interactions(interactions)
    run = TrainedRun.load(folder, device)
    config = run.config
    settings = StreamConfig.from_dict(run.stream.to_dict() | ({} if targets is None else {"targets": targets}))
    stream = Stream.next_window(
        log,
        run.store,
        len(run.windows),
        run.users,
        modalities=config.modalities,
        missing=config.missing,
        **cut_settings(config),
    )
    say_notes(log.notes, display)
    say_dropped(stream, display)
    splits = settings.split(stream.windows[0])
    if not len(splits.test):
        raise ValueError(
            f"{interactions}: no user has at least {max(2, run.stream.k_core)} usable interactions (k_core is "
            f"{run.stream.k_core}), so there is nothing to test; add interactions"
        )
    few = len(stream.windows[0]) - len(splits.all_pairs[0])
    if few:
        display.warn(
            f"{few} interactions are left out: their users have fewer than {settings.k_core} in the file (k_core)"
        )
    display.say(f"The model after window {len(run.windows) - 1}, tested on {len(stream.windows[0])} interactions:")
    with display.working("Ranking all items for every user"):
        tested = evaluate_window(run.model, run.features(), splits, run.seen_items(), settings)
    cold = tested["cold"]
    display.say(
        f"{tested['all']['users']} users, {tested['candidates']} candidates; {cold['users']} last items were never "
        f"trained on (HR@10 {tables.percent(cold['HR@10'])} %, NDCG@10 {tables.percent(cold['NDCG@10'])} %)"
    )
    show_tests([tested], display)


def _show_recorded(folder: Path, display: Display) -> None:
    config = RunConfig.read(folder)
    metrics = read_metrics(folder)
    tested = [result for result in results.window_results(metrics) if result.test is not None]
    if not tested:
        raise ValueError(
            f"{folder} has no recorded test yet, because its second window is missing; resume it with `xsmoe train`"
        )
    columns = tables.fit(tables.columns(config.modalities), display.width)
    for line in tables.header(columns):
        display.heading(line)
    display.lines([tables.row(columns, result) for result in tested])
    display.say(tables.LEGEND, style="dim", wrap=True)
    show_comparison(metrics, display)
