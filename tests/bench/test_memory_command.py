"""`python -m bench memory`: known bytes and slopes, refused results, messages for mistakes."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.__main__ import main
from bench.cli import memory
from bench.core import results
from bench.core.benchmark import Benchmark, Tensors, load_benchmark
from bench.core.results import Case, Role, Row
from bench.e2e.memory import report, sweeps
from bench.e2e.memory import snapshot as snapshots
from bench.e2e.memory.curves import Curve, Line, curves, fit
from bench.e2e.memory.measure import measure
from bench.e2e.memory.resident import NotMeasurable, Point, resident_growth
from bench.e2e.memory.sweeps import SWEPT, plan
from bench.e2e.step import STEPS
from bench.ops import side_moe
from bench.ops.side_moe import SideMoE
from bench.report import plots
from tests.bench import toy_memory
from tests.bench.toy_memory import COLUMNS, Toy
from xsmoe_kernels.runtime import dispatch

TINY = {"N": 67, "E": 3, "D": 24, "R": 6, "M": 1}
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux can reset the peak of a process")


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SWEPT, "toy", toy_memory.SWEPT)


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start no processes; resident memory is 1 MiB."""
    monkeypatch.setattr("bench.e2e.memory.measure.resident_growth", lambda point: 1 << 20)


def case_of(size: int, *rows: Row, letter: str = "E") -> Case:
    return Case("op", "title", {"N": 3, letter: size}, "float32", "cpu", 0.0, 0.0, {}, {}, 0, list(rows))


@LINUX
@pytest.mark.usefixtures("toy")
def test_known_bytes_and_slopes_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "run.json"
    assert main(["memory", "toy", "--variants", "holding", "--sizes", "N=1024", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "threads" in printed.splitlines()[0]
    run = results.load(path)
    assert run.command[0] == "memory"
    assert [case.sizes["E"] for case in run.cases] == [1, 2, 4]
    each = 4 * 1024 * COLUMNS
    for case in run.cases:
        (row,) = case.rows
        held = each * case.sizes["E"]
        assert row.saved_bytes == row.expected_saved_bytes == held
        assert row.peak_bytes is not None
        assert held <= row.peak_bytes <= held + (1 << 18)
        # Pages are whole, and Python allocates too.
        assert row.resident_bytes is not None
        assert held <= row.resident_bytes <= 1.1 * held + (1 << 20)
        assert row.returned_bytes == 4 * (8 * 1024 + 8)
        assert not row.passes
    (curve,) = curves(run.cases)
    assert fit(curve.points("holding", report.SAVED.of)) == Line(pytest.approx(each), True)
    assert report.curve_table(curve) in printed
    saved = next(line for line in printed.splitlines() if " saved |" in line)
    assert [cell.strip() for cell in saved.split("|")[2:-1]] == ["saved", "4.0", "8.0", "16.0", "4.00 MiB", "4.00 MiB"]


@pytest.mark.usefixtures("toy", "no_processes")
def test_a_point_of_two_sweeps_is_measured_once_and_a_wrong_variant_has_no_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.json"
    assert main(["memory", "toy", "--json", str(path)]) == 1
    printed = capsys.readouterr()
    cases = results.load(path).cases
    assert [(case.sizes["N"], case.sizes["E"]) for case in cases] == [(1024, 1), (1024, 2), (1024, 4), (512, 2)]
    for case in cases:
        right, wrong = case.rows
        assert (right.status, right.resident_bytes) == ("measured", 1 << 20)
        assert (wrong.variant, wrong.status) == ("wrong", "refused")
        assert wrong.peak_bytes is wrong.resident_bytes is wrong.expected_saved_bytes is None
    assert printed.err.count("refused: toy wrong at ") == 4
    assert "- wrong at E 1, E 2, E 4 refused: y: error" in printed.out
    assert "memory of toy float32 over E, N 1024" in printed.out
    assert "memory of toy float32 over N, E 2" in printed.out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("modalities", [1, 2])
def test_side_moe_saves_the_bytes_of_its_design(dtype: torch.dtype, modalities: int, cpu: torch.device) -> None:
    benchmark = SideMoE({**TINY, "M": modalities}, dtype, cpu)
    names = ["naive", "eager", "ours", "ours-recompute"]
    rows = {row.variant: row for row in measure(benchmark, names, resident=False).rows}
    for name in ("naive", "ours", "ours-recompute"):
        assert rows[name].status == "measured", rows[name].reason
        assert rows[name].saved_bytes == rows[name].expected_saved_bytes
        assert rows[name].saved_bytes == benchmark.variant(name).expected_saved_bytes
    assert rows["eager"].expected_saved_bytes is None
    assert rows["eager"].saved_bytes


def test_with_recomputation_nothing_grows_with_the_width_or_rank_of_experts(cpu: torch.device) -> None:
    for letter in "DR":
        found = [
            measure(
                SideMoE({**TINY, letter: size, "E": experts}, torch.float32, cpu), ["ours-recompute"], resident=False
            )
            for experts in (2, 6)
            for size in (8, 16)
        ]
        narrow, wide, narrow_more, wide_more = (case.rows[0].saved_bytes or 0 for case in found)
        # More experts add only the gates of two levels, at any width and rank.
        assert narrow_more - narrow == wide_more - wide == 2 * 4 * 67 * 4


def test_a_kernel_that_is_wrong_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    real = side_moe.side_moe

    def wrong(**given: Any) -> torch.Tensor:
        y: torch.Tensor = real(**given)
        # The reference stays right, because the check needs it.
        return y if dispatch.requested() == "reference" else 1.001 * y

    monkeypatch.setattr(side_moe, "side_moe", wrong)
    path = tmp_path / "run.json"
    sizes = ["--sizes", *(f"{letter}={size}" for letter, size in TINY.items())]
    assert main(["memory", *sizes, "--variants", "ours", "--json", str(path)]) == 1
    (case,) = results.load(path).cases
    (row,) = case.rows
    assert (row.status, row.peak_bytes, row.resident_bytes) == ("refused", None, None)
    assert "refused: side_moe ours at" in capsys.readouterr().err


@pytest.mark.usefixtures("no_processes")
@pytest.mark.parametrize(("name", "variants"), [("side_moe", "naive,ours-recompute"), ("step", "published,ours")])
def test_quick_from_end_to_end(
    name: str, variants: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = {"N": 67, "D": 24, "R": 6, "B": 5, "I": 40, "E": 3}
    swept = replace(
        SWEPT[name],
        centre={letter: tiny.get(letter, 1) for letter in SWEPT[name].centre},
        quick_centre={"E": 2},
        quick_values={"E": (1, 2, 4)},
    )
    monkeypatch.setitem(SWEPT, name, swept)
    path, folder = tmp_path / "run.json", tmp_path / "plots"
    given = ["memory", name, "--quick", "--variants", variants, "--json", str(path), "--plot", str(folder)]
    assert main(given) == 0
    printed = capsys.readouterr().out
    run = results.load(path)
    assert [case.sizes["E"] for case in run.cases] == [1, 2, 4]
    first, second = (fit(curves(run.cases)[0].points(one, report.PEAK.of)) for one in variants.split(","))
    assert first is not None
    assert second is not None
    # At these sizes the peak of a whole step is outside its levels.
    assert name == "step" or first.slope > 2 * second.slope, "the published formulation grows faster"
    (plot,) = folder.iterdir()
    assert plot.name == f"memory-{run.cases[0].operator}-E.png"
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert str(plot) in printed


def test_a_whole_step_counts_its_gradients_and_dropout(cpu: torch.device) -> None:
    kind = load_benchmark(STEPS, "mean")
    sizes = {letter: values[0] for letter, values in {**kind.default_sizes, **kind.tiny_sizes}.items()}
    benchmark = kind(sizes, torch.float32, cpu)
    (row,) = measure(benchmark, ["ours"], resident=False).rows
    leaves = benchmark.variant("ours").build().leaves(benchmark.make_inputs())
    assert row.peak_bytes is not None
    assert row.peak_bytes > sum(leaf.nbytes for leaf in leaves.values())
    assert row.returned_bytes == 0


@LINUX
def test_resident_memory_of_a_process_that_fails() -> None:
    point = Point(Toy, {"N": 4, "E": 1}, torch.float32, 0, "killed", 1)
    with pytest.raises(NotMeasurable, match="ended with code 9"):
        resident_growth(point)
    with pytest.raises(RuntimeError, match="(?s)broken at .*ZeroDivisionError: on purpose"):
        resident_growth(replace(point, variant="broken"))


@pytest.mark.usefixtures("toy")
def test_the_reason_for_missing_resident_memory_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert main(["memory", "toy", "--sizes", "N=8", "E=1", "--variants", "holding"]) == 0
    assert "holding at N 8 no resident memory: only Linux can reset" in capsys.readouterr().out


@pytest.mark.usefixtures("toy", "no_processes")
def test_an_interrupted_command_keeps_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, path = memory.measure, tmp_path / "run.json"

    def stopping(benchmark: Benchmark, *given: Any, **named: Any) -> Case:
        if benchmark.sizes["E"] == 4:
            raise KeyboardInterrupt
        return whole(benchmark, *given, **named)

    monkeypatch.setattr(memory, "measure", stopping)
    assert main(["memory", "toy", "--variants", "holding", "--json", str(path)]) == 130
    assert [case.sizes["E"] for case in results.load(path).cases] == [1, 2]
    printed = capsys.readouterr().out
    assert "Stopped after 2 points" in printed
    assert "over E, N 1024" in printed


@pytest.mark.usefixtures("toy", "no_processes")
def test_without_matplotlib_a_message_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plots, "has_matplotlib", lambda: False)
    assert main(["memory", "toy", "--quick", "--variants", "holding", "--plot", str(tmp_path)]) == 0
    assert "matplotlib is not installed (pip install matplotlib)" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.fixture
def history(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace torch's recording of allocations; return the calls."""
    calls: list[str] = []

    def record(enabled: str | None = "all", **_: object) -> None:
        calls.append(f"record {enabled}")

    def dump(path: str) -> None:
        calls.append("dump")
        Path(path).write_bytes(b"snapshot")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", record)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    return calls


@pytest.mark.parametrize("fails", [False, True])
def test_a_snapshot_is_of_one_step_of_ours(
    fails: bool,
    history: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    cpu: torch.device,
) -> None:
    benchmark, path = SideMoE(TINY, torch.float32, cpu), tmp_path / "step.pickle"
    case = measure(benchmark, ["ours"], resident=False)
    variant = benchmark.variant("ours")
    built = variant.build()

    def forward(inputs: Tensors) -> Tensors:
        history.append("step")
        if fails and history.count("step") == 2:
            raise torch.OutOfMemoryError("too large")
        return built.forward(inputs)

    shown = replace(variant, build=lambda: replace(built, forward=forward))
    monkeypatch.setattr(snapshots, "snapshot_variant", lambda _: shown)
    if fails:
        with pytest.raises(torch.OutOfMemoryError):
            snapshots.write_snapshot(benchmark, [case], path)
        assert history == ["step", "record all", "step", "record None"]
        assert not path.exists()
        return
    assert snapshots.write_snapshot(benchmark, [case], path)
    # The first step is a warm-up.
    assert history == ["step", "record all", "step", "dump", "record None"]
    assert path.read_bytes() == b"snapshot"
    printed = capsys.readouterr().out
    assert str(path) in printed
    assert "https://docs.pytorch.org/memory_viz" in printed


@pytest.mark.parametrize("status", ["refused", "skipped"])
def test_there_is_no_snapshot_of_a_variant_without_a_result(
    status: str, history: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], cpu: torch.device
) -> None:
    benchmark = SideMoE(TINY, torch.float32, cpu)
    case = replace(case_of(1, Row("ours", Role.OURS, status, "y: error 1")), sizes=benchmark.sizes)
    assert not snapshots.write_snapshot(benchmark, [case], tmp_path / "step.pickle")
    assert history == []
    assert f"no snapshot: ours is {status}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["side_mo"], "there is no memory benchmark of 'side_mo'; there is side_moe, step"),
        (["step", "--dtype", "float16"], "--dtype: step is measured in float32, bfloat16, not in float16"),
        (["side_moe", "--sizes", "Q=3"], "has a size Q"),
        (["step", "--sizes", "N=3"], "has a size N"),
        (["side_moe", "--sizes", "N"], "as in N=256,2816, not 'N'"),
        (["side_moe", "--sizes", "N=0"], "must be at least 1"),
        (["side_moe", "--variants", "fast"], "side_moe has no variant 'fast'"),
        (["side_moe", "--threads", "0"], "--threads must be at least 1, not 0"),
        (["side_moe", "--json", "/dev/null/run.json"], "--json: cannot write /dev/null/run.json"),
        (["side_moe", "--plot", "/dev/null/folder"], "--plot: cannot make /dev/null/folder"),
        (["side_moe", "--snapshot", "step.pickle"], "--snapshot needs a GPU"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert not printed.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["side_moe", "step"], "--snapshot is of one name, not of side_moe, step"),
        (["side_moe", "--variants", "naive"], "which is not among --variants naive"),
    ],
)
def test_mistakes_of_a_snapshot_are_named(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(SideMoE, "__post_init__", lambda benchmark: setattr(benchmark, "modalities", 1))
    given = ["memory", *arguments, "--device", "cuda", "--snapshot", str(tmp_path / "step.pickle")]
    assert main(given) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_plan_moves_its_centre_and_its_sweeps() -> None:
    swept = replace(SWEPT["side_moe"], centre={"N": 8, "E": 10, "D": 4}, values={"E": (1, 10), "N": (4, 8)})
    usual = plan(swept, {}, quick=False, cuda=False)
    assert dict(usual.sweeps())["E"] == [{"N": 8, "E": 1, "D": 4}, {"N": 8, "E": 10, "D": 4}]
    moved = plan(swept, {"N": (16,), "E": (10, 1, 5), "D": (2, 4), "B": (3,)}, quick=False, cuda=False)
    assert moved == sweeps.Plan({"N": 16, "E": 10, "D": 4}, {"E": (1, 5, 10), "D": (2, 4)})
    assert plan(swept, {"E": (1, 2, 3)}, quick=False, cuda=False).centre["E"] == 2
    assert plan(swept, {}, quick=False, cuda=True).centre["M"] == 2
    alone = plan(swept, {"N": (3,), "E": (1,)}, quick=False, cuda=False)
    assert list(alone.sweeps()) == [("N", [{"N": 3, "E": 1, "D": 4}])]
    for one in SWEPT.values():
        assert {*one.centre} == {*one.kind.default_sizes}
        for quick in (False, True):
            whole = plan(one, {}, quick=quick, cuda=False)
            assert all(whole.centre[letter] in values for letter, values in whole.values.items())


def test_sweeps_are_found_among_cases() -> None:
    row = Row("ours", Role.OURS, "measured", saved_bytes=5)
    cases = [case_of(4, row), case_of(1, row), replace(case_of(4, row), sizes={"N": 9, "E": 4}), case_of(2, row)]
    found = {(curve.letter, tuple(curve.values)): curve.fixed for curve in curves(cases)}
    assert found == {("E", (1, 2, 4)): {"N": 3}, ("N", (3, 9)): {"E": 4}}
    (alone,) = curves([case_of(7, row, letter="R")])
    assert (alone.letter, alone.values) == ("N", [3])


def test_a_slope_is_marked_if_points_are_not_on_a_line() -> None:
    assert fit([(1, 5)]) is None
    assert fit([(1, 10), (2, 20), (4, 40)]) == Line(pytest.approx(10), True)
    bent = fit([(1, 10), (2, 10), (4, 100)])
    assert bent is not None
    assert not bent.straight
    assert report.slope(bent).startswith("~")
    assert report.slope(Line(3 * 2**20, True)) == "3.00 MiB"
    assert report.slope(Line(-1e-9, True)) == "0.00 KiB"
    assert report.slope(None) == ""


def test_a_table_gives_the_reasons_for_empty_points() -> None:
    measured = Row(
        "ours", Role.OURS, "measured", error=1.5, saved_bytes=1 << 20, peak_bytes=3 << 20, returned_bytes=1 << 20
    )
    cases = [
        case_of(1, measured),
        case_of(2, Row("ours", Role.OURS, "skipped", "too large")),
        case_of(3, Row("new", Role.EAGER, "absent")),
    ]
    text = report.curve_table(Curve("E", cases))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert lines.pop(1)[0].startswith(":-")
    assert lines[0] == ["variant", "MiB", "E 1", "E 2", "E 3", "per expert", "by design"]
    assert lines[1:] == [
        ["ours", "saved", "1.0", "skipped", "", "", ""],
        ["", "peak", "3.0", "", "", "", ""],
        ["", "peak minus results", "2.0", "", "", "", ""],
        ["new", "saved", "", "", "absent", "", ""],
    ]
    assert "- ours at E 2 skipped: too large" in text
    assert "- ours: largest error 1.50 of the reference's" in text
