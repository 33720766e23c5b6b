"""`python -m bench kernels` from end to end, its file, and usage errors."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.cli import kernels, profile
from bench.core import results
from bench.core.benchmark import Benchmark
from bench.e2e.memory import measure as memory_measure
from bench.report.tables import case_table
from tests.bench import helpers
from tests.bench.helpers import timing, unmeasured

TINY = ["--sizes", "N=67", "E=1,3", "D=24", "R=6", "--seconds", "0.01"]
NAMES = ["naive", "eager", "ours", "ours-recompute"]


def test_kernels_prints_the_machine_and_a_table_per_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "run.json"
    code = main(["kernels", "side_moe", *TINY, "--variants", ",".join(NAMES), "--json", str(path)])
    printed = capsys.readouterr().out
    assert code == 0
    first = printed.splitlines()[0]
    assert "threads" in first
    assert "torch" in first
    assert printed.count("### side_moe float32, N 67, E ") == 2
    assert printed.count("| naive ") == 2

    run = results.load(path)
    assert run.command[0] == "kernels"
    assert [case.sizes["E"] for case in run.cases] == [1, 3]
    for case in run.cases:
        assert case_table(case) in printed
        assert [row.variant for row in case.rows] == NAMES
        for row in case.rows:
            assert row.status == "measured"
            assert set(row.passes) == {"forward", "backward", "both"}
            both = row.passes["both"]
            assert len(both.samples) == case.rounds >= 3
            assert both.p10 <= both.median <= both.p90
            assert both.bound > 0
            assert both.flop
            assert set(both.against) == {"naive"}
            assert row.saved_bytes
        assert case.rows[0].passes["both"].against["naive"] == (1.0, 1.0, 1.0)
        assert case.rows[0].backend is None
        assert case.rows[2].backend in ("native", "reference")


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            ["kernels", "route_topk", "--sizes", "N=5", "E=3", "--variants", "eager,ours", "--seconds", "0.01"],
            ["weights", "inputs and exact result", "checking eager", "checking ours", "warming up ours, 1 of 1"],
        ),
        (
            ["memory", "--sizes", "N=5", "E=2", "D=8", "R=2", "--variants", "ours"],
            ["weights", "checking ours and its peak"],
        ),
    ],
    ids=lambda one: one[0],
)
def test_a_terminal_shows_progress(
    command: list[str],
    said: list[str],
    terminal: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(memory_measure, "resident_growth", lambda _: 1 << 20)
    assert main(command) == 0
    shown = capsys.readouterr().err
    if not terminal:
        assert shown == ""
        return
    label = command[1] if command[0] == "kernels" else "side_moe"
    places = [shown.index(f" s] {one} ({label} ") for one in said]
    assert places == sorted(places)
    assert max(len(line) for line in shown.split("\r")) < 60 + len("\x1b[K")
    # The next output starts in an empty line.
    assert shown.endswith("\r\x1b[K\r")


def test_results_survive_their_file(tmp_path: Path) -> None:
    forward = replace(timing(0.25, 0.125, 0.5, bound=0.0625), against={"naive": (2.0, 1.5, 3.0)})
    rows = [
        replace(
            helpers.row("ours", problem="an easier one", forward=forward), worst="y", cuda_graph=True, dtype="float32"
        ),
        unmeasured("naive", "skipped", "too large"),
    ]
    case = results.Case(
        "op", "title", {"N": 3}, "float32", "cpu", 1e9, 2e9, {"forward": 5.0}, {"forward": 6.0}, 3, rows
    )
    run = results.Run(["kernels"], {"cpu": {"model": "x"}, "load": None}, [case], 1.5)
    path = tmp_path / "run.json"
    results.save(run, path)
    assert results.load(path) == run
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]

    newer = json.loads(path.read_text())
    (newest,) = newer["cases"]
    for record in (newer, newest, newest["rows"][0], newest["rows"][0]["passes"]["forward"]):
        record["of a later version"] = 1
    path.write_text(json.dumps(newer))
    assert results.load(path) == run

    path.write_text(json.dumps(newer | {"schema": 0}))
    with pytest.raises(ValueError, match="schema 0"):
        results.load(path)


def test_a_table_has_the_reason_of_an_empty_row() -> None:
    rows = [unmeasured("torch", "absent", "no such function"), unmeasured("ours", "refused", "y: error 1")]
    case = results.Case("op", "what it does", {"N": 3}, "float32", "cpu", 0.0, 1e9, {"forward": 0.0}, {}, 0, rows)
    text = case_table(case)
    assert "| torch   |     absent |" in text
    assert "- torch absent: no such function" in text
    assert "- ours refused: y: error 1" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_a_refused_row_makes_the_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = kernels.measure

    def measure(*arguments: object, **settings: object) -> results.Case:
        case = whole(*arguments, **settings)  # type: ignore[arg-type]
        case.rows[-1] = unmeasured("ours", "refused", "y: error 1")
        return case

    monkeypatch.setattr(kernels, "measure", measure)
    assert (
        main(["kernels", "route_topk", "--sizes", "N=5", "E=3", "--variants", "eager,ours", "--seconds", "0.01"]) == 1
    )
    assert "refused: route_topk ours at {'N': 5, 'E': 3, 'k': 2}: y: error 1" in capsys.readouterr().err


def test_measured_cases_are_kept_if_the_next_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, path = kernels.measure, tmp_path / "run.json"

    def measure(benchmark: Benchmark, *arguments: object, **settings: object) -> results.Case:
        if benchmark.sizes["E"] == 4:
            raise KeyboardInterrupt
        return whole(benchmark, *arguments, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(kernels, "measure", measure)
    given = ["--sizes", "N=5", "E=3,4", "--variants", "ours", "--seconds", "0.01", "--json", str(path)]
    with pytest.raises(KeyboardInterrupt):
        main(["kernels", "route_topk", *given])
    assert [case.sizes["E"] for case in results.load(path).cases] == [3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["side_mo"], "there is no benchmark of 'side_mo'; there is side_moe"),
        (["side_moe", "--sizes", "Q=3"], "has a size Q"),
        (["side_moe", "--sizes", "N"], "as in N=256,2816, not 'N'"),
        (["side_moe", "--sizes", "N=0"], "must be at least 1"),
        (["side_moe", "--sizes", "N=3", "N=4"], "--sizes gives N twice; separate its values by commas"),
        (["side_moe", "--variants", "fast"], "side_moe has no variant 'fast'; it has compiled"),
        (["side_moe", "--threads", "0"], "--threads must be at least 1, not 0"),
        (["side_moe", "--seconds", "-1"], "--seconds must be above 0, not -1"),
        (["side_moe", "--json", "/dev/null/run.json"], "--json: cannot write /dev/null/run.json"),
    ],
)
def test_usage_errors_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_check_leaves_no_empty_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, there = tmp_path / "new" / "run.json", tmp_path / "old.json"
    there.write_text("old")
    for one in (path, there):
        assert main(["kernels", "side_moe", "--json", str(one), "--sizes", "Q=3"]) == 2
    assert "has a size Q" in capsys.readouterr().err
    assert there.read_text() == "old"
    assert not path.exists()


def test_a_step_is_not_measured_in_float16(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["step", "mean", "--dtype", "float16"]) == 2
    assert "python -m bench step: --dtype: mean is measured in float32, bfloat16, not" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["B3", "Q=7", "B=3,4"])
def test_usage_errors_of_a_profile_are_named(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert profile.main(["cls", "--device", "cpu", "--sizes", size]) == 2
    assert "python -m bench.cli.profile: --sizes" in capsys.readouterr().err


def test_a_baseline_is_measured_although_it_is_not_named(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    given = ["kernels", "side_moe", "--sizes", "N=5", "E=2", "D=8", "R=2", "--seconds", "0.01", "--json", str(path)]
    assert main([*given, "--variants", "ours", "--against", "eager"]) == 0
    (case,) = results.load(path).cases
    assert [row.variant for row in case.rows] == ["eager", "ours"]
    assert set(case.rows[1].passes["both"].against) == {"eager"}
