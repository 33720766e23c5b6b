"""The summary and the profile, from fake results and on a CPU."""

from pathlib import Path

import pytest
import torch

from bench.cli import profile
from bench.cli.profile import Busy, KernelTime
from bench.core import results
from bench.core.results import Case, Role, Row, Run, Timing
from bench.e2e.stream import records
from bench.gpu import name as gpu_name
from bench.gpu import sanitize as gpu_sanitize
from bench.gpu import summary as gpu_summary

ROOT = Path(__file__).parents[2]


def timing(seconds: float, share: float = 0.5) -> Timing:
    return Timing(seconds, seconds, seconds, [seconds, seconds * 2, seconds], {}, seconds * share, share, 4e9)


def run(device: str = "cuda", commit: str = "abc") -> Run:
    rows = [
        Row(
            "naive",
            Role.PAPER,
            "measured",
            peak_bytes=96 << 20,
            dtype="float32",
            passes={"forward": timing(4e-3), "both": timing(12e-3)},
        ),
        Row("compiled-graph", Role.COMPILED, "absent", "torch.compile fails here"),
        Row("naive-autocast", Role.PAPER, "measured", peak_bytes=128 << 20, passes={"both": timing(4e-3)}),
        Row("eager", Role.EAGER, "measured", peak_bytes=112 << 20, passes={"both": timing(2e-3)}),
        Row("ours", Role.OURS, "measured", backend="triton", peak_bytes=8 << 20, passes={"both": timing(1e-3)}),
        Row("ours-graph", Role.OURS, "measured", backend="triton", passes={"both": timing(5e-4, 0.9)}),
        Row("ours-recompute", Role.OURS, "refused", "y: error 1"),
    ]
    sizes = {"N": 2816, "E": 10, "D": 768, "R": 64, "M": 2}
    work = {"forward": 1e9, "backward": 3e9}
    case = Case("side_moe", "title", sizes, "bfloat16", device, 1e13, 2e12, work, {"forward": 4e7}, 3, rows)
    return Run(["kernels"], {"commit": commit}, [case], 1.0)


def test_speeds_are_medians_of_paired_rounds() -> None:
    text = gpu_summary.speeds(iter([run(), run("cpu")]))
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    baselines = ["x naive", "x compiled-graph", "x naive-autocast", "x eager"]
    assert head == ["case", "variant", "ms", *baselines, "of bound", "peak MiB", "least baseline's"]
    assert [row[1] for row in rows] == ["ours", "ours-graph", "ours-recompute"]
    assert rows[0][2:] == ["1.000", "12.00", "absent", "4.00", "2.00", "50%", "8.0", "112.0 (eager)"]
    assert rows[1][2:] == ["0.500", "24.00", "absent", "8.00", "4.00", "90%", "", "112.0 (eager)"]
    assert rows[2][2] == "refused"
    assert "N=2816 E=10 D=768 R=64 M=2" in rows[0][0]


def test_speeds_compare_equal_problems_only() -> None:
    easier = "plain cross-entropy"
    rows = [
        Row("eager", Role.EAGER, "measured", peak_bytes=9 << 20, passes={"both": timing(8e-3)}),
        Row("liger", Role.LIBRARY, "measured", peak_bytes=1 << 20, problem=easier, passes={"both": timing(2e-3)}),
        Row("ours", Role.OURS, "measured", peak_bytes=4 << 20, passes={"both": timing(4e-3)}),
        Row("ours-plain", Role.OURS, "measured", peak_bytes=4 << 20, problem=easier, passes={"both": timing(1e-3)}),
    ]
    case = Case("loss", "title", {"B": 3}, "float32", "cuda", 1e13, 2e12, {"forward": 1e9}, {"forward": 4e7}, 3, rows)
    lines = gpu_summary.speeds([Run(["kernels"], {}, [case], 1.0)]).splitlines()
    head, _, ours, plain = (_cells(line) for line in lines[:4])
    assert head[3:5] == ["x eager", "x liger"]
    assert (ours[1], ours[3:5], ours[-1]) == ("ours", ["2.00", ""], "9.0 (eager)")
    assert (plain[1], plain[3:5], plain[-1]) == ("ours-plain*", ["", "2.00"], "1.0 (liger)")
    assert lines[-1].startswith("* liger, ours-plain: solves another problem: plain cross-entropy")


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
    assert "broken.json is left out" in printed.err
    assert "side_moe-old.json is left out: it is of commit def" in printed.err
    assert gpu_summary.main([str(tmp_path)]) == 0
    everything = capsys.readouterr().out
    assert everything.count("ours-graph") == 2
    assert "profile" in everything


def test_memory_has_a_separate_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def case(experts: int) -> results.Case:
        row = results.Row("ours", Role.OURS, "measured", saved_bytes=experts << 21, peak_bytes=experts << 22, error=1.0)
        sizes = {"N": 3, "E": experts}
        return results.Case("side_moe", "title", sizes, "bfloat16", "cuda", 0.0, 0.0, {}, {}, 0, [row])

    results.save(results.Run(["memory"], {"commit": "abc"}, [case(1), case(4)], 1.0), tmp_path / "memory-toy.json")
    assert gpu_summary.main([str(tmp_path)]) == 0
    rows = [_cells(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["memory", "unit", "variant", "saved", "by design", "peak"]
    assert rows[2:] == [["side_moe bfloat16 N=3", "an expert", "ours", "2.00 MiB", "", "4.00 MiB"]]


def test_streams_have_a_table_of_their_growth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def window(number: int, step: float, epoch: float) -> records.WindowRecord:
        timed = records.RunRecord(steps=[[step]] * 3, epochs=[epoch, epoch], grow=0.5, test=9.0)
        runs = {"published": records.RunRecord(refused="it was wrong"), "ours-top-2": timed}
        return records.WindowRecord(number, number + 1, 8, 3, 0, None, runs)

    windows, settings = [window(0, 2e-3, 1.0), window(1, 2.2e-3, 1.125)], {"device": "cuda", "graph": True}
    run = records.StreamRun([], {"commit": "abc"}, settings, [], ["published", "ours-top-2"], windows, 1.0)
    records.save(run, tmp_path / "stream-toy.json")
    assert gpu_summary.main([str(tmp_path), "--commit", "abc"]) == 0
    rows = [_cells(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["run", "formulation", "experts", "step ms", "in the end", "x", "window s", "in the end", "x"]
    assert rows[2] == ["stream, graphs", "published", *[""] * 7]
    assert rows[3] == ["stream, graphs", "ours-top-2", "1 to 2", "2", "2.2", "1.10", "2.5", "2.75", "1.10"]


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
    assert gpu_summary.speeds(iter([run("cpu")])) == ""


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
