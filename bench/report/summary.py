"""The summary of `python -m bench all`: one table, then what is missing in it, then slowdowns."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.core import machine
from bench.core.results import Case, Role, Row, Run, sizes_text
from bench.report.comparison import BASELINE_ROLES, FEW_ROUNDS, baseline_role, baselines, fastest, problem_notes
from bench.report.slowdowns import slowdowns
from bench.report.tables import markdown_table, mib, ms, percent

NOT_MEASURED = ("refused", "absent", "skipped")
LEGEND = (
    "x: times as fast as the fastest baseline of that kind, the median over rounds with the 10th and 90th percentile; "
    "for a whole step, or for forward if there is no backward. rounds: timed rounds of each variant, or steps of a "
    f"stream; fewer than {FEW_ROUNDS} are few, and say little. paper: the published formulation; eager: the fastest "
    "plain PyTorch; compiled: torch.compile; library: from the package index. of bound: the least possible time at the "
    "rates measured in the same run, over the median. baseline's peak: the published formulation's, or the fastest "
    "eager one's if nothing is published. error: against float64, in units of the reference's error."
)


def report(runs: Sequence[Run], notes: Sequence[str], parts: Sequence[str]) -> str:
    """Return the summary in Markdown.

    Args:
        runs: of operators, training steps and streams.
        notes: more lines about the results, such as a stream's quality.
        parts: what ran, and how it ended.
    """
    sections = [["# Benchmarks"], _machine([run.machine for run in runs])]
    if body := table(runs):
        asterisks = problem_notes(row for run in runs for case in run.cases for row in case.rows)
        head = "## Speed-up, memory, and distance from the limit"
        sections.append([head, "", *body, "", LEGEND, *(line for note in asterisks for line in ("", note))])
    if notes:
        sections.append(["## Notes", "", *notes])
    sections.append(["## Refused, absent, skipped", "", *(missing(runs) or ["none"])])
    sections.append(
        ["## Slower than a baseline", "", *([f"- {one}" for one in slowdowns(runs, steps=True)] or ["none"])]
    )
    sections.append(["## What ran", "", *parts])
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def table(runs: Sequence[Run]) -> list[str]:
    """Return a row for each of our variants that was measured."""
    cases = [case for run in runs for case in run.cases]
    measured = {baseline_role(row) for case in cases for row in case.rows}
    roles = [role for role in BASELINE_ROLES if role != Role.LIBRARY or role in measured]
    head = ["what", "variant", "rounds", "ms", *(f"x {role}" for role in roles), "of bound"]
    head += ["peak MiB", "baseline's peak MiB", "error"]
    body = [_cells(case, row, roles) for case in cases for row in case.rows if row.ours and row.passes]
    return markdown_table(head, body) if body else []


def missing(runs: Sequence[Run]) -> list[str]:
    """Return a line for each row without a time, with its reason; equal ones of several sizes share a line."""
    found: dict[tuple[str, str, str, str], list[str]] = {}
    for case in (case for run in runs for case in run.cases):
        for row in case.rows:
            if row.status in NOT_MEASURED:
                key = row.status, case.operator, row.variant, row.reason or ""
                found.setdefault(key, []).append(sizes_text(case.sizes))
    lines = []
    for status, operator, variant, reason in sorted(found, key=lambda key: NOT_MEASURED.index(key[0])):
        sizes = found[status, operator, variant, reason]
        where = sizes[0] if len(sizes) == 1 else f"{len(sizes)} sizes"
        lines.append(f"- {status}: {operator} {variant}, {where}: {reason}")
    return lines


def _machine(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [f"{machine.line(dict(facts[0]))}." if facts else "Nothing was measured."]
    if any(machine.busy(dict(one)) for one in facts):
        lines += ["", machine.BUSY]
    return lines


def _cells(case: Case, row: Row, roles: Sequence[Role]) -> list[str]:
    assert row.step is not None
    cells = [case.label, row.label, _rounds(row.step.samples), ms(row.step.median)]
    cells += [_speedup_cell(case, row, role) for role in roles]
    other = fastest(case, row, Role.PAPER) or fastest(case, row, Role.EAGER)
    peak = "" if other is None or other.row.peak_bytes is None else f"{mib(other.row.peak_bytes)} ({other.row.variant})"
    return [
        *cells,
        percent(row.step.of_bound) if row.step.of_bound else "",
        mib(row.peak_bytes),
        peak,
        _error(row.error),
    ]


def _speedup_cell(case: Case, row: Row, role: Role) -> str:
    best = fastest(case, row, role)
    if best is not None:
        return _speedup(best.speedup, best.row.label)
    statuses = (other.status for other in baselines(case, row) if baseline_role(other) == role)
    return "/".join(dict.fromkeys(status for status in statuses if status != "measured"))


def _rounds(samples: Sequence[float]) -> str:
    return f"{len(samples)}, few rounds" if len(samples) < FEW_ROUNDS else str(len(samples))


def _speedup(ratio: Sequence[float], baseline: str) -> str:
    """Return the median, the 10th and 90th percentiles, and the baseline."""
    return f"{ratio[0]:.2f}, {ratio[1]:.2f}-{ratio[2]:.2f} ({baseline})"


def _error(error: float | None) -> str:
    return "" if error is None else f"{error:.2f}"
