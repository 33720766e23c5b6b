"""Where memory does not suffice, a row is skipped, and the others are measured."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from bench import case, examine, floor
from bench.kernels.side_moe import SideMoE
from bench.results import Row, table
from bench.workload import Tensors, Variant

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
