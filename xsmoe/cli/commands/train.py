"""Command `xsmoe train`: train a run on a dataset's stream, or resume it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from xsmoe.cli.commands.profile import profiled
from xsmoe.cli.commands.report import write_report
from xsmoe.cli.display import Display
from xsmoe.cli.run_config import CONFIG, USERS, RunConfig, check_device, read_users, write_users
from xsmoe.cli.tensorboard import TensorBoard
from xsmoe.cli.training_display import TrainingDisplay
from xsmoe.data import Dataset, Interactions, summarize_log
from xsmoe.encoders import HiddenStateStore
from xsmoe.report import results, tables
from xsmoe.report.verdict import judge
from xsmoe.stream import Stream, StreamingTrainer
from xsmoe.stream.config import CHANGEABLE_ON_RESUME
from xsmoe.stream.precision import autocast_dtype
from xsmoe.stream.profiling import require_writable_folder
from xsmoe.stream.trainer import Listener


def train(folder: Path, given: Mapping[str, Any], display: Display, *, profile: Path | None = None) -> None:
    """Train on all windows, and write the report.

    Args:
        folder: folder of the run. An existing run is resumed.
        given: the given settings, see `RunConfig.new`.
        display: display of the command.
        profile: folder for a profile of the first steps; None disables it.

    Raises:
        ValueError: a setting is invalid, or differs from the setting of the existing run.
    """
    config = _load_or_create_config(folder, given)
    check_device(config.stream.device)
    autocast_dtype(config.stream)
    if profile is not None:
        require_writable_folder(profile)
    dataset, store = Dataset.load(config.dataset), HiddenStateStore.open(config.store)
    stream = Stream.build(
        dataset.interactions,
        store,
        config.windows,
        modalities=config.modalities,
        missing=config.missing,
        **cut_settings(config),
    )
    say_notes(dataset.interactions.notes, display)
    say_dropped(stream, display)
    say_ties(dataset.interactions, config, display)
    if (folder / CONFIG).exists():
        _require_same_users(folder, stream)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_users(folder, stream.user_ids)
        config.write(folder)
    run_trainer(folder, config, stream, display, StreamingTrainer.fit, of=len(stream.windows), profile=profile)


def run_trainer(
    folder: Path,
    config: RunConfig,
    stream: Stream,
    display: Display,
    work: Callable[[StreamingTrainer], object],
    *,
    of: int,
    show_past: bool = True,
    profile: Path | None = None,
) -> None:
    """Create a trainer and call `work` with it, show and record its events, and write the report.

    Args:
        folder, config: folder and settings of the run.
        stream: windows and features of the run.
        display: display of the command.
        work: the work of the trainer.
        of: total number of windows.
        show_past: whether windows that were finished before are shown too.
        profile: folder for a profile of the first steps; None disables it.
    """
    shown = TrainingDisplay(display, config.modalities, of)
    listeners: list[Listener] = [shown]

    def notify(event: str, fields: dict[str, Any]) -> None:
        for listen in listeners:
            listen(event, fields)

    with StreamingTrainer(
        config.build_model(),
        stream,
        config.stream,
        folder=folder,
        listener=notify,
    ) as trainer:
        shown.past(trainer.metrics, show=show_past)
        with TensorBoard(folder / "tensorboard", trainer.metrics) as board, shown:
            listeners.append(board)
            with profiled(profile, trainer.device, display, listeners):
                work(trainer)
        shown.finish()
        if trainer.progress.epoch is not None:
            display.warn("training on a window of `xsmoe update` was interrupted; run that update again to resume it")
        metrics = trainer.metrics
    show_comparison(metrics, display)
    display.say(f"Report: {write_report(folder, metrics)}")


def show_comparison(metrics: list[dict[str, Any]], display: Display) -> None:
    """Show the results of model and baselines over all tests, and the cost of the run."""
    tests = [line for line in metrics if line["kind"] == "test"]
    compared = results.compare(tests)
    if compared:
        display.say()
        display.heading(
            f"All tests: {len(tests)} windows, {compared[0].users} users tested; last item of each user, ± one "
            "standard error over users"
        )
        show_tests(tests, display)
    if (without := results.left_out(metrics)) is not None:
        display.say(f"{without}.", wrap=True)
    if (spent := results.cost(metrics)) is not None:
        display.say(f"Cost: {spent}.", wrap=True)


def show_tests(tests: Sequence[Mapping[str, Any]], display: Display) -> None:
    """Show the verdict of tests, and their tables if any user was tested."""
    compared, groups, verdict = results.compare(tests), results.groups(tests), judge(tests)
    if compared:
        display.lines(tables.aligned(tables.comparison_rows(compared)))
    if groups:
        display.say()
        display.heading("All targets: means by group, for both maskings")
        display.lines(tables.aligned(tables.group_rows(groups)))
        display.say(tables.GROUPS_LEGEND, style="dim", wrap=True)
    style = "bold green" if verdict.verdict == "above" else "bold yellow"
    display.say(f"Verdict: {verdict.verdict}. {verdict}", style=style, wrap=True)


def say_dropped(stream: Stream, display: Display) -> None:
    """Warn about interactions that are not part of the stream."""
    dropped = stream.dropped
    if dropped.not_encoded:
        display.warn(f"{dropped.not_encoded} interactions are left out: their items are not in the store")
    if dropped.lacking_modality:
        display.warn(
            f"{dropped.lacking_modality} interactions are left out: their items lack a modality (to keep them, start a "
            "run with --missing zero)"
        )
    if dropped.duplicates:
        display.warn(
            f"{dropped.duplicates} interactions are left out: another one has the same user, item and time (to keep "
            "them, start a run with --duplicates keep)"
        )


def say_ties(log: Interactions, config: RunConfig, display: Display) -> None:
    """Warn if windows depend on the file's order, because a model can learn it."""
    if config.stream.ties != "file":
        return
    share = summarize_log(log).shared_time
    if share:
        display.warn(
            f"{100 * share:.1f} % of interactions have the same time as another one of the same user and keep the "
            "file's order (ties is file). If the file is sorted, for example by item, a model can learn this order and "
            "results are too good. To avoid this, start a run with --ties hash"
        )


def say_notes(notes: Sequence[str], display: Display) -> None:
    """Show notes on the conversion of a file."""
    for note in notes:
        display.say(note)


def cut_settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings that `Stream.build` and `Stream.next_window` need in addition to the modalities."""
    stream = config.stream
    return {
        "protocol": stream.protocol,
        "ties": stream.ties,
        "duplicates": stream.duplicates,
        "seed": stream.seed,
    }


def _load_or_create_config(folder: Path, given: Mapping[str, Any]) -> RunConfig:
    if (folder / CONFIG).exists():
        before = config = RunConfig.read(folder)
        # Dataset and store may have been moved. The trainer checks that their contents are the same.
        if "dataset" in given and not config.dataset.exists():
            config = replace(config, dataset=Path(given["dataset"]).resolve())
        if "store" in given and not config.store.exists():
            config = replace(config, store=Path(given["store"]).resolve())
        config.require(given, folder)
        changed = {name: given[name] for name in CHANGEABLE_ON_RESUME if name in given}
        config = replace(config, stream=replace(config.stream, **changed))
        if config != before:
            config.write(folder)
        return config
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; choose a new folder for the run")
    for name in ("dataset", "store"):
        if name not in given:
            raise ValueError(f"{folder} is not a run, and a new run needs --{name}; add this option")
    return RunConfig.new(given, HiddenStateStore.open(given["store"]))


def _require_same_users(folder: Path, stream: Stream) -> None:
    """Raise ValueError if the dataset's users differ from the first users of the run. Updates append users."""
    known = read_users(folder, ())[: len(stream.user_ids)]
    if known.tolist() != stream.user_ids.tolist():
        raise ValueError(
            f"the dataset's users differ from those in {folder / USERS}: the dataset or the store has changed since "
            "the run was started; restore it from a backup, or start another run"
        )
