"""Training a run over a dataset's stream, from its beginning or from where it was left."""

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
from xsmoe.stream.config import MAY_CHANGE
from xsmoe.stream.precision import autocast_dtype
from xsmoe.stream.profiling import require_folder
from xsmoe.stream.trainer import Listener


def train(folder: Path, given: Mapping[str, Any], display: Display, *, profile: Path | None = None) -> None:
    """Trains until all windows are done, and reports.

    Args:
        folder: of the run; one that is there goes on.
        given: the settings that were named, see `RunConfig.new`.
        display: where progress is shown.
        profile: the folder of a profile of the first steps; None for none.

    Raises:
        ValueError: a mistake in the settings, or settings that differ from those of the run that is there.
    """
    config = _settle(folder, given)
    check_device(config.stream.device)
    autocast_dtype(config.stream)
    if profile is not None:
        require_folder(profile)
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
    """Lets a trainer work, shows and records what happens, and writes the report.

    Args:
        folder, config: of the run.
        stream: its windows and features.
        display: where progress is shown.
        work: what the trainer does.
        of: windows there are in all.
        show_past: whether windows that were done before are shown too.
        profile: the folder of a profile of the first steps; None for none.
    """
    shown = TrainingDisplay(display, config.modalities, of)
    listeners: list[Listener] = [shown]

    def tell(event: str, fields: dict[str, Any]) -> None:
        for listen in listeners:
            listen(event, fields)

    with StreamingTrainer(
        config.build_model(),
        stream,
        config.stream,
        folder=folder,
        listener=tell,
    ) as trainer:
        shown.past(trainer.metrics, show=show_past)
        with TensorBoard(folder / "tensorboard", trainer.metrics) as board, shown:
            listeners.append(board)
            with profiled(profile, trainer.device, display, listeners):
                work(trainer)
        shown.finish()
        if trainer.progress.epoch is not None:
            display.warn("a window that came by `xsmoe update` was cut short; run that update again to go on with it")
        metrics = trainer.metrics
    show_comparison(metrics, display)
    display.say(f"Report: {write_report(folder, metrics)}")


def show_comparison(metrics: list[dict[str, Any]], display: Display) -> None:
    """Show what the model is worth beside the baselines, over all tests, and what the run cost."""
    tests = [line for line in metrics if line["kind"] == "test"]
    compared = results.compare(tests)
    if compared:
        display.say()
        display.heading(
            f"All tests: {len(tests)} windows, {compared[0].users} users tested; the last item of each, ± one standard "
            "error over users"
        )
        show_tests(tests, display)
    if (without := results.left_out(metrics)) is not None:
        display.say(f"{without}.", wrap=True)
    if (spent := results.cost(metrics)) is not None:
        display.say(f"Cost: {spent}.", wrap=True)


def show_tests(tests: Sequence[Mapping[str, Any]], display: Display) -> None:
    """Show tables of tests and the verdict; the tables only where somebody was tested."""
    compared, groups, verdict = results.compare(tests), results.groups(tests), judge(tests)
    if compared:
        display.lines(tables.aligned(tables.comparison_rows(compared)))
    if groups:
        display.say()
        display.heading("All targets: means by group, under both masks")
        display.lines(tables.aligned(tables.group_rows(groups)))
        display.say(tables.GROUPS_LEGEND, style="dim", wrap=True)
    style = "bold green" if verdict.verdict == "above" else "bold yellow"
    display.say(f"Verdict: {verdict.verdict}. {verdict}", style=style, wrap=True)


def say_dropped(stream: Stream, display: Display) -> None:
    """Tells of interactions that did not enter the stream."""
    dropped = stream.dropped
    if dropped.not_encoded:
        display.warn(f"{dropped.not_encoded} interactions are left out: their items are not in the store")
    if dropped.lacking_modality:
        display.warn(
            f"{dropped.lacking_modality} interactions are left out: their items lack a modality (a run that is started "
            "with --missing zero keeps them)"
        )
    if dropped.duplicates:
        display.warn(
            f"{dropped.duplicates} interactions are left out: they repeat another's user, item and time (a run that is "
            "started with --duplicates keep keeps them)"
        )


def say_ties(log: Interactions, config: RunConfig, display: Display) -> None:
    """Warn where the file's order enters the windows, since a model can learn it."""
    if config.stream.ties != "file":
        return
    share = summarize_log(log).shared_time
    if share:
        display.warn(
            f"{100 * share:.1f} % of interactions share their time with another of the same user and stand in the "
            "file's order (ties is file); if the file was sorted, by item for instance, that order can be learned and "
            "quality looks better than it is: a run that is started with --ties hash does not use it"
        )


def say_notes(notes: Sequence[str], display: Display) -> None:
    """Show what was unusual in a file."""
    for note in notes:
        display.say(note)


def cut_settings(config: RunConfig) -> dict[str, Any]:
    """The settings of a run that `Stream.build` and `Stream.next_window` take beside its modalities."""
    stream = config.stream
    return {
        "protocol": stream.protocol,
        "ties": stream.ties,
        "duplicates": stream.duplicates,
        "seed": stream.seed,
    }


def _settle(folder: Path, given: Mapping[str, Any]) -> RunConfig:
    if (folder / CONFIG).exists():
        before = config = RunConfig.read(folder)
        # What the run was made of may have been moved since; the trainer checks that the contents are the same.
        if "dataset" in given and not config.dataset.exists():
            config = replace(config, dataset=Path(given["dataset"]).resolve())
        if "store" in given and not config.store.exists():
            config = replace(config, store=Path(given["store"]).resolve())
        config.require(given, folder)
        changed = {name: given[name] for name in MAY_CHANGE if name in given}
        config = replace(config, stream=replace(config.stream, **changed))
        if config != before:
            config.write(folder)
        return config
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is no folder; a run needs one of its own")
    for name in ("dataset", "store"):
        if name not in given:
            raise ValueError(f"{folder} holds no run yet, and a new one needs --{name}")
    return RunConfig.new(given, HiddenStateStore.open(given["store"]))


def _require_same_users(folder: Path, stream: Stream) -> None:
    """An update adds users behind those of the dataset, which must still be the same."""
    known = read_users(folder, ())[: len(stream.user_ids)]
    if known.tolist() != stream.user_ids.tolist():
        raise ValueError(
            f"the dataset's users are not those in {folder / USERS}: the dataset or the store has changed since "
            "the run began; restore it, or start another run"
        )
