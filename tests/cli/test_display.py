"""Progress on a terminal and in a log."""

import os
import sys
from pathlib import Path

import pytest

from tests.cli.helpers import succeed
from xsmoe.cli.display import Display, Throttle
from xsmoe.report import tables


def test_a_log_gets_lines_only(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display()
    with display.progress("Working") as advance:
        for done in range(1, 4):
            advance(done, 3)
    display.warn("a [bold]bracket[/bold] stays")
    assert capsys.readouterr().out == "warning: a [bold]bracket[/bold] stays\n"


def test_a_long_line_is_not_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    Display().say("word " * 100)
    assert capsys.readouterr().out.count("\n") == 1


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.openpty()
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        display = Display()
        assert display.live
        with display.progress("Working") as advance:
            advance(1, 2)
        display.say("done")
        terminal.flush()
        shown = ""
        while "done" not in shown:
            shown += os.read(ours, 65536).decode()
    os.close(ours)
    assert "Working" in shown
    assert "1/2" in shown
    # The bar disappears before the next line.
    assert shown.rstrip().endswith("\x1b[2Kdone")


def test_throttle_calls_at_most_once_per_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    ticks: list[int] = []
    tick = Throttle(lambda done, total: ticks.append(done), seconds=10)
    for now in range(35):
        tick(int(now), 35)
    assert ticks == [10, 20, 30]


def test_a_table_fits_the_terminal() -> None:
    table = tables.columns(("image", "text"))
    for width in (200, 100, 80, 60, 40):
        kept = tables.fit(table, width)
        assert all(len(line) <= width for line in tables.header(kept))
        assert {"window", "model"} <= {column.title for column in kept}
    assert tables.fit(table, 200) == table


def test_catalogue_command_reports_its_result(tmp_path: Path) -> None:
    out = succeed("prepare", "catalogue", tmp_path / "c", "--windows", 2, "--users", 5, "--items", 32)
    assert "112 items (112 with a text, 112 with an image)" in out
