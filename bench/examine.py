"""A variant at the gate: it runs once, is judged, and what it saves and takes is counted on the way."""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import gate, graph, machine
from bench.compare import OURS
from bench.peak import measure_peak
from bench.results import Row
from bench.rows import Rows
from bench.saved import count_saved
from bench.shortage import first_line, fitting, release
from bench.workload import Absent, Tensors, Variant, Workload, both_passes, gradients
from xsmoe.out_of_memory import is_shortage
from xsmoe_kernels.runtime import dispatch

MEMORY_SHARE = 0.8
"""Of what memory is free, what a variant may take."""


FAILS = "it fails here:"
"""What the reason of a rival begins with that raised something nobody expected."""


class _Unrecordable(RuntimeError):
    """A step that a CUDA graph cannot hold."""


class _Ran(NamedTuple):
    """What a run gave, and what was counted meanwhile."""

    found: Tensors
    flop: Mapping[str, float] | None
    saved_bytes: int | None = None
    compile_seconds: float | None = None


@dataclass(frozen=True)
class Checked:
    """A variant that came to the gate, what it found, and what was counted on the way."""

    variant: Variant | None
    row: Row
    flop: Mapping[str, float] | None


class Truth:
    """The exact results of a set of rows, and the reference's."""

    def __init__(self, workload: Workload, rows: Tensors) -> None:
        self.dtype = workload.dtype
        self.exact = {name: tensor.detach() for name, tensor in workload.exact(rows).items()}
        self.reference = outcome(workload.reference(), rows)


def examine(workload: Workload, name: str, rows: Rows, truth: Truth) -> Checked:
    """Builds a variant, runs it once, and judges what it gave.

    Whatever a rival raises makes it absent, so that the others are measured; what code of ours raises is raised.
    """
    try:
        checked, reason = fitting(lambda: _examine(workload, name, rows, truth), workload.device)
    except Exception as error:
        if name.startswith(OURS):
            raise
        reason = f"{FAILS} {type(error).__name__}: {first_line(error)}"
    else:
        return checked or too_large(name, reason)
    # Only here, where the error is gone, whose traceback held tensors.
    release(workload.device)
    return Checked(None, Row(name, "absent", reason), None)


def _examine(workload: Workload, name: str, rows: Rows, truth: Truth) -> Checked:
    free, needed = machine.available(workload.device), workload.memory(name)
    if free is not None and needed > MEMORY_SHARE * free:
        reason = f"it would take about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
        return Checked(None, Row(name, "skipped", reason), None)
    try:
        variant = workload.build(name)
        taken = rows.get(0, variant.dtype)
        before, skipped = dispatch.calls.copy(), graph.skipped()
        ran = _recorded(variant, rows.get(1, variant.dtype), taken) if variant.prepare else _run(variant, taken)
    except Absent as reason:
        return Checked(None, Row(name, "absent", str(reason)), None)
    except _Unrecordable as reason:
        # Not every rival can be; ours must.
        status = "refused" if name.startswith("ours") else "absent"
        return Checked(None, Row(name, status, f"it cannot be recorded: {reason}"), None)
    served = dispatch.calls - before
    if variant.solves is not None:
        truth = Truth(variant.solves, rows.get(0, None))
    verdict = gate.judge(ran.found, truth.exact, truth.reference, truth.dtype, workload.operators)
    left_out = graph.skipped() - skipped if workload.device.type == "cuda" else 0
    # A graph's memory is its own between runs, too.
    peak = None
    if not (variant.prepare or verdict.refused):
        peak = measure_peak(lambda: both_passes(variant, taken), workload.device)
    row = Row(
        name,
        "refused" if verdict.refused else "measured",
        verdict.refused,
        backend="+".join(sorted({backend for _, backend in served})) or None,
        error=verdict.ratio,
        worst=verdict.worst,
        saved_bytes=ran.saved_bytes,
        compile_seconds=ran.compile_seconds,
        peak_bytes=peak.growth if peak else None,
        returned_bytes=peak.returned if peak else None,
        remark=_remark(variant, left_out),
    )
    return Checked(variant, row, ran.flop)


def _remark(variant: Variant, left_out: int) -> str | None:
    remarks = [f"solves another problem: {variant.solves.title}"] if variant.solves is not None else []
    if left_out:
        remarks.append(f"torch.compile left CUDA graphs out {left_out} times")
    return "; ".join(remarks) or None


def outcome(variant: Variant, rows: Tensors) -> Tensors:
    """Results, gradients and counters of one run."""
    if variant.prepare is not None:
        rows = variant.prepare(rows)
    variant.reset()
    if variant.step is not None:
        return _tidied(variant, *variant.step(rows))
    results = variant.forward(rows)
    return _tidied(variant, results, gradients(variant, rows, results))


def too_large(name: str, reason: str) -> Checked:
    """What is found of a variant for which memory does not suffice."""
    return Checked(None, Row(name, "skipped", f"out of memory: {reason}"), None)


def _tidied(variant: Variant, results: Tensors, taken: Tensors) -> Tensors:
    """Copies of all that a run gave: a graph's next run writes to the same place."""
    tidy = {name: variant.tidy(name, gradient) for name, gradient in taken.items()}
    return {name: t.detach().clone() for name, t in (results | tidy | variant.counters()).items()}


def _run(variant: Variant, rows: Tensors) -> _Ran:
    if not variant.compiled:
        return _watched(variant, rows)
    begin = time.perf_counter()
    with _compiling():
        found = outcome(variant, rows)
    compile_seconds = time.perf_counter() - begin
    with count_saved([*variant.holds(), *rows.values()]) as saved:
        kept = variant.forward(rows)
    del kept
    return _Ran(found, variant.products, saved.bytes, compile_seconds)


def _recorded(variant: Variant, others: Tensors, rows: Tensors) -> _Ran:
    """For a variant of graphs: what it gives when it replays one, which torch.compile does from the third run on.

    It is recorded on other rows than it is judged on, so that what has those in it for good is refused.
    """
    begin = time.perf_counter()
    try:
        with _compiling():
            outcome(variant, others)
    except RuntimeError as error:
        if variant.compiled or isinstance(error, Absent) or is_shortage(error):
            raise
        if error.__context__ is not None and is_shortage(error.__context__):
            # Ending the recording failed for it.
            raise error.__context__ from None
        raise _Unrecordable(first_line(error)) from error
    compile_seconds = time.perf_counter() - begin if variant.compiled else None
    if variant.step is None:
        outcome(variant, others)
    else:
        _poison(*variant.step(others))
    return _Ran(outcome(variant, rows), variant.products, compile_seconds=compile_seconds)


def _poison(results: Tensors, taken: Tensors) -> None:
    """Overwrites what a replay gave, so that the next one has to write it."""
    for tensor in (*results.values(), *taken.values()):
        tensor.detach().fill_(float("nan") if tensor.is_floating_point() else -1)


def _watched(variant: Variant, rows: Tensors) -> _Ran:
    """The outcome, FLOP of the matrix products of each pass, and bytes saved for backward, all in one run."""
    if any(tensor.is_cuda for tensor in rows.values()):
        # Kernels that are tuned at their first launch must not be timed while memory is poisoned.
        gradients(variant, rows, variant.forward(rows))
    variant.reset()
    with _poisoned(), ExitStack() as hooks:
        saved = hooks.enter_context(count_saved([*variant.holds(), *rows.values()]))
        with FlopCounterMode(display=False) as forward:
            results = variant.forward(rows)
        hooks.close()
        saved_bytes = saved.bytes
        with FlopCounterMode(display=False) as backward:
            found = _tidied(variant, results, gradients(variant, rows, results))
    counted = {"forward": float(forward.get_total_flops()), "backward": float(backward.get_total_flops())}
    return _Ran(found, variant.products or counted, saved_bytes)


@contextmanager
def _poisoned() -> Iterator[None]:
    """Fills memory that nobody has written yet with NaN, so that a result which stays unwritten is refused."""
    settings: Any = torch.utils.deterministic  # typed without what it sets
    mode, fill = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = fill
        torch.set_deterministic_debug_mode(mode)


@contextmanager
def _compiling() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("torch._"):
            raise
        raise Absent(f"torch.compile fails here: {first_line(error)}") from error
