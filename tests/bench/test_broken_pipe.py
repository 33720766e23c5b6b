"""`python -m bench ... | head`: a closed pipe ends a command without a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.cli import all as all_command
from bench.cli import stream
from bench.cli.broken_pipe import BROKEN_PIPE, run_and_exit
from bench.core.machine import ROOT


def unread(*arguments: str) -> tuple[int, str]:
    """Return the exit code and standard error of a command whose output nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ran = subprocess.run(
            [sys.executable, "-m", *arguments], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True
        )
    finally:
        os.close(writing)
    return ran.returncode, ran.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench.report.slowdowns", "--passes"],
        ["bench", "kernels", "route_topk", "--sizes", "N=5", "E=3", "--variants", "ours", "--seconds", "0.01"],
    ],
    ids=lambda arguments: " ".join(arguments[:3]),
)
def test_a_closed_pipe_ends_a_command_quietly(arguments: list[str]) -> None:
    assert unread(*arguments) == (BROKEN_PIPE, "")


def test_every_command_exits_in_that_way() -> None:
    for path in (ROOT / "bench").rglob("*.py"):
        _, begins, ends = path.read_text().partition('if __name__ == "__main__":\n')
        assert not begins or ends == "    run_and_exit(main)\n", path.name


def test_a_closed_pipe_is_not_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(*_: object) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(stream, "_show", shown)
    monkeypatch.setattr(stream.records, "load", lambda _: None)
    with pytest.raises(BrokenPipeError):
        main(["stream", "--show", str(tmp_path / "stream.json")])


def test_another_broken_pipe_is_an_error() -> None:
    def broken() -> int:
        raise BrokenPipeError("a subprocess ended")

    with pytest.raises(BrokenPipeError, match="a subprocess ended"):
        run_and_exit(broken)


@pytest.mark.parametrize(("ends", "code"), [(lambda: 1, 1), (lambda: sys.exit(2), 2)])
def test_exit_codes_are_those_of_the_command(ends: object, code: int) -> None:
    with pytest.raises(SystemExit) as end:
        run_and_exit(ends)  # type: ignore[arg-type]
    assert end.value.code == code


def test_a_part_of_all_does_not_catch_it(capsys: pytest.CaptureFixture[str]) -> None:
    class Gone:
        __name__ = "bench.cli.gone"

        @staticmethod
        def add_to(commands: object) -> None:
            raise BrokenPipeError

    parts: list[str] = []
    with pytest.raises(BrokenPipeError):
        all_command._run(Gone, ["gone"], parts)  # type: ignore[arg-type]
    assert parts == []
    assert capsys.readouterr().err == ""
