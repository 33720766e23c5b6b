"""Where memory does not suffice, a row is skipped, and the others are measured."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import case, examine, floor, results
from bench.__main__ import main
from bench.kernels.side_moe import SideMoE
from bench.memory.resident import NotResident, Point, resident_growth
from bench.results import Row, table
from bench.workload import Tensors, Variant
from xsmoe.out_of_memory import is_shortage

SAID = "CUDA out of memory. Tried to allocate 2.00 GiB."
REASON = f"out of memory: {SAID}"


@pytest.fixture
def workload(cpu: torch.device) -> SideMoE:
    return SideMoE({"N": 67, "E": 3, "D": 24, "R": 6}, torch.float32, cpu)


def after(runs: int) -> Callable[[Variant], Variant]:
    """Makes a variant whose forward needs too much from some run on."""

    def too_large(variant: Variant) -> Variant:
        left = iter(range(runs))

        def forward(rows: Tensors) -> Tensors:
            if next(left, None) is None:
                raise torch.OutOfMemoryError(f"{SAID}\nmore")
            return variant.forward(rows)

        return replace(variant, forward=forward)

    return too_large


def measured(workload: SideMoE, monkeypatch: pytest.MonkeyPatch, change: Callable[[Variant], Variant]) -> list[Row]:
    build = workload.build
    monkeypatch.setattr(workload, "build", lambda name: change(build(name)) if name == "eager" else build(name))
    found = case.measure(workload, ["naive", "eager", "ours"], ["naive", "eager"], seconds=0.01)
    assert "| naive " in table(found)
    return found.rows


@pytest.mark.parametrize("runs", [0, 1, 3], ids=["gate", "warm-up", "rounds"])
def test_what_runs_out_of_memory_is_skipped(workload: SideMoE, monkeypatch: pytest.MonkeyPatch, runs: int) -> None:
    naive, eager, ours = measured(workload, monkeypatch, after(runs))
    assert (eager.status, eager.reason, eager.passes) == ("skipped", REASON, {})
    assert naive.status == ours.status == "measured"
    assert set(ours.passes["both"].against) == {"naive"}
    assert len(ours.passes["both"].samples) == len(naive.passes["both"].samples) >= 3


def test_a_recording_may_run_out_of_memory(workload: SideMoE, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(rows: Tensors) -> Tensors:
        raise error

    error: RuntimeError = torch.OutOfMemoryError(SAID)
    assert measured(workload, monkeypatch, lambda variant: replace(variant, prepare=prepare))[1].reason == REASON
    # Ending a recording that failed fails too.
    error = RuntimeError("capture was invalidated")
    error.__context__ = torch.OutOfMemoryError(SAID)
    assert measured(workload, monkeypatch, lambda variant: replace(variant, prepare=prepare))[1].reason == REASON


def test_the_peak_may_run_out_of_memory(workload: SideMoE, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure_peak(step: object, device: torch.device) -> None:
        raise torch.OutOfMemoryError(SAID)

    monkeypatch.setattr(examine, "measure_peak", measure_peak)
    assert {row.reason for row in measured(workload, monkeypatch, lambda variant: variant)} == {REASON}


def test_nothing_is_measured_without_the_exact_result(workload: SideMoE, monkeypatch: pytest.MonkeyPatch) -> None:
    def exact(rows: Tensors) -> Tensors:
        raise torch.OutOfMemoryError(SAID)

    monkeypatch.setattr(workload, "exact", exact)
    rows = case.measure(workload, ["naive", "ours"], ["naive"], seconds=0.01).rows
    assert {row.reason for row in rows} == {f"out of memory: the exact result: {SAID}"}


def test_probes_may_run_out_of_memory(workload: SideMoE, monkeypatch: pytest.MonkeyPatch) -> None:
    probes = floor.probes

    def too_large(turn: int) -> tuple[float, ...]:
        raise torch.OutOfMemoryError(SAID)

    monkeypatch.setattr(floor, "probes", lambda *given: dict.fromkeys(probes(*given), too_large))
    rows = measured(workload, monkeypatch, lambda variant: variant)
    assert {row.status for row in rows} == {"measured"}
    assert {row.passes["both"].floor for row in rows} == {0.0}


def test_a_remark_on_graphs_is_for_gpus(workload: SideMoE, monkeypatch: pytest.MonkeyPatch) -> None:
    skips = iter(range(100))
    monkeypatch.setattr("bench.graph.skipped", lambda: next(skips))
    assert {row.remark for row in measured(workload, monkeypatch, lambda variant: variant)} == {None}


def cpu_error() -> RuntimeError:
    """What torch's own allocator says."""
    with pytest.raises(RuntimeError) as short:
        torch.empty(1 << 50)
    return short.value


@pytest.mark.parametrize("runs", [0, 3], ids=["gate", "rounds"])
def test_a_cpu_runs_out_of_memory_too(workload: SideMoE, monkeypatch: pytest.MonkeyPatch, runs: int) -> None:
    def change(variant: Variant) -> Variant:
        left = iter(range(runs))

        def forward(rows: Tensors) -> Tensors:
            if next(left, None) is None:
                torch.empty(1 << 50)
            return variant.forward(rows)

        return replace(variant, forward=forward)

    naive, eager, ours = measured(workload, monkeypatch, change)
    assert eager.status == "skipped"
    assert "can't allocate memory: you tried to allocate" in (eager.reason or "")
    assert naive.status == ours.status == "measured"


def test_which_errors_are_of_memory() -> None:
    windows = RuntimeError(
        "[enforce fail] data. DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."
    )
    for error in (cpu_error(), windows, MemoryError(), torch.OutOfMemoryError(SAID)):
        assert is_shortage(error)
    for error in (RuntimeError("CUDA error"), ValueError("DefaultCPUAllocator: not enough memory")):
        assert not is_shortage(error)


@pytest.mark.parametrize("command", ["kernels", "memory"])
@pytest.mark.parametrize("place", ["weights", "rows"])
def test_a_case_whose_inputs_do_not_fit_is_skipped(
    command: str,
    place: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made, draw = SideMoE.__post_init__, SideMoE.draw

    def large(workload: SideMoE) -> None:
        if workload.sizes["E"] == 4:
            torch.empty(1 << 50)

    monkeypatch.setattr(
        SideMoE, "__post_init__", lambda workload: (place == "weights" and large(workload), made(workload))
    )
    monkeypatch.setattr(SideMoE, "draw", lambda workload: (place == "rows" and large(workload), draw(workload))[1])
    monkeypatch.setattr("bench.memory.point.resident_growth", lambda point: 1 << 20)
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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a peak anew")
def test_a_process_of_its_own_may_run_out_of_memory() -> None:
    # Two side levels of so many rows take more than any machine has.
    sizes = {"N": 1 << 40, "E": 2, "D": 64, "R": 2, "M": 1}
    with pytest.raises(NotResident, match="out of memory: .*you tried to allocate"):
        resident_growth(Point(SideMoE, sizes, torch.float32, 0, "ours", 1))
