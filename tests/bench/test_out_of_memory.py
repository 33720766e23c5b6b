"""A variant that runs out of memory is skipped, and the others are measured."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.core import bound, correctness, measure, results
from bench.core.benchmark import Implementation, Tensors
from bench.core.memory import is_out_of_memory
from bench.core.results import Row
from bench.e2e.memory.resident import NotMeasurable, Point, resident_growth
from bench.ops.side_moe import SideMoE
from bench.report.tables import case_table
from tests.bench.helpers import change_build

MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB."
REASON = f"out of memory: {MESSAGE}"


@pytest.fixture
def side_moe(cpu: torch.device) -> SideMoE:
    return SideMoE({"N": 67, "E": 3, "D": 24, "R": 6}, torch.float32, cpu)


def after(runs: int) -> Callable[[Implementation], Implementation]:
    """Return a change after which forward runs out of memory, after this number of runs."""

    def too_large(built: Implementation) -> Implementation:
        left = iter(range(runs))

        def forward(inputs: Tensors) -> Tensors:
            if next(left, None) is None:
                raise torch.OutOfMemoryError(f"{MESSAGE}\nmore")
            return built.forward(inputs)

        return replace(built, forward=forward)

    return too_large


def measured(
    side_moe: SideMoE, monkeypatch: pytest.MonkeyPatch, change: Callable[[Implementation], Implementation]
) -> list[Row]:
    change_build(monkeypatch, side_moe, "eager", lambda eager: change(eager.build()))
    found = measure.measure(side_moe, ["naive", "eager", "ours"], ["naive", "eager"], seconds=0.01)
    assert "| naive " in case_table(found)
    return found.rows


@pytest.mark.parametrize("runs", [0, 1, 3], ids=["check", "warm-up", "rounds"])
def test_a_variant_that_runs_out_of_memory_is_skipped(
    side_moe: SideMoE, monkeypatch: pytest.MonkeyPatch, runs: int
) -> None:
    naive, eager, ours = measured(side_moe, monkeypatch, after(runs))
    assert (eager.status, eager.reason, eager.passes) == ("skipped", REASON, {})
    assert naive.status == ours.status == "measured"
    assert set(ours.passes["both"].against) == {"naive"}
    assert len(ours.passes["both"].samples) == len(naive.passes["both"].samples) >= 3


def test_a_capture_may_run_out_of_memory(side_moe: SideMoE, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(inputs: Tensors) -> Tensors:
        raise error

    error: RuntimeError = torch.OutOfMemoryError(MESSAGE)
    assert measured(side_moe, monkeypatch, lambda built: replace(built, prepare=prepare))[1].reason == REASON
    # Ending a recording that failed fails too.
    error = RuntimeError("capture was invalidated")
    error.__context__ = torch.OutOfMemoryError(MESSAGE)
    assert measured(side_moe, monkeypatch, lambda built: replace(built, prepare=prepare))[1].reason == REASON


def test_the_peak_may_run_out_of_memory(side_moe: SideMoE, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure_peak(step: object, device: torch.device) -> None:
        raise torch.OutOfMemoryError(MESSAGE)

    monkeypatch.setattr(correctness, "measure_peak", measure_peak)
    assert {row.reason for row in measured(side_moe, monkeypatch, lambda built: built)} == {REASON}


def test_without_the_exact_result_all_rows_are_skipped(side_moe: SideMoE, monkeypatch: pytest.MonkeyPatch) -> None:
    def exact(inputs: Tensors) -> Tensors:
        raise torch.OutOfMemoryError(MESSAGE)

    monkeypatch.setattr(side_moe, "exact", exact)
    rows = measure.measure(side_moe, ["naive", "ours"], ["naive"], seconds=0.01).rows
    assert {row.reason for row in rows} == {f"out of memory: the exact result: {MESSAGE}"}


def test_probes_may_run_out_of_memory(side_moe: SideMoE, monkeypatch: pytest.MonkeyPatch) -> None:
    probes = bound.probes

    def too_large(turn: int) -> tuple[float, ...]:
        raise torch.OutOfMemoryError(MESSAGE)

    monkeypatch.setattr(bound, "probes", lambda *given: dict.fromkeys(probes(*given), too_large))
    rows = measured(side_moe, monkeypatch, lambda built: built)
    assert {row.status for row in rows} == {"measured"}
    assert {row.passes["both"].bound for row in rows} == {0.0}


def test_a_remark_on_graphs_is_for_gpus(side_moe: SideMoE, monkeypatch: pytest.MonkeyPatch) -> None:
    skips = iter(range(100))
    monkeypatch.setattr("bench.core.cuda_graphs.skipped_graphs", lambda: next(skips))
    assert {row.remark for row in measured(side_moe, monkeypatch, lambda built: built)} == {None}


def cpu_error() -> RuntimeError:
    """Return the error of torch's allocator."""
    with pytest.raises(RuntimeError) as short:
        torch.empty(1 << 50)
    return short.value


@pytest.mark.parametrize("runs", [0, 3], ids=["check", "rounds"])
def test_a_cpu_runs_out_of_memory_too(side_moe: SideMoE, monkeypatch: pytest.MonkeyPatch, runs: int) -> None:
    def change(built: Implementation) -> Implementation:
        left = iter(range(runs))

        def forward(inputs: Tensors) -> Tensors:
            if next(left, None) is None:
                torch.empty(1 << 50)
            return built.forward(inputs)

        return replace(built, forward=forward)

    naive, eager, ours = measured(side_moe, monkeypatch, change)
    assert eager.status == "skipped"
    assert "can't allocate memory: you tried to allocate" in (eager.reason or "")
    assert naive.status == ours.status == "measured"


def test_errors_of_memory_are_recognized() -> None:
    windows = RuntimeError(
        "[enforce fail] data. DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."
    )
    for error in (cpu_error(), windows, MemoryError(), torch.OutOfMemoryError(MESSAGE)):
        assert is_out_of_memory(error)
    for error in (RuntimeError("CUDA error"), ValueError("DefaultCPUAllocator: not enough memory")):
        assert not is_out_of_memory(error)


@pytest.mark.parametrize("command", ["kernels", "memory"])
@pytest.mark.parametrize("place", ["weights", "rows"])
def test_a_case_whose_inputs_do_not_fit_is_skipped(
    command: str,
    place: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made, draw = SideMoE.__post_init__, SideMoE.make_inputs

    def large(benchmark: SideMoE) -> None:
        if benchmark.sizes["E"] == 4:
            torch.empty(1 << 50)

    monkeypatch.setattr(
        SideMoE, "__post_init__", lambda benchmark: (place == "weights" and large(benchmark), made(benchmark))
    )
    monkeypatch.setattr(
        SideMoE, "make_inputs", lambda benchmark: (place == "rows" and large(benchmark), draw(benchmark))[1]
    )
    monkeypatch.setattr("bench.e2e.memory.measure.resident_growth", lambda point: 1 << 20)
    path = tmp_path / "run.json"
    given = [
        "side_moe",
        "--sizes",
        "N=5",
        "E=2,4",
        "D=8",
        "R=2",
        "M=1",
        "--variants",
        "naive,ours",
        "--json",
        str(path),
    ]
    assert main([command, *given, *(["--seconds", "0.01"] if command == "kernels" else [])]) == 0
    fits, large_case = results.load(path).cases
    assert [row.status for row in fits.rows] == ["measured"] * 2
    assert [row.status for row in large_case.rows] == ["skipped"] * 2
    for row in large_case.rows:
        assert "out of memory: the " in (row.reason or "")
        assert "tried to allocate 4503599627370496 bytes" in (row.reason or "")
    assert "tried to allocate 4503599627370496 bytes" in capsys.readouterr().out


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux can reset the peak")
def test_a_separate_process_may_run_out_of_memory() -> None:
    # Two side levels of so many rows take more than any machine has.
    sizes = {"N": 1 << 40, "E": 2, "D": 64, "R": 2, "M": 1}
    with pytest.raises(NotMeasurable, match="out of memory: .*you tried to allocate"):
        resident_growth(Point(SideMoE, sizes, torch.float32, 0, "ours", 1))
