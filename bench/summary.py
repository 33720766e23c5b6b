"""What `python -m bench all` found, in Markdown: one table, then what is missing from it, then where ours loses."""

from collections.abc import Iterable, Sequence

from bench import machine, standing
from bench.compare import FEWEST_ROUNDS
from bench.measure import quantiles
from bench.results import Case, Row, Run, aligned, lettered, mib, ms, percent
from bench.standing import ROLES
from bench.stream.records import StreamRun, WindowRecord

STATUSES = ("refused", "absent", "skipped")


def report(runs: Sequence[Run], streams: Sequence[StreamRun], told: Sequence[str], parts: Sequence[str]) -> str:
    """All of it.

    Args:
        runs: of operators and steps.
        streams: of whole streams.
        told: more lines on what was found, as a stream's quality.
        parts: what ran, and how it ended.
    """
    sections = [_machine([*(run.machine for run in runs), *(stream.machine for stream in streams)])]
    if body := table(runs, streams):
        marks = standing.explained(row for run in runs for case in run.cases for row in case.rows)
        head = "## How much faster, how much less memory, how far from the limit"
        sections.append([head, "", *body, "", *LEGEND, *(line for mark in marks for line in ("", mark))])
    if told:
        sections.append(["## In words", "", *told])
    sections.append(["## Refused, absent, skipped", "", *(missing(runs, streams) or ["none"])])
    sections.append(["## Slower than a rival", "", *(slower(runs, streams) or ["none"])])
    sections.append(["## What ran", "", *parts])
    return "\n\n".join("\n".join(lines) for lines in ["# Benchmarks".splitlines(), *sections]) + "\n"


LEGEND = (
    "x: times as fast as the fastest rival of its kind, the median over rounds with the 10th and 90th percentile; of a "
    "whole step, or forward where there is no backward. rounds: how often each variant was timed, of a stream its "
    f"steps; fewer than {FEWEST_ROUNDS} are called few, and say little. published: the published formulation; eager: "
    "the best plain PyTorch; compiled: torch.compile; library: of the package index. of floor: the least time at the "
    "rates measured in the same run, over the median. "
    "rival's peak: the published one's, or the fastest eager one's where nothing is published. error: against float64, "
    "in units of the reference's.",
)


def table(runs: Sequence[Run], streams: Sequence[StreamRun]) -> list[str]:
    """A row for each variant of ours that was measured."""
    cases = [case for run in runs for case in run.cases]
    kinds = [kind for kind in ROLES if kind != "library" or any(_has(case, kind) for case in cases)]
    head = ["what", "variant", "rounds", "ms", *(f"x {kind}" for kind in kinds), "of floor"]
    head += ["peak MiB", "rival's peak MiB", "error"]
    body = [_of_case(case, row, kinds) for case in cases for row in case.rows if standing.ours(row) and row.passes]
    body += [_of_window(stream, window, name, kinds) for stream in streams for window, name in _ends(stream)]
    return aligned(head, body) if body else []


def missing(runs: Sequence[Run], streams: Sequence[StreamRun]) -> list[str]:
    """A line for each row without a time, with its reason; equal ones of several sizes in one."""
    found: dict[tuple[str, str, str, str], list[str]] = {}
    for case in (case for run in runs for case in run.cases):
        for row in case.rows:
            if row.status in STATUSES:
                key = row.status, case.operator, row.variant, row.reason or ""
                found.setdefault(key, []).append(lettered(case.sizes))
    keys = sorted(found, key=lambda key: STATUSES.index(key[0]))
    lines = [
        f"- {status}: {name} {variant}, {_counted(found[key])}: {reason}"
        for key in keys
        for status, name, variant, reason in [key]
    ]
    return lines + [
        f"- refused: stream {name}, window {window}: {reason}"
        for stream in streams
        for window, name, reason in stream.refused()
    ]


def slower(runs: Sequence[Run], streams: Sequence[StreamRun]) -> list[str]:
    """A line for each rival that is faster than ours in a whole step."""
    lines = [f"- {standing.told(loss)}" for loss in standing.losses(runs, steps=True)]
    for stream in streams:
        for window in stream.windows:
            for name in stream.names[1:]:
                if (ratio := window.ratio(name)) and ratio[0] < 1:
                    lines.append(
                        f"- stream, {window.experts} experts: {name} {ratio[0]:.2f} times as fast as published "
                        f"({ratio[1]:.2f}-{ratio[2]:.2f}){standing.few_rounds(window.runs[name].step_seconds)}"
                    )
    return lines


def _machine(facts: Sequence[dict[str, object]]) -> list[str]:
    lines = [f"{machine.line(facts[0])}."] if facts else ["Nothing was measured."]
    if any(machine.busy(one) for one in facts):
        lines += ["", "**Other programs kept this machine busy: trust ratios more than times, and neither much.**"]
    return lines


def _of_case(case: Case, row: Row, kinds: Iterable[str]) -> list[str]:
    timing = standing.whole(row)
    assert timing is not None
    cells = [standing.label(case), standing.marked(row), _rounds(timing.samples), ms(timing.median)]
    cells += [_against(case, row, kind) for kind in kinds]
    cells.append(percent(timing.share))
    rival = standing.best(case, row, "published") or standing.best(case, row, "eager")
    peak = "" if rival is None or rival.row.peak_bytes is None else f"{mib(rival.row.peak_bytes)} ({rival.row.variant})"
    return [*cells, mib(row.peak_bytes), peak, "" if row.error is None else f"{row.error:.2f}"]


def _against(case: Case, row: Row, kind: str) -> str:
    rival = standing.best(case, row, kind)
    if rival is not None:
        return _ratio(rival.ratio, standing.marked(rival.row))
    others = [other for other in standing.rivals(case, row) if standing.role(other.variant) == kind]
    return "/".join(dict.fromkeys(other.status for other in others if other.status != "measured"))


def _has(case: Case, kind: str) -> bool:
    return any(standing.role(row.variant) == kind for row in case.rows if not standing.ours(row))


def _ends(stream: StreamRun) -> list[tuple[WindowRecord, str]]:
    """The first and the last window in which a run of ours was timed."""
    found = []
    for name in stream.names[1:]:
        timed = [window for window in stream.windows if window.timed(name)]
        found += [(window, name) for window in {one.window: one for one in timed[:1] + timed[-1:]}.values()]
    return found


def _of_window(stream: StreamRun, window: WindowRecord, name: str, kinds: Iterable[str]) -> list[str]:
    mine, theirs, s = window.runs[name], window.runs["published"], stream.settings
    ratio = window.ratio(name)
    what = f"stream step {s['dtype']} {s['pooling']} batch={s['batch']} E={window.experts}"
    cells = [what, name, _rounds(mine.step_seconds), ms(quantiles(mine.step_seconds).median)]
    cells += [_ratio(ratio, "published") if kind == "published" and ratio else "" for kind in kinds]
    peak = "" if theirs.peak_bytes is None else f"{mib(theirs.peak_bytes)} (published)"
    return [*cells, "", mib(mine.peak_bytes), peak, "" if mine.error is None else f"{mine.error:.2f}"]


def _rounds(samples: Sequence[float]) -> str:
    return f"{len(samples)}, few rounds" if len(samples) < FEWEST_ROUNDS else str(len(samples))


def _ratio(ratio: Sequence[float], rival: str) -> str:
    """Median, 10th and 90th percentile, and whose."""
    return f"{ratio[0]:.2f}, {ratio[1]:.2f}-{ratio[2]:.2f} ({rival})"


def _counted(sizes: Sequence[str]) -> str:
    return sizes[0] if len(sizes) == 1 else f"{len(sizes)} sizes"
