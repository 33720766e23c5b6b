"""One point of a sweep: the gate, then what each variant saves and takes."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from bench.case import checking, rows_and_truth, untimed
from bench.examine import Truth, examine, too_large
from bench.measure import Say
from bench.memory.resident import NotResident, Point, resident_growth
from bench.memory.step import step_of, warm_up
from bench.peak import Peak, measure_peak
from bench.results import Case, Row
from bench.rows import Rows
from bench.shortage import fitting, release
from bench.workload import Variant, Workload

# One to judge a recorded graph by, and one to record it on.
SETS = 2


def measure(workload: Workload, names: Sequence[str], *, resident: bool = True, say: Say = lambda _: None) -> Case:
    """The memory of those variants whose results are right.

    Args:
        workload: what is measured.
        names: variants, in the order of their rows.
        resident: whether a process of its own measures resident memory too, on a CPU.
        say: told what goes on.
    """
    if any(name.startswith("compiled") for name in names):
        # Or compiling for one size after the other ends with what serves all of them, or with none.
        torch._dynamo.reset()
    release(workload.device)
    say("inputs and exact result")
    drawn, reason = fitting(lambda: rows_and_truth(workload, SETS), workload.device)
    rows = []
    for name in names:
        say(f"{checking(name)} and its peak")
        row = _measured(workload, name, *drawn) if drawn else too_large(name, f"the exact result: {reason}").row
        if resident and row.status == "measured" and workload.device.type == "cpu":
            say(f"resident memory of {name}")
            row = _with_resident(workload, row)
        rows.append(row)
    return untimed(workload, workload.title, workload.sizes, workload.dtype, workload.device, rows)


def _measured(workload: Workload, name: str, rows: Rows, truth: Truth) -> Row:
    checked = examine(workload, name, rows, truth)
    if checked.row.status != "measured":
        return checked.row
    row = replace(checked.row, expected_saved_bytes=workload.kept(name))
    variant = checked.variant
    if variant is None or variant.whole is None:
        return row
    peak, reason = fitting(lambda: _whole_peak(workload, variant, rows), workload.device)
    if peak is None:
        return too_large(name, reason).row
    return replace(row, peak_bytes=peak.growth, returned_bytes=peak.returned)


def _whole_peak(workload: Workload, variant: Variant, rows: Rows) -> Peak:
    taken = rows.get(0, variant.dtype)
    warm_up(variant, taken)
    return measure_peak(step_of(variant, taken), workload.device)


def _with_resident(workload: Workload, row: Row) -> Row:
    point = Point(type(workload), workload.sizes, workload.dtype, workload.seed, row.variant, torch.get_num_threads())
    try:
        return replace(row, resident_bytes=resident_growth(point))
    except NotResident as error:
        said = f"no resident memory: {error}"
        return replace(row, remark=f"{row.remark}; {said}" if row.remark else said)
