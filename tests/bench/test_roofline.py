"""`python -m bench roofline`: measured ceilings, steps of files below theirs, plots, and usage errors."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.cli import roofline as command
from bench.core import results
from bench.core.benchmark import Product
from bench.core.machine import ROOT
from bench.core.results import Case, Role, Run
from bench.report import plots, roofline
from tests.bench.helpers import MACHINE, row, timing, unmeasured


def run() -> Run:
    # 4 GFLOP at 1 TFLOP/s are 4 ms, and 40 MB at 20 GB/s 2 ms.
    product = Case(
        "side_moe", "title", {"N": 5}, "float32", "cpu", 1e12, 2e10, {"forward": 1e9, "backward": 3e9},
        {"forward": 4e7, "backward": 0.0}, 3, [row("naive", both=timing(4e-2, bound=4e-3)),
        unmeasured("compiled", "absent", "no compiler"), row("ours", both=timing(8e-3, bound=4e-3))],
    )  # fmt: skip
    memory = Case(
        "route_topk", "title", {"N": 7}, "float32", "cpu", 0.0, 2e10, {"forward": 0.0}, {"forward": 4e7}, 3,
        [row("ours", forward=timing(4e-3, bound=2e-3))],
    )  # fmt: skip
    return Run(["kernels"], MACHINE, [product, memory], 1.0)


def test_points_are_the_least_work_in_the_measured_time() -> None:
    naive, ours, routing = roofline.points([run()])
    assert (naive.role, ours.role) == (Role.PAPER, Role.OURS)
    assert ours.intensity == pytest.approx(100)
    assert ours.rate == pytest.approx(5e11)
    assert ours.ceiling == pytest.approx(1e12)
    assert ours.share == pytest.approx(0.5)
    assert naive.share == pytest.approx(0.1)
    assert (routing.intensity, routing.rate, routing.ceiling) == pytest.approx((0, 1e10, 2e10))


def test_ceilings_are_the_highest_of_any_case() -> None:
    (roof,) = roofline.ceilings([run()]).values()
    assert roof == (1e12, 2e10)
    assert roof.ridge == 50
    assert roof.at(1) == 2e10
    assert roof.at(1e6) == 1e12


def test_each_machine_has_ceilings_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = run()
    faster = [replace(case, flop_rate=9 * case.flop_rate) for case in one.cases]
    other = Run(one.command, {**MACHINE, "threads": 1}, faster, 1.0)
    roofs = roofline.ceilings([one, other])
    first, second = "cpu float32, a processor, 2 threads, torch 2", "cpu float32, a processor, 1 threads, torch 2"
    assert {name: roof.flop for name, roof in roofs.items()} == {first: 1e12, second: 9e12}
    for name, found in (("one", one), ("other", other)):
        results.save(found, tmp_path / f"{name}.json")
    paths = [str(tmp_path / f"{name}.json") for name in ("one", "other")]
    assert main(["roofline", *paths, "--plot", str(tmp_path / "roof.png")]) == 0
    printed = capsys.readouterr().out
    assert "**Several machines or set-ups, with ceilings for each: a processor, 2 threads" in printed
    assert "| side_moe float32 N=5 | a processor, 1 threads, torch 2 |" in " ".join(printed.split())


def test_without_a_matrix_rate_bytes_are_shown_as_bytes() -> None:
    (case, _) = run().cases
    # Without probes of products, as after an out-of-memory error, the bound is the 2 ms of the bytes.
    rows = [row("ours", both=timing(8e-3, bound=2e-3))]
    (point,) = roofline.points([Run([], MACHINE, [replace(case, flop_rate=0.0, rows=rows)], 1.0)])
    assert not point.by_flop
    assert (point.rate, point.ceiling) == pytest.approx((5e9, 2e10))
    assert "| 5 GB/s | 20 GB/s |" in " ".join(roofline.points_table([point]).split())


@pytest.mark.parametrize("field", ["cpu", "threads", "versions", "commit"])
def test_a_file_without_its_machine_is_named(field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = {name: value for name, value in MACHINE.items() if name != field}
    results.save(Run([], facts, run().cases, 1.0), tmp_path / "run.json")
    assert main(["roofline", str(tmp_path / "run.json")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"run.json does not name the machine (KeyError('{field}') is missing)" in said


def test_committed_results_agree_with_their_bound() -> None:
    runs = [results.load(path) for path in (ROOT / "bench" / "results").glob("s*-cpu-*.json")]
    shares = [t.of_bound for run in runs for case in run.cases for row in case.rows if (t := row.passes.get("both"))]
    assert [point.share for point in roofline.points(runs)] == pytest.approx(shares, rel=1e-4)
    for point in roofline.points(runs):
        case = point.case
        roof = roofline.Ceilings(case.flop_rate, case.byte_rate)
        assert point.ceiling == pytest.approx(roof.at(point.intensity), rel=1e-4)


def test_files_are_shown_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, plot = tmp_path / "run.json", tmp_path / "new" / "roof.png"
    results.save(run(), path)
    assert main(["roofline", str(path), "--plot", str(plot)]) == 0
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line[:1] == "|"]
    assert ["cpu float32", "1000", "20.0", "50.0"] in rows
    assert ["side_moe float32 N=5", "ours", "100.0", "500 GFLOP/s", "1000 GFLOP/s", "50%"] in rows
    assert ["route_topk float32 N=7", "ours", "0.0", "10 GB/s", "20 GB/s", "50%"] in rows
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_without_files_the_machine_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "PRODUCTS", (Product(8, 16, 24), Product(16, 16, 16)))
    path, plot = tmp_path / "roof.json", tmp_path / "roof.png"
    given = ["--dtype", "bfloat16", "--seconds", "0.01", "--json", str(path), "--plot", str(plot)]
    assert main(["roofline", *given]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| (8, 16) x (16, 24) ") == printed.count("| (16, 16) x (16, 16) ") == 2
    found = json.loads(path.read_text())
    assert found["kind"] == "roofline"
    assert found["byte_rate"] > 0
    assert {one["dtype"] for one in found["products"]} == {"bfloat16", "float32"}
    assert min(one["rate"] for one in found["products"]) > 0
    assert f"meets {found['byte_rate'] / 1e9:.1f} GB/s" in printed
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plots, "has_matplotlib", lambda: False)
    results.save(run(), tmp_path / "run.json")
    assert main(["roofline", str(tmp_path / "run.json"), "--plot", str(tmp_path / "roof.png")]) == 0
    assert "--plot: no plots, because matplotlib is not installed" in capsys.readouterr().out
    assert not (tmp_path / "roof.png").exists()


def test_files_without_products_show_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run()
    results.save(Run(found.command, found.machine, found.cases[1:], 1.0), tmp_path / "run.json")
    assert main(["roofline", str(tmp_path / "run.json")]) == 1
    assert "no step with products" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-file.json"], "no-such-file.json"),
        (["no-such-file.json", "--dtype", "float32"], "--dtype is for measuring, and result files are only shown"),
        (["--threads", "0"], "--threads must be at least 1, not 0"),
        (["--seconds", "-1"], "--seconds must be above 0, not -1"),
        (["--plot", "/dev/null/roof.png"], "--plot: cannot write /dev/null/roof.png"),
        (["--json", "/"], "--json must name a file"),
        *([] if torch.cuda.is_available() else [(["--device", "cuda"], "torch finds no CUDA device here")]),
    ],
)
def test_usage_errors_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["roofline", *arguments]) == 2
    assert message in capsys.readouterr().err
