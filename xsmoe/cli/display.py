"""Output of the commands: lines, and progress as a bar on a terminal or as occasional lines in a log."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from xsmoe.extras import extra

with extra("train"):
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

QUIET_SECONDS = 15.0
LOG_WIDTH = 160

Advance = Callable[[int, int], None]


class Display:
    """Writes to the standard output of the time of its creation.

    Attributes:
        live: whether the output is a terminal that can redraw lines.
        width: largest width of a table, in characters.
    """

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        self.live = self.console.is_interactive and self.console.file.isatty()
        self.width = self.console.width if self.live else LOG_WIDTH

    def say(self, text: str = "", style: str | None = None, *, wrap: bool = False) -> None:
        """Write text unchanged, for programs that read logs. With `wrap`, a terminal wraps it between words."""
        self.console.print(text, style=style, markup=False, soft_wrap=not (wrap and self.live))

    def heading(self, text: str) -> None:
        """Write a heading."""
        self.say(text, style="bold", wrap=True)

    def warn(self, text: str) -> None:
        """Write a warning."""
        self.say(f"warning: {text}", style="yellow")

    def lines(self, lines: Sequence[str]) -> None:
        """Write several lines."""
        for line in lines:
            self.say(line)

    @contextmanager
    def progress(self, label: str) -> Iterator[Advance]:
        """Show progress inside the block. Yield a function to be called with the finished and the total amount."""
        if not self.live:
            yield Throttle(lambda done, total: self.say(f"{label}: {done} of {total}"))
            return
        with bar(self.console) as progress:
            task = progress.add_task(label, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)

    @contextmanager
    def working(self, label: str) -> Iterator[None]:
        """Show activity on a terminal, for work of unknown length."""
        if self.live:
            with self.console.status(label):
                yield
        else:
            yield


class Throttle:
    """Forwards calls to a function, but at most one in each interval, and none in the first interval."""

    def __init__(self, function: Callable[[int, int], None], seconds: float = QUIET_SECONDS) -> None:
        self._function = function
        self._seconds = seconds
        self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._last >= self._seconds:
            self._last = time.monotonic()
            self._function(done, total)


def bar(console: Console, *, remaining: bool = True) -> Progress:
    """Return a progress bar that disappears at the end. With `remaining` it shows the estimated remaining time."""
    columns = [TextColumn("{task.description}"), BarColumn(bar_width=16), MofNCompleteColumn(), TimeElapsedColumn()]
    return Progress(
        *columns,
        *([TimeRemainingColumn()] if remaining else []),
        console=console,
        transient=True,
    )
