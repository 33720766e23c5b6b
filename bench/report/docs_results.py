"""Generated tables of the docs, rendered from the committed results. Links are relative to docs/."""

import json
import re
from functools import cache
from typing import Any, NamedTuple

from bench.core.machine import ROOT
from bench.core.results import Case, Role, Row, Run, load, load_folder
from bench.core.timing import Quantiles
from bench.report import slowdowns
from bench.report.comparison import FEW_ROUNDS, fastest, speedup
from bench.report.tables import markdown_table, mib, ms, percent

RESULTS = ROOT / "bench" / "results"


class Headline(NamedTuple):
    """A case of the table and the plot in README.md.

    Attributes:
        label: what is measured, in a few words.
        size: the size, in a few words.
        files: result files without suffix. Our time is from the first one.
        operator, sizes: select the case.
    """

    label: str
    size: str
    files: tuple[str, ...]
    operator: str
    sizes: dict[str, int]


RANKING = ("ranking-cpu-float32", "ranking-published-cpu-float32")
HEADLINES = (
    Headline("training step, mean pooling", "256 users, 8 experts", ("step-cpu-float32",), "training_step_mean", {}),
    Headline("training step, [CLS] pooling", "256 users, 8 experts", ("step-cpu-float32",), "training_step_cls", {}),
    Headline("side_moe", "2,816 rows, 1 expert", ("side_moe-cpu-float32",), "side_moe", {"E": 1}),
    Headline("side_moe", "2,816 rows, 10 experts", ("side_moe-cpu-float32",), "side_moe", {"E": 10}),
    Headline("in_batch_softmax_loss", "2,560 x 2,640", ("loss-cpu-float32",), "in_batch_softmax_loss", {}),
    Headline("packed_attention", "256 x 10", ("attention-cpu-float32",), "packed_attention", {"L": 10}),
    Headline("route_topk", "2,816 x 10, k = 2", ("routing-cpu-float32",), "route_topk", {"N": 2816, "E": 10}),
    Headline("grouped_mm", "5,632 x 768 x 64", ("routing-cpu-float32",), "grouped_mm", {"M": 5632, "E": 10, "K": 768}),
    Headline("rank_of_target", "2,000 x 100,000", RANKING, "rank_of_target", {}),
    Headline("topk_items", "2,000 x 100,000, k = 10", RANKING[:1], "topk_items", {"k": 10}),
)
ROLES = {Role.PAPER: "paper", Role.EAGER: "PyTorch", Role.COMPILED: "torch.compile"}
"""The baselines of the headlines, with their names in README.md."""


class Measured(NamedTuple):
    """A headline with its results: our row, and the fastest baseline of each role."""

    headline: Headline
    ours: Row
    baselines: dict[Role, tuple[Row, Quantiles]]


@cache
def run(name: str) -> Run:
    """Return the committed run of a file name without suffix."""
    return load(RESULTS / f"{name}.json")


def headlines() -> list[Measured]:
    """Return the headlines with their results."""
    found = []
    for one in HEADLINES:
        cases = [_only_case(run(name), one.operator, one.sizes) for name in one.files]
        mine = [_row(case, "ours") for case in cases]
        best = {
            role: (other.row, other.speedup)
            for case, row in reversed(list(zip(cases, mine, strict=True)))
            for role in ROLES
            if (other := fastest(case, row, role))
        }
        found.append(Measured(one, mine[0], best))
    return found


def speedup_table(device: str) -> str:
    """Return the headlines of README.md: our time and the speed-up over the fastest baseline of each role."""
    if device != "cpu":
        raise ValueError(f"speedups are of the device cpu, not {device!r}")
    head = ["", "size", "ours, ms", *(f"x {name}" for name in ROLES.values()), "of bound"]
    body = []
    for headline, ours, best in headlines():
        assert ours.step is not None
        cells = [_speedup(best[role][1], best[role][0], ours) if role in best else "" for role in ROLES]
        body.append([headline.label, headline.size, ms(ours.step.median), *cells, percent(ours.step.of_bound)])
    machine = run(HEADLINES[0].files[0]).machine
    return "\n".join(
        [*markdown_table(head, body), "", f"{machine['cpu']['model']}, {machine['threads']} threads, float32."]
    )


def kernel_table(arguments: str) -> str:
    """Return the rows of a result file.

    Args:
        arguments: the file name without suffix, then filters: `operator=NAME`, `variants=A,B`, `against=A,B` (the
            baselines to compare with), or sizes such as `N=2816` and `E=1,10`.
    """
    name, *filters = arguments.split()
    options = dict(one.split("=", 1) for one in filters)
    operator = options.pop("operator", None)
    variants, against = (options.pop(key).split(",") if key in options else None for key in ("variants", "against"))
    sizes = {letter: [int(size) for size in values.split(",")] for letter, values in options.items()}
    found = run(name)
    cases = [
        case
        for case in found.cases
        if operator in (None, case.operator)
        and all(case.sizes.get(letter) in values for letter, values in sizes.items())
    ]
    if not cases:
        raise ValueError(f"{name}.json has no case with {arguments}")
    shown = {id(case): [row for row in case.rows if variants is None or row.variant in variants] for case in cases}
    rows = [row for case in cases for row in shown[id(case)]]
    if against is None:
        against = list(
            dict.fromkeys(other for row in rows for timing in row.passes.values() for other in timing.against)
        )
    letters = [letter for letter in cases[0].sizes if len({case.sizes.get(letter) for case in cases}) > 1]
    operators = len({case.operator for case in cases}) > 1
    extra = [
        (title, value)
        for title, value in (
            ("saved MiB", lambda row: mib(row.saved_bytes)),
            ("peak MiB", lambda row: mib(row.peak_bytes)),
            ("returned MiB", lambda row: mib(row.returned_bytes)),
        )
        if any(value(row) for row in rows)
    ]
    head = [*(["operator"] if operators else []), *letters, "variant", "rounds", "ms", *(f"x {one}" for one in against)]
    head += ["of bound", *(title for title, _ in extra), "error"]
    body, notes = [], []
    for case in cases:
        for row in shown[id(case)]:
            place = [*([case.operator] if operators else []), *(str(case.sizes.get(letter, "")) for letter in letters)]
            if row.step is None:
                where = " ".join([case.operator, *(f"{letter}={case.sizes[letter]}" for letter in letters)])
                notes.append(f"- {row.variant} {row.status} ({where}): {row.reason}")
                continue
            cells = [_against(case, row, other) for other in against]
            cells = [row.label, str(len(row.step.samples)), ms(row.step.median), *cells, percent(row.step.of_bound)]
            cells += [value(row) for _, value in extra]
            body.append([*place, *cells, "" if row.error is None else f"{row.error:.2f}"])
    fixed = ", ".join(f"{letter} = {size}" for letter, size in cases[0].sizes.items() if letter not in letters)
    source = _source(f"{name}.json", found.machine)
    dtypes = ", ".join(dict.fromkeys(case.dtype for case in cases))
    return "\n".join(
        [f"{source} {dtypes}; {fixed}.", "", *markdown_table(head, body), *([""] if notes else []), *notes]
    )


def memory_table(name: str) -> str:
    """Return the slopes of the memory sweeps of `bench/results/memory-NAME.json`."""
    from bench.e2e.memory.curves import curves
    from bench.e2e.memory.report import slope_table

    found = run(f"memory-{name}")
    return f"{_source(f'memory-{name}.json', found.machine)}\n\n{slope_table(curves(found.cases))}"


def stream_tables(name: str) -> str:
    """Return the tables of the stream in `bench/results/NAME.json`."""
    from bench.e2e.stream import records, report

    return f"Source: {_link(f'{name}.json')}.\n\n{report.report(records.load(RESULTS / f'{name}.json'))}"


def demo_table(name: str) -> str:
    """Return quality and cost of the demonstration from `bench/results/NAME.json`."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    quality = next(one for one in found["quality"] if one["metric"] == "HR@10")
    baseline, error = quality["baselines"][quality["best"]]
    cost, batch = found["cost"], found["settings"]["batch_size"]
    last = f"HR@10, last items, {quality['users']} users of all tests"
    body = [
        [f"{last}: model", f"{100 * quality['model']:.1f} ± {100 * quality['model_se']:.1f} %"],
        [f"{last}: best popularity baseline (`{quality['best']}`)", f"{100 * baseline:.1f} ± {100 * error:.1f} %"],
        [
            f"HR@10, new items, masked: model minus the strongest of four baselines (`{found['baseline']}`)",
            f"{100 * found['difference']:.1f} ± {100 * found['standard_error']:.1f} %",
        ],
        [f"training step, {batch} users", f"{cost['step_ms']:.1f} ms"],
        ["training and tests", f"{cost['seconds']:.0f} s"],
        ["peak memory of the process", f"{cost['peak_rss_mib']:.0f} MiB"],
    ]
    cores, date = found["devices"]["cpu"]["cores"], found["date"]
    return "\n".join(
        [f"Source: {_link(f'{name}.json')}, {cores} CPU cores, {date}.", "", *markdown_table(["", ""], body)]
    )


def profile_table(name: str) -> str:
    """Return the kernels of a step with at least 1 % of its time, from the profile `bench/results/NAME.txt`."""
    text = (RESULTS / f"{name}.txt").read_text()
    rows = re.findall(r"^\| ([\w:]+::\w+) +\| +(\d+) \| +([\d.]+) \| +([\d.]+)% \|$", text, re.MULTILINE)
    body = [[f"`{kernel}`", calls, f"{float(us) / 1e3:.1f}", f"{share} %"] for kernel, calls, us, share in rows
            if float(share) >= 1]  # fmt: skip
    if not body:
        raise ValueError(f"{name}.txt has no kernel with at least 1 % of the time")
    title = next(line for line in text.splitlines()[1:] if line)
    return "\n".join(
        [f"Source: {_link(f'{name}.txt')}. {title}.", "", *markdown_table(["kernel", "calls", "ms", "share"], body)]
    )


def quality_tables(name: str) -> str:
    """Return the tables of `bench/results/quality-NAME.json`, after a line with its command, date and processor."""
    from bench.e2e.quality import report

    found = json.loads((RESULTS / f"quality-{name}.json").read_text())
    machine = found["machine"]
    return (
        f"{_link(f'quality-{name}.json')}: `{' '.join(['python -m bench', *found['command']])}`, "
        f"{machine['date']}, {machine['cpu']['model']}.\n\n{report.tables(found['variants'])}"
    )


def slowdown_list(name: str) -> str:
    """Return the slowdowns of the committed results whose names contain `-NAME-`."""
    return slowdowns.section(load_folder(RESULTS, f"*-{name}-*.json"))


def _only_case(found: Run, operator: str, sizes: dict[str, int]) -> Case:
    cases = [case for case in found.cases if case.operator == operator and sizes.items() <= case.sizes.items()]
    # A file may have several widths of a product; the first one is that of the headline.
    if not cases:
        raise ValueError(f"no committed result has {operator} with {sizes}")
    return cases[0]


def _row(case: Case, variant: str) -> Row:
    return next(row for row in case.rows if row.variant == variant)


def _against(case: Case, row: Row, name: str) -> str:
    other = next((one for one in case.rows if one.variant == name), None)
    if other is None or other.problem != row.problem:
        return ""
    if other is row:
        return "1.00"
    ratio = speedup(row, other, row.step_pass)
    return "" if ratio is None else f"{ratio.median:.2f} ({ratio.p10:.2f}-{ratio.p90:.2f})"


def _speedup(ratio: Quantiles, baseline: Row, ours: Row) -> str:
    """Return a speed-up with its spread, and with the number of rounds if these are few."""
    assert baseline.step is not None
    rounds = min(len(baseline.step.samples), len(ours.step.samples) if ours.step else 0)
    few = f"; {rounds} rounds" if rounds < FEW_ROUNDS else ""
    return f"{_short(ratio.median)} ({_short(ratio.p10)}-{_short(ratio.p90)}{few})"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _source(name: str, machine: dict[str, Any]) -> str:
    versions = machine.get("versions", {})
    return (
        f"Source: {_link(name)}, {machine['cpu']['model']}, {machine['threads']} threads, "
        f"torch {versions.get('torch', '?')}, {machine['date']}."
    )


def _link(name: str, text: str | None = None) -> str:
    return f"[{text or name}](../bench/results/{name})"
