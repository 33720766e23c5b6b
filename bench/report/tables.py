"""Tables in Markdown, and the format of numbers."""

from collections.abc import Sequence

from bench.core.results import Case, Timing


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table with aligned columns."""
    widths = [max(len(row[place]) for row in [head, *body]) for place in range(len(head))]

    def joined(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"

    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return [joined(head), joined(rule), *(joined(row) for row in body)]


def ms(seconds: float) -> str:
    """Return milliseconds with three digits."""
    found = seconds * 1e3
    digits = 0 if found >= 100 else 1 if found >= 10 else 2 if found >= 1 else 3
    return f"{found:.{digits}f}"


def mib(size: int | None) -> str:
    """Return MiB, or an empty string if the size is unknown."""
    return "" if size is None else f"{size / 2**20:.1f}"


def percent(share: float) -> str:
    """Return a share in percent; one below 10 % has one decimal."""
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"


def case_table(case: Case) -> str:
    """Return a case in Markdown: its sizes, its bound, a row per variant, and the reasons for empty rows."""
    baselines = list(dict.fromkeys(name for row in case.rows for t in row.passes.values() for name in t.against))
    step = "both" if "backward" in case.flop else "forward"
    passes = [name for name in ("forward", "backward", "both") if name == step or step == "both"]
    head = ["variant", *(f"{name} ms" for name in passes), *(f"x {name}" for name in baselines)]
    peaks = any(row.peak_bytes is not None for row in case.rows)
    head += ["of bound", "GFLOP/s", "saved MiB", *(["peak MiB", "returned MiB"] if peaks else []), "error"]
    body, notes = [], []
    for row in case.rows:
        name = f"{row.variant} ({row.backend})" if row.backend else row.variant
        if row.status != "measured":
            body.append([name, row.status, *[""] * (len(head) - 2)])
            notes.append(f"- {row.variant} {row.status}: {row.reason}")
            continue
        last = row.passes[step]
        cells = [name, *(_span(row.passes[name]) if name in row.passes else "" for name in passes)]
        cells += [f"{last.against[name][0]:.2f}" if name in last.against else "" for name in baselines]
        cells += [percent(last.of_bound), "" if last.flop is None else f"{last.flop / last.median / 1e9:.0f}"]
        cells += [mib(row.saved_bytes), *([mib(row.peak_bytes), mib(row.returned_bytes)] if peaks else [])]
        cells += ["" if row.error is None else f"{row.error:.2f}"]
        body.append(cells)
        if row.compile_seconds is not None:
            notes.append(f"- {row.variant}: {row.compile_seconds:.0f} s to compile, not counted")
        if row.problem is not None:
            notes.append(f"- {row.variant}: solves another problem: {row.problem}")
        if row.remark is not None:
            notes.append(f"- {row.variant}: {row.remark}")
    sizes = ", ".join(f"{letter} {size}" for letter, size in case.sizes.items())
    bound = next((t.bound for row in case.rows for name, t in row.passes.items() if name == step), None)
    lines = [
        f"### {case.operator} {case.dtype}, {sizes}",
        "",
        f"{case.title[:1].upper()}{case.title[1:]}. {_bound_line(case, bound)}",
        "",
    ]
    return "\n".join([*lines, *markdown_table(head, body), *([""] if notes else []), *notes])


def _bound_line(case: Case, bound: float | None) -> str:
    rates = f"{case.byte_rate / 1e9:.1f} GB/s"
    if case.flop_rate:
        rates = f"{case.flop_rate / 1e9:.0f} GFLOP/s and {rates}"
    found = "" if bound is None else f"Speed-of-light bound {ms(bound)} ms at {rates}; "
    return f"{found}{case.rounds} rounds."


def _span(timing: Timing) -> str:
    return f"{ms(timing.median)} ({ms(timing.p10)}-{ms(timing.p90)})"
