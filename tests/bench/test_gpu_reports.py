"""The summary and the profile, from fake results and on a CPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.cli import profile
from bench.cli.profile import Busy, KernelTime
from bench.core import results
from bench.core.results import Run
from bench.e2e.stream import records
from bench.gpu import name as gpu_name
from bench.gpu import sanitize as gpu_sanitize
from bench.gpu import summary as gpu_summary
from tests.bench import helpers
from tests.bench.helpers import case, row, timing, unmeasured

ROOT = Path(__file__).parents[2]


def run(device: str = "cuda", commit: str = "abc") -> Run:
    found = case(
        row("naive", 96 << 20, both=timing(12e-3)),
        row("ours", 8 << 20, both=timing(1e-3)),
        row("ours-graph", both=timing(5e-4)),
        unmeasured("ours-recompute", "refused", "y: error 1"),
    )
    return replace(helpers.run(replace(found, device=device)), machine={"commit": commit})


def test_the_summary_lists_parts_and_tests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = tmp_path / ".gpu_suite"
    state.mkdir()
    for name in ("build", "test_routing", "bench_sizes"):
        (state / f"{name}.log").write_text("")
    (state / "build.passed").write_text("abc 12 s\n")
    (state / "test_routing.passed").write_text("abc 34 s\n")
    (state / "profile.passed").write_text("def 2 s\n")
    (state / "racecheck.absent").write_text("def compute-sanitizer is not installed\n")
    (state / "test_routing.xml").write_text(
        '<testsuites><testsuite tests="9" failures="1" errors="0" skipped="2"/></testsuites>'
    )
    (state / "bench_sizes.failed").write_text("abc stopped after 480 s\n")
    (state / "memcheck.absent").write_text("abc compute-sanitizer is not installed\n")
    (tmp_path / "broken.json").write_text("{}")
    results.save(run(), tmp_path / "side_moe-toy.json")
    results.save(run(commit="def"), tmp_path / "side_moe-old.json")
    assert gpu_summary.main([str(tmp_path), "--commit", "abc"]) == 0
    printed = capsys.readouterr()
    rows = {cells[0]: cells[1:] for line in printed.out.splitlines() if (cells := _cells(line))}
    assert rows["build"] == ["passed in 12 s", ""]
    assert rows["test_routing"] == ["passed in 34 s", "6 passed, 1 failed, 2 skipped"]
    assert rows["bench_sizes"][0] == "FAILED: stopped after 480 s"
    assert rows["memcheck"][0] == "left out: compute-sanitizer is not installed"
    assert not rows.keys() & {"profile", "racecheck"}
    assert printed.out.count("ours-graph") == 1
    assert rows["side_moe float32 N=5 E=2"][:4] == [
        "ours-graph",
        "1, few rounds",
        "0.500",
        "24.00, 24.00-24.00 (naive)",
    ]
    assert "- refused: side_moe ours-recompute, N=5 E=2: y: error 1" in printed.out
    assert "broken.json is left out" in printed.err
    assert "side_moe-old.json is left out: it is of commit def" in printed.err
    assert gpu_summary.main([str(tmp_path)]) == 0
    everything = capsys.readouterr().out
    assert everything.count("ours-graph") == 2
    assert "profile" in everything


def test_memory_has_a_separate_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        replace(
            case(replace(row("ours", experts << 22), saved_bytes=experts << 21), sizes={"N": 3, "E": experts}),
            dtype="bfloat16",
            device="cuda",
        )
        for experts in (1, 4)
    ]
    results.save(replace(run(), command=["memory"], cases=cases), tmp_path / "memory-toy.json")
    assert gpu_summary.main([str(tmp_path)]) == 0
    rows = [_cells(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["memory", "unit", "variant", "saved", "by design", "peak"]
    assert rows[2:] == [["side_moe bfloat16 N=3", "per expert", "ours", "2.00 MiB", "", "4.00 MiB"]]


def test_the_windows_of_a_stream_have_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def window(number: int, step: float, epoch: float) -> records.WindowRecord:
        timed = records.RunRecord(steps=[[step]] * 3, epochs=[epoch, epoch], grow=0.5, test=9.0)
        runs = {"published": records.RunRecord(refused="it was wrong"), "ours-top-2": timed}
        return records.WindowRecord(number, number + 1, 8, 3, 0, None, runs)

    settings = {"device": "cuda", "dtype": "bfloat16", "pooling": "cls", "batch": 4}
    windows = [window(0, 2e-3, 1.0), window(1, 2.2e-3, 1.125)]
    run = records.StreamRun([], {"commit": "abc"}, settings, [], ["published", "ours-top-2"], windows, 1.0)
    records.save(run, tmp_path / "stream-toy.json")
    assert gpu_summary.main([str(tmp_path), "--commit", "abc"]) == 0
    printed = capsys.readouterr().out
    rows = [_cells(line) for line in printed.splitlines() if line.startswith("| stream")]
    what = "stream_step_cls bfloat16 B=4 E="
    assert [row[:4] for row in rows] == [
        [f"{what}1", "ours-top-2", "3, few rounds", "2.00"],
        [f"{what}2", "ours-top-2", "3, few rounds", "2.20"],
    ]
    assert "- refused: stream_step_cls published, 2 sizes: it was wrong" in printed


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]


@pytest.mark.parametrize(
    ("name", "short"),
    [("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"), ("AMD MI300X", "amd-mi300x")],
)
def test_a_gpu_has_a_short_name(name: str, short: str) -> None:
    assert gpu_name.short_name(name) == short


def test_committed_results_are_read() -> None:
    for path in (ROOT / "bench/results").glob("*-cpu-*.json"):
        assert results.load(path).cases


def test_the_profile_adds_up() -> None:
    spent = [KernelTime("hidden_kernel", 2, 75.0), KernelTime("gate_kernel", 2, 20.0), KernelTime("fill", 1, 5.0)]
    rows = [_cells(line) for line in profile.table(spent, max_rows=1)][2:]
    assert rows == [
        ["hidden_kernel", "2", "75.0", "75.0%"],
        ["2 others", "3", "25.0", "25.0%"],
        ["all", "5", "100.0", "100.0%"],
    ]


def test_a_step_is_profiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "profile.txt"
    sizes = ["--sizes", "N=67", "E=2", "D=24", "R=6", "M=1"]
    assert profile.main(["--device", "cpu", "--dtype", "float32", *sizes, "--out", str(out)]) == 0
    assert out.read_text() == capsys.readouterr().out
    assert "xsmoe" in out.read_text()
    assert "| all " in out.read_text()


def test_a_profile_without_kernels_is_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile, "measure", lambda workload: ([], None))
    out = tmp_path / "profile.txt"
    sizes = ["--sizes", "N=5", "E=2", "D=8", "R=2", "M=1"]
    assert profile.main(["--device", "cpu", "--dtype", "float32", *sizes, "--out", str(out)]) == 1
    assert "saw no kernel" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("operator", "sizes", "ran"),
    [
        ("side_moe", ["N=67", "E=3", "D=48", "R=8", "M=2"], "ours\nours-recompute\n"),
        ("route_topk", ["N=67", "E=5", "k=2"], "ours\n"),
        ("grouped_mm", ["M=67", "E=3", "K=48", "P=8"], "ours\n"),
        ("rank_of_target", ["M=67", "C=300", "d=48"], "ours\n"),
        ("topk_items", ["M=67", "C=300", "d=48", "k=10"], "ours\n"),
    ],
)
def test_the_problems_of_the_sanitizer_run(
    operator: str, sizes: list[str], ran: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_sanitize.main([operator, *sizes, "--device", "cpu"]) == 0
    assert capsys.readouterr().out == ran


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_profiled(capsys: pytest.CaptureFixture[str]) -> None:
    assert profile.main([]) == 2
    assert gpu_name.main() == 2
    assert gpu_sanitize.main(["route_topk", "N=5", "E=5", "k=2"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_a_whole_step_is_profiled(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["B=5", "I=40", "E=3", "M=2", "D=24", "R=4"]
    assert profile.main(["cls", "--device", "cpu", "--dtype", "float32", "--sizes", *sizes]) == 0
    printed = capsys.readouterr().out
    assert "training_step_cls float32 B=5 I=40 E=3 M=2 D=24 R=4: one step" in printed
    assert "aten::_fused_adam_" in printed


def test_a_gpu_is_busy_while_anything_runs_on_it() -> None:
    assert profile.covered([]) == 0
    assert profile.covered([(5, 9), (0, 4), (3, 6), (1, 2), (20, 21)]) == 10
    said = str(Busy(850.0, 1000.0))
    assert said.startswith("The GPU is busy for 850.0 us of the 1000.0 us of a step")
    assert said.endswith(": 85%.")
