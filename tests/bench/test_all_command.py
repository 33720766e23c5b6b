"""`python -m bench all`: its folder, its summary, and parts that fail or are interrupted."""

from argparse import ArgumentParser
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.cli import all as all_command
from bench.cli import kernels, step, stream
from bench.cli.all import Part
from bench.core import results
from bench.core.benchmark import Benchmark
from bench.e2e.stream import records
from bench.report import summary
from tests.bench.helpers import case, row, run, timing, unmeasured

ROUTING = ("route_topk", "--sizes", "N=5", "E=3,4", "--variants", "eager,ours", "--seconds", "0.01")
GROUPED = (
    "grouped_mm",
    "--sizes",
    "M=9",
    "E=2",
    "K=4",
    "P=8",
    "--variants",
    "loop,megablocks,ours",
    "--seconds",
    "0.01",
)
STREAM = (
    "--users", "24", "--items", "120", "--new-items", "12", "--windows", "2", "--epochs", "1", "--batch", "8",
    "--dim", "24", "--rank", "4",
)  # fmt: skip


def parts(*found: Part) -> tuple[Part, ...]:
    return found


def test_all_results_are_in_a_folder_and_in_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timed = Part("kernels", kernels, (), GROUPED, "all but nothing")
    streamed = Part("stream", stream, (), STREAM, notes=all_command._stream_notes)
    monkeypatch.setattr(all_command, "PARTS", parts(timed, streamed))
    folder = tmp_path / "new" / "folder"
    assert main(["all", "--quick", "--folder", str(folder)]) == 0
    printed = capsys.readouterr().out
    text = (folder / "summary.md").read_text()
    assert text in printed
    assert len(results.load(folder / "kernels.json").cases) == 1
    assert len(records.load(folder / "stream.json").windows) == 2
    assert [path.name for path in (folder / "kernels").iterdir()] == ["grouped_mm-float32-M9-E2-K4-P8.png"]
    assert (folder / "stream" / "time.png").exists()
    assert (folder / "roofline.png").read_bytes().startswith(b"\x89PNG")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert [cells[:2] for cells in rows[2:]] == [
        ["grouped_mm float32 M=9 E=2 K=4 P=8", "ours"],
        ["stream_step_mean float32 B=8 E=1", "ours"],
        ["stream_step_mean float32 B=8 E=2", "ours"],
    ]
    assert rows[0][2:8] == ["rounds", "ms", "x paper", "x eager", "x compiled", "x library"]
    assert int(rows[2][2].partition(",")[0]) == results.load(folder / "kernels.json").cases[0].rounds
    assert rows[2][5].endswith("(loop)")
    assert rows[2][7] == "absent"
    assert rows[3][2] == "3, few rounds"
    assert rows[3][4].endswith("(published)")
    assert "- absent: grouped_mm megablocks, M=9 E=2 K=4 P=8: megablocks needs a CUDA device, not cpu" in text
    assert "- ours: a training step " in text
    assert "left out of --quick: all but nothing" in text
    assert "## Slower than a baseline" in text


def test_a_part_that_fails_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = kernels.measure

    def measure(benchmark: Benchmark, *given: object, **settings: object) -> results.Case:
        if benchmark.operator == "route_topk":
            raise RuntimeError("no such thing")
        return real(benchmark, *given, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(kernels, "measure", measure)
    found = parts(Part("first", kernels, ROUTING, ()), Part("second", kernels, GROUPED, ()))
    monkeypatch.setattr(all_command, "PARTS", found)
    assert main(["all", "--folder", str(tmp_path / "out")]) == 1
    text = (tmp_path / "out" / "summary.md").read_text()
    assert "FAILED: RuntimeError: no such thing" in text
    assert "grouped_mm float32 M=9" in text
    assert "RuntimeError: no such thing" in capsys.readouterr().err


def test_the_summary_has_the_results_before_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = kernels.measure

    def measure(benchmark: Benchmark, *given: object, **settings: object) -> results.Case:
        if benchmark.sizes["E"] == 4:
            raise KeyboardInterrupt
        return real(benchmark, *given, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(kernels, "measure", measure)
    found = parts(Part("first", kernels, ROUTING, ()), Part("second", kernels, GROUPED, ()))
    monkeypatch.setattr(all_command, "PARTS", found)
    assert main(["all", "--folder", str(tmp_path)]) == 130
    text = (tmp_path / "summary.md").read_text()
    assert "route_topk float32 N=5 E=3 k=2" in text
    assert "E=4" not in text.partition("## What ran")[0]
    assert "interrupted after" in text
    assert not (tmp_path / "second.json").exists()
    assert text in capsys.readouterr().out


def test_earlier_results_are_not_mixed_with_new_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "summary.md").touch()
    assert main(["all", "--folder", str(tmp_path)]) == 2
    assert f"--folder: {tmp_path / 'summary.md'} exists already; name another" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "--threads must be at least 1, not 0"),
        (["--folder", "/dev/null/out"], "--folder: cannot make /dev/null/out"),
        *([] if torch.cuda.is_available() else [(["--device", "cuda"], "torch finds no CUDA device here")]),
    ],
)
def test_usage_errors_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["all", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("part", all_command.PARTS, ids=lambda part: part.name)
def test_the_arguments_of_the_parts_are_valid(part: Part, quick: bool, dtype: str, tmp_path: Path) -> None:
    parser = ArgumentParser()
    all_command.add_to(parser.add_subparsers())
    chosen = parser.parse_args(["all", "--dtype", dtype, "--threads", "2", *(["--quick"] if quick else [])])
    given = all_command.arguments(part, chosen, tmp_path)
    parser = ArgumentParser()
    part.command.add_to(parser.add_subparsers())
    options = parser.parse_args(given)
    assert options.json == tmp_path / f"{part.name}.json"
    assert options.threads == 2
    if part.command in (kernels, step):
        planned = list(kernels.plan(options, torch.device("cpu")))
        assert {kind.operator for kind, *_ in planned} >= {"training_step_mean"} or len(planned) >= 7
        assert all("ours" in names for _, _, names, _ in planned)
        assert len(planned) <= 9 or not quick
    if part.command is stream:
        assert stream.settings_of(options).dtype == dtype


def test_a_summary_lists_missing_and_slower_rows() -> None:
    found = run(
        case(
            row("naive", 40 << 20, both=timing(4e-3)),
            row("eager", 30 << 20, both=timing(1e-3)),
            unmeasured("compiled", "skipped", "out of memory"),
            row("ours", 8 << 20, both=timing(2e-3)),
            unmeasured("ours-recompute", "refused", "y: error 1"),
        ),
        case(
            unmeasured("compiled", "skipped", "out of memory"),
            row("eager", 3 << 20, both=timing(*[4e-3] * 7, 8e-3)),
            row("ours", 2 << 20, both=timing(*[2e-3] * 8)),
            sizes={"N": 7, "E": 2},
        ),
    )
    text = summary.report([found], ["- a line"], ["- a part"])
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[3:-1]]
        for line in text.splitlines()
        if line.startswith("| side_moe")
    }
    first, second = cells["side_moe float32 N=5 E=2"], cells["side_moe float32 N=7 E=2"]
    against = ["2.00, 2.00-2.00 (naive)", "0.50, 0.50-0.50 (eager)", "skipped"]
    assert first == ["1, few rounds", "2.00", *against, "50%", "8.0", "40.0 (naive)", "1.00"]
    assert second[:5] == ["8", "2.00", "", "2.00, 2.00-2.60 (eager)", "skipped"]
    assert second[7] == "3.0 (eager)"
    assert (
        "- refused: side_moe ours-recompute, N=5 E=2: y: error 1\n- skipped: side_moe compiled, 2 sizes: out of" in text
    )
    assert (
        "- side_moe float32 N=5 E=2: ours 0.50 times as fast as eager (0.50-0.50), 2.00 and 1.00 ms; few rounds: 1\n"
        in text
    )
    assert "N=7" not in text.partition("## Slower than a baseline")[2]
    assert text.startswith("# Benchmarks\n\na processor, 2 cores")


def test_a_summary_marks_variants_of_an_easier_problem() -> None:
    easier = "the same without x"
    liger, plain = row("liger", 1 << 20, easier, both=timing(2.0)), row("ours-plain", 1 << 20, easier, both=timing(1.0))
    text = summary.report([run(case(row("eager", both=timing(8.0)), liger, row("ours", both=timing(4.0)), plain))],
                          [], [])  # fmt: skip
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:3] == "| s"]
    head = next(line for line in text.splitlines() if line.startswith("| what"))
    names = [name.strip() for name in head.split("|")[1:-1]]
    ours, easy = (dict(zip(names, one, strict=True)) for one in cells)
    assert (ours["variant"], ours["x eager"], ours["x library"]) == ("ours", "2.00, 2.00-2.00 (eager)", "")
    assert (easy["variant"], easy["x eager"], easy["x library"]) == ("ours-plain*", "", "2.00, 2.00-2.00 (liger*)")
    assert "\n* liger, ours-plain: solves another problem: the same without x; compared with each other only\n" in text


def test_a_summary_without_results() -> None:
    text = summary.report([], [], ["- a part"])
    assert "Nothing was measured." in text
    assert text.count("\n\nnone\n") == 2
