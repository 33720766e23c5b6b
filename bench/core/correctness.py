"""The correctness check that a variant passes before it is timed.

Every result, gradient and counter is compared with float64. The error budget is twice the error of the reference. In
the same run, saved activations and executed FLOP are counted.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.core import cuda_graphs, machine
from bench.core.benchmark import (
    Absent,
    Benchmark,
    Implementation,
    InputSets,
    Tensors,
    Variant,
    forward_backward,
    gradients,
)
from bench.core.memory import count_saved, first_line, is_out_of_memory, measure_peak, release, try_run
from bench.core.results import Role, Row
from xsmoe_kernels.runtime import dispatch

MEMORY_SHARE = 0.8
"""The share of free memory that a variant may use."""

UNEXPECTED = "it fails here:"
"""The start of the reason for a baseline that raised an unexpected error."""


class Verdict(NamedTuple):
    """The result of a comparison with float64.

    Attributes:
        refused: why no time may be reported; None if everything is right.
        ratio: the largest error of any result, in units of the reference's error in that result.
        worst: the result that has this error.
    """

    refused: str | None
    ratio: float
    worst: str


def judge(
    found: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    dtype: torch.dtype,
    chained_operators: int = 1,
) -> Verdict:
    """Compare results with the exact ones.

    The budget of a result is `2 |reference - exact| + 4 eps |exact|`, for the norm of the whole tensor and for the
    largest norm of a row. The second norm finds one wrong row among many right ones. Integers must be equal.

    Args:
        found: results under test.
        exact: float64 results. They define which results there must be.
        reference: results of the specification, computed in `dtype`.
        dtype: its eps is used for the budget. Counters are wider than the values that they count.
        chained_operators: the number of operators that a result passes through. In float32 each adds one budget. In
            16 bits such a sum would accept anything, so the budget is that of at most two.
    """
    ratio, worst = 0.0, ""
    eps = torch.finfo(dtype).eps
    chained = chained_operators if dtype == torch.float32 else min(chained_operators, 2)
    for name, truth in exact.items():
        if name not in found:
            return Verdict(f"{name} is missing", float("inf"), name)
        result = found[name].detach()
        if result.shape != truth.shape:
            return Verdict(f"{name} is {tuple(result.shape)}, not {tuple(truth.shape)}", float("inf"), name)
        if not truth.is_floating_point():
            if wrong := int((result != truth).sum()):
                return Verdict(f"{name}: {wrong} of {truth.numel()} integers are wrong", float("inf"), name)
            continue
        expected = reference[name].detach()
        truth = truth.double()
        for rows in (False, True):
            size = _norm(truth, rows)
            error, reference_error = _norm(result.double() - truth, rows), _norm(expected.double() - truth, rows)
            budget = 2 * reference_error + 4 * chained * eps * size
            # The reference can be exact by chance. eps / 8, the error of rounding alone, is the least unit.
            in_units = error / max(reference_error, eps * size / 8, 1e-300)
            # A NaN on either side makes this condition true.
            if not error <= budget < float("inf"):
                where = "worst row of " if rows else ""
                message = f"{where}{name}: error {_relative(error, size)}, allowed {_relative(budget, size)}"
                return Verdict(message, in_units, name)
            if in_units > ratio and not rows:
                ratio, worst = in_units, name
    return Verdict(None, ratio, worst)


class Truth:
    """The exact results of a set of inputs, and the reference's results."""

    def __init__(self, benchmark: Benchmark, inputs: Tensors) -> None:
        self.dtype = benchmark.dtype
        self.exact = {name: tensor.detach() for name, tensor in benchmark.exact(inputs).items()}
        self.reference = outcome(benchmark.reference(), inputs)


@dataclass(frozen=True)
class Checked:
    """A variant after the correctness check.

    Attributes:
        implementation: None if the variant is absent or was skipped.
        row: its record, without times.
        flop: FLOP of the matrix products of each pass; None if they were not counted.
    """

    variant: Variant
    implementation: Implementation | None
    row: Row
    flop: Mapping[str, float] | None = None


class _Ran(NamedTuple):
    found: Tensors
    flop: Mapping[str, float] | None
    saved_bytes: int | None = None
    compile_seconds: float | None = None


class _CaptureFailed(RuntimeError):
    """A CUDA graph cannot hold the step."""


def check(benchmark: Benchmark, variant: Variant, inputs: InputSets, truth: Truth) -> Checked:
    """Build a variant, run it once, and compare its results.

    A baseline that raises is absent, and the other variants are measured. Errors of our own code are raised.
    """
    try:
        checked, reason = try_run(lambda: _check(benchmark, variant, inputs, truth), benchmark.device)
    except Exception as error:
        if variant.role in (Role.OURS, Role.REFERENCE):
            raise
        reason = f"{UNEXPECTED} {type(error).__name__}: {first_line(error)}"
    else:
        return checked or skipped(variant, reason)
    # The traceback of the error held tensors, so memory can be released only after the except block.
    release(benchmark.device)
    return Checked(variant, None, variant.row("absent", reason))


def skipped(variant: Variant, reason: str) -> Checked:
    """Return the record of a variant that does not fit into memory."""
    return Checked(variant, None, variant.row("skipped", f"out of memory: {reason}"))


def outcome(implementation: Implementation, inputs: Tensors) -> Tensors:
    """Return results, gradients and counters of one run."""
    if implementation.prepare is not None:
        inputs = implementation.prepare(inputs)
    implementation.reset()
    if implementation.step is not None:
        return _copied(implementation, *implementation.step(inputs))
    results = implementation.forward(inputs)
    return _copied(implementation, results, gradients(implementation, inputs, results))


def _check(benchmark: Benchmark, variant: Variant, inputs: InputSets, truth: Truth) -> Checked:
    free, needed = machine.available_memory(benchmark.device), variant.peak_estimate
    if free is not None and needed > MEMORY_SHARE * free:
        reason = f"it would need about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
        return Checked(variant, None, variant.row("skipped", reason))
    try:
        built = variant.build()
        mine = inputs.get(0, variant.dtype)
        before, skips = dispatch.calls.copy(), cuda_graphs.skipped_graphs()
        if built.prepare is not None:
            ran = _run_captured(variant, built, inputs.get(1, variant.dtype), mine)
        elif variant.compiled:
            ran = _run_compiled(built, mine)
        else:
            ran = _run_watched(built, mine)
    except Absent as reason:
        return Checked(variant, None, variant.row("absent", str(reason)))
    except _CaptureFailed as error:
        # A baseline need not be capturable. Our variants must be.
        status = "refused" if variant.role == Role.OURS else "absent"
        return Checked(variant, None, variant.row(status, f"it cannot be recorded: {error}"))
    served = dispatch.calls - before
    if built.solves is not None:
        truth = Truth(built.solves, inputs.get(0))
    verdict = judge(ran.found, truth.exact, truth.reference, truth.dtype, benchmark.chained_operators)
    skips = cuda_graphs.skipped_graphs() - skips if benchmark.on_cuda else 0
    # A graph keeps its memory between runs, so a step allocates nothing.
    peak = None
    if built.prepare is None and not verdict.refused:
        peak = measure_peak(lambda: forward_backward(built, mine), benchmark.device)
    row = replace(
        variant.row("refused" if verdict.refused else "measured", verdict.refused),
        problem=None if built.solves is None else built.solves.title,
        backend="+".join(sorted({backend for _, backend in served})) or None,
        error=verdict.ratio,
        worst=verdict.worst,
        saved_bytes=ran.saved_bytes,
        expected_saved_bytes=variant.expected_saved_bytes,
        compile_seconds=ran.compile_seconds,
        peak_bytes=peak.growth if peak else None,
        returned_bytes=peak.returned if peak else None,
        remark=f"torch.compile skipped CUDA graphs {skips} times" if skips else None,
    )
    return Checked(variant, built, row, ran.flop)


def _run_compiled(built: Implementation, inputs: Tensors) -> _Ran:
    begin = time.perf_counter()
    with _compile_errors_as_absent():
        found = outcome(built, inputs)
    compile_seconds = time.perf_counter() - begin
    with count_saved([*built.owned(), *inputs.values()]) as saved:
        kept = built.forward(inputs)
    del kept
    return _Ran(found, built.flop, saved.bytes, compile_seconds)


def _run_captured(variant: Variant, built: Implementation, other_inputs: Tensors, inputs: Tensors) -> _Ran:
    """Return the results of a graph replay. torch.compile replays from the third run on.

    The capture uses other inputs than the check. A graph that has its inputs baked in is therefore refused.
    """
    begin = time.perf_counter()
    try:
        with _compile_errors_as_absent():
            outcome(built, other_inputs)
    except RuntimeError as error:
        if variant.compiled or isinstance(error, Absent) or is_out_of_memory(error):
            raise
        if error.__context__ is not None and is_out_of_memory(error.__context__):
            # The end of the capture failed because of it.
            raise error.__context__ from None
        raise _CaptureFailed(first_line(error)) from error
    compile_seconds = time.perf_counter() - begin if variant.compiled else None
    if built.step is None:
        outcome(built, other_inputs)
    else:
        # The next replay has to write every result again.
        results, found = built.step(other_inputs)
        for tensor in (*results.values(), *found.values()):
            tensor.detach().fill_(float("nan") if tensor.is_floating_point() else -1)
    return _Ran(outcome(built, inputs), built.flop, compile_seconds=compile_seconds)


def _run_watched(built: Implementation, inputs: Tensors) -> _Ran:
    """Return the outcome, the FLOP of each pass and the saved activations of one run."""
    if any(tensor.is_cuda for tensor in inputs.values()):
        # Kernels that are tuned at their first launch must not be timed while memory is filled with NaN.
        gradients(built, inputs, built.forward(inputs))
    built.reset()
    with _nan_filled_memory(), ExitStack() as hooks:
        saved = hooks.enter_context(count_saved([*built.owned(), *inputs.values()]))
        with FlopCounterMode(display=False) as forward:
            results = built.forward(inputs)
        hooks.close()
        saved_bytes = saved.bytes
        with FlopCounterMode(display=False) as backward:
            found = _copied(built, results, gradients(built, inputs, results))
    counted = {"forward": float(forward.get_total_flops()), "backward": float(backward.get_total_flops())}
    return _Ran(found, built.flop or counted, saved_bytes)


def _copied(built: Implementation, results: Tensors, found: Tensors) -> Tensors:
    """Return copies of everything that a run returned. The next replay of a graph overwrites the originals."""
    normalized = {name: built.normalize(name, gradient) for name, gradient in found.items()}
    return {name: t.detach().clone() for name, t in (results | normalized | built.counters()).items()}


@contextmanager
def _nan_filled_memory() -> Iterator[None]:
    """Fill uninitialized memory with NaN, so that an unwritten result is refused."""
    settings: Any = torch.utils.deterministic  # its type stubs lack the attribute
    mode, fill = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = fill
        torch.set_deterministic_debug_mode(mode)


@contextmanager
def _compile_errors_as_absent() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("torch._"):
            raise
        raise Absent(f"torch.compile fails here: {first_line(error)}") from error


def _norm(tensor: Tensor, rows: bool) -> float:
    if tensor.numel() == 0:
        return 0.0
    if not rows:
        return float(torch.linalg.vector_norm(tensor))
    flat = tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim > 1 else tensor.reshape(-1, 1)
    return float(torch.linalg.vector_norm(flat, dim=-1).max())


def _relative(error: float, size: float) -> str:
    return f"{error / size:.2e} of its size" if size > 0 else f"{error:.2e}"
