"""Display of a training run: a line for every finished window, and progress within the current one."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.progress import Progress, TaskID

from xsmoe.cli.display import Display, Throttle, bar
from xsmoe.report import results, tables


class TrainingDisplay:
    """A listener of `StreamingTrainer`. Use it as a context manager.

    Args:
        display: display of the command.
        modalities: modalities of the model.
        of: total number of windows.
    """

    def __init__(self, display: Display, modalities: Sequence[str], of: int) -> None:
        self._display = display
        self._columns = tables.fit(tables.columns(modalities), display.width)
        self._of = of
        self._metrics: list[Mapping[str, Any]] = []
        self._shown: set[int] = set()
        self._has_header = False
        self._status = ""
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._throttle = Throttle(lambda done, total: display.say(f"{self._status}, step {done} of {total}"))

    def __enter__(self) -> Self:
        if self._display.live:
            self._bar = bar(self._display.console, remaining=False)
            self._bar.start()
            self._task = self._bar.add_task("", total=None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def past(self, metrics: Sequence[Mapping[str, Any]], *, show: bool) -> None:
        """Add the metrics of earlier training. With `show`, show its windows."""
        self._metrics = list(metrics)
        if show:
            self._show_tested()
        else:
            self._shown |= {line["window"] for line in metrics if line["kind"] == "test"}

    def __call__(self, event: str, fields: Mapping[str, Any]) -> None:
        """Handle an event of the trainer."""
        if event == "resumed":
            at = "" if fields["epoch"] is None else f" and {fields['epoch']} epochs of the next one"
            self._display.say(f"Resuming after {fields['windows_done']} windows{at}.")
        elif event == "warning":
            self._display.warn(fields["message"])
        elif event == "begin":
            self._status = f"window {fields['window']}/{self._of - 1}: {fields['interactions']} interactions"
            self._update(0, None)
        elif event == "batch":
            if fields["done"] == 1:
                self._status = f"window {fields['window']}/{self._of - 1}, epoch {fields['epoch']}{self._quality()}"
            self._update(fields["done"], fields["of"])
            self._throttle(fields["done"], fields["of"])
        elif event in ("epoch", "window", "test"):
            self._metrics.append(fields)
            if event == "test":
                self._show_tested()

    def finish(self) -> None:
        """Show the last window, which was not tested on a later one."""
        for result in results.window_results(self._metrics):
            if result.trained is not None:
                self._show(result)
        if self._has_header:
            self._display.say(tables.LEGEND, style="dim", wrap=True)

    def _quality(self) -> str:
        """Return the last epoch's loss and validation if it belongs to this window."""
        last = self._metrics[-1] if self._metrics else None
        if last is None or last["kind"] != "epoch":
            return ""
        validation = last["validation"]
        scored = f", NDCG@10 {tables.percent(validation['NDCG@10'])} %" if validation is not None else ""
        return f", loss {last['loss']:.3f}{scored}"

    def _update(self, done: int, of: int | None) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=self._status, completed=done, total=of)

    def _show_tested(self) -> None:
        for result in results.window_results(self._metrics):
            if result.test is not None:
                self._show(result)

    def _show(self, result: results.WindowResult) -> None:
        if result.number in self._shown:
            return
        if not self._has_header:
            for line in tables.header(self._columns):
                self._display.heading(line)
            self._has_header = True
        self._display.say(tables.row(self._columns, result))
        self._shown.add(result.number)
