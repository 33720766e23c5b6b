"""What a person sees: lines, and progress as a bar on a terminal or as a note now and then in a log."""

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
    """Writes to standard output, as it is when the display is made.

    Attributes:
        live: whether it is a terminal that can redraw lines.
        width: characters that a line of a table may take.
    """

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        self.live = self.console.is_interactive and self.console.file.isatty()
        self.width = self.console.width if self.live else LOG_WIDTH

    def say(self, text: str = "", style: str | None = None, *, wrap: bool = False) -> None:
        """Lines as they are, for programs that read logs; `wrap` breaks long ones between words on a terminal."""
        self.console.print(text, style=style, markup=False, soft_wrap=not (wrap and self.live))

    def heading(self, text: str) -> None:
        """A line that begins a part."""
        self.say(text, style="bold", wrap=True)

    def warn(self, text: str) -> None:
        """A line that should not be missed."""
        self.say(f"warning: {text}", style="yellow")

    def lines(self, lines: Sequence[str]) -> None:
        """Several lines."""
        for line in lines:
            self.say(line)

    @contextmanager
    def progress(self, label: str) -> Iterator[Advance]:
        """Shows how far some work is: the function it gives is called with what is done and the total."""
        if not self.live:
            yield Ticker(lambda done, total: self.say(f"{label}: {done} of {total}"))
            return
        with bar(self.console) as progress:
            task = progress.add_task(label, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)

    @contextmanager
    def working(self, label: str) -> Iterator[None]:
        """Shows, on a terminal, that work goes on whose extent is not known."""
        if self.live:
            with self.console.status(label):
                yield
        else:
            yield


class Ticker:
    """Hands calls on to a function, but at most one in a while, and none at the start."""

    def __init__(self, tell: Callable[[int, int], None], seconds: float = QUIET_SECONDS) -> None:
        self._tell = tell
        self._seconds = seconds
        self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._last >= self._seconds:
            self._last = time.monotonic()
            self._tell(done, total)


def bar(console: Console, *, remaining: bool = True) -> Progress:
    """A progress bar that vanishes when it is done; `remaining` adds a guess at the time left."""
    columns = [TextColumn("{task.description}"), BarColumn(bar_width=16), MofNCompleteColumn(), TimeElapsedColumn()]
    return Progress(
        *columns,
        *([TimeRemainingColumn()] if remaining else []),
        console=console,
        transient=True,
    )
