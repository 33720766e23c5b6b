"""What a run found: one schema in JSON, and tables in Markdown.

A file holds a `Run`: the machine, and cases in the order they ran. A case is an operator at one size, dtype and device,
and has a row per variant. A row has a timing per pass: "forward", "backward", and "both", which is a whole step. Times
are seconds, sizes bytes, rates a second. Field names and their meaning change only together with `SCHEMA`. Fields may
be added without it: `load` passes over those that it does not know.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

SCHEMA = 1
STATUSES = ("measured", "refused", "absent", "skipped")


@dataclass(frozen=True)
class Timing:
    """One pass of one variant.

    Attributes:
        median, p10, p90: seconds, over the rounds.
        samples: the seconds of each round; round i of all variants of a case ran one after the other.
        against: for each baseline how many times faster this is than it: median, p10 and p90 of the ratios of rounds.
        floor: the time that the least work takes at the case's rates.
        share: floor / median.
        flop: what the matrix products that were really run add up to; None where nobody counts.
    """

    median: float
    p10: float
    p90: float
    samples: list[float]
    against: dict[str, tuple[float, float, float]]
    floor: float
    share: float
    flop: float | None


@dataclass(frozen=True)
class Row:
    """One variant of a case.

    Attributes:
        status: "measured"; "refused": its results are wrong; "absent": it cannot run here; "skipped": memory is short.
        reason: why it is not measured.
        backend: which backend of xsmoe_kernels served it; None for rivals.
        error: its largest error, in units of the reference's; None where nothing was computed.
        worst: the result in which that was found.
        saved_bytes: kept for backward beyond inputs and weights.
        compile_seconds: its first run, where torch.compile made it. Inductor's cache on disk may have been warm.
        peak_bytes: by how much torch's allocator grew during a step; None where nobody counts, as for graphs.
        returned_bytes: what that step returned, results and gradients, of which some may be among `peak_bytes`.
        resident_bytes: by how much the resident memory of a process grew at the peak of a step; None on a GPU.
        expected_saved_bytes: what `saved_bytes` should be by the variant's design; None where none is stated.
        remark: what to know of this row, if anything.
        passes: timings; none where only memory was measured; of "both" only, where a variant runs a whole step at once.
    """

    variant: str
    status: str
    reason: str | None = None
    backend: str | None = None
    error: float | None = None
    worst: str | None = None
    saved_bytes: int | None = None
    compile_seconds: float | None = None
    peak_bytes: int | None = None
    returned_bytes: int | None = None
    resident_bytes: int | None = None
    expected_saved_bytes: int | None = None
    remark: str | None = None
    passes: dict[str, Timing] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """An operator at one size.

    Attributes:
        flop_rate: the matrix rate that was measured between the variants' runs; 0 where the floor has no product.
        byte_rate: the bandwidth, likewise.
        flop, bytes: what the floor counts, for each pass.
        rounds: how often each variant was timed.
    """

    operator: str
    title: str
    sizes: dict[str, int]
    dtype: str
    device: str
    flop_rate: float
    byte_rate: float
    flop: dict[str, float]
    bytes: dict[str, float]
    rounds: int
    rows: list[Row]


@dataclass(frozen=True)
class Run:
    """All that one command measured."""

    command: list[str]
    machine: dict[str, Any]
    cases: list[Case]
    seconds: float
    schema: int = SCHEMA

    def refused(self) -> list[tuple[Case, Row]]:
        """Rows whose results are wrong."""
        return [(case, row) for case in self.cases for row in case.rows if row.status == "refused"]


def save(run: Run, path: Path) -> None:
    """Writes a run; what was there before is replaced in one step."""
    write(asdict(run), path)


def rounded(data: Mapping[str, Any]) -> Any:
    """The same with the digits that `write` keeps."""
    return json.loads(_dumps(data))


def write(data: Mapping[str, Any], path: Path) -> None:
    """Writes JSON; what was there before is replaced in one step."""
    aside = path.with_name(path.name + ".part")
    aside.write_text(_dumps(data) + "\n")
    aside.replace(path)


def load(path: Path) -> Run:
    """Reads what `save` wrote.

    Raises:
        ValueError: the file holds something else, or has another schema.
    """
    try:
        data = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(data, dict) or not data.get("cases"):
        raise ValueError(f"{path} has no cases: `python -m bench kernels`, `step` and `memory` write those with --json")
    if data.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {data.get('schema')}, and this version reads {SCHEMA}; measure again")
    try:
        cases = [_case(case) for case in data.pop("cases")]
        return record_of(Run, data | {"cases": cases})
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}; measure again") from error


def as_saved(case: Case) -> Case:
    """A case with the digits that `save` keeps, so that its table is that of the file."""
    return _case(rounded(asdict(case)))


def table(case: Case) -> str:
    """A case in Markdown: what it is, its floor, a row per variant, and why rows are empty."""
    baselines = list(dict.fromkeys(name for row in case.rows for t in row.passes.values() for name in t.against))
    step = "both" if "backward" in case.flop else "forward"
    passes = [name for name in ("forward", "backward", "both") if name == step or step == "both"]
    head = ["variant", *(f"{name} ms" for name in passes), *(f"x {name}" for name in baselines)]
    peaks = any(row.peak_bytes is not None for row in case.rows)
    head += ["of floor", "GFLOP/s", "saved MiB", *(["peak MiB", "returned MiB"] if peaks else []), "error"]
    body, notes = [], []
    for row in case.rows:
        name = f"{row.variant} ({row.backend})" if row.backend else row.variant
        if row.status != "measured":
            body.append([name, row.status, *[""] * (len(head) - 2)])
            notes.append(f"- {row.variant} {row.status}: {row.reason}")
            continue
        last = row.passes[step]
        cells = [name, *(_span(row.passes[name]) if name in row.passes else "" for name in passes)]
        cells += [_ratio(last.against.get(name)) for name in baselines]
        cells += [
            percent(last.share),
            "" if last.flop is None else f"{last.flop / last.median / 1e9:.0f}",
        ]
        cells += [mib(row.saved_bytes), *([mib(row.peak_bytes), mib(row.returned_bytes)] if peaks else [])]
        cells += ["" if row.error is None else f"{row.error:.2f}"]
        body.append(cells)
        if row.compile_seconds is not None:
            notes.append(f"- {row.variant}: {row.compile_seconds:.0f} s to compile, not counted")
        if row.remark is not None:
            notes.append(f"- {row.variant}: {row.remark}")
    sizes = ", ".join(f"{letter} {size}" for letter, size in case.sizes.items())
    floor = next((t.floor for row in case.rows for name, t in row.passes.items() if name == step), None)
    lines = [
        f"### {case.operator} {case.dtype}, {sizes}",
        "",
        f"{case.title[:1].upper()}{case.title[1:]}. {_floor(case, floor)}",
        "",
    ]
    return "\n".join([*lines, *aligned(head, body), *([""] if notes else []), *notes])


def _floor(case: Case, floor: float | None) -> str:
    rates = f"{case.byte_rate / 1e9:.1f} GB/s"
    if case.flop_rate:
        rates = f"{case.flop_rate / 1e9:.0f} GFLOP/s and {rates}"
    found = "" if floor is None else f"Floor {ms(floor)} ms at {rates}; "
    return f"{found}{case.rounds} rounds."


def _span(timing: Timing) -> str:
    return f"{ms(timing.median)} ({ms(timing.p10)}-{ms(timing.p90)})"


def lettered(sizes: Mapping[str, int]) -> str:
    """Sizes as they are given to --sizes."""
    return " ".join(f"{letter}={size}" for letter, size in sizes.items())


def ms(seconds: float) -> str:
    """Milliseconds, with three figures."""
    found = seconds * 1e3
    digits = 0 if found >= 100 else 1 if found >= 10 else 2 if found >= 1 else 3
    return f"{found:.{digits}f}"


def mib(size: int | None) -> str:
    """MiB; nothing where nobody counted."""
    return "" if size is None else f"{size / 2**20:.1f}"


def percent(share: float) -> str:
    """A share, small ones with a digit more."""
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"


def _ratio(ratio: Sequence[float] | None) -> str:
    return "" if ratio is None else f"{ratio[0]:.2f}"


def aligned(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    widths = [max(len(row[place]) for row in [head, *body]) for place in range(len(head))]

    def joined(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"

    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return [joined(head), joined(rule), *(joined(row) for row in body)]


def _case(data: Mapping[str, Any]) -> Case:
    rows = [
        record_of(Row, row | {"passes": {name: _timing(t) for name, t in row["passes"].items()}})
        for row in data["rows"]
    ]
    return record_of(Case, {**data, "rows": rows})


def _timing(data: Mapping[str, Any]) -> Timing:
    against = {name: (ratio[0], ratio[1], ratio[2]) for name, ratio in data["against"].items()}
    return record_of(Timing, {**data, "against": against})


def record_of(kind: type[T], data: Mapping[str, Any]) -> T:
    """A record of a file, of the fields that it knows."""
    known = {one.name for one in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in data.items() if name in known})


def _dumps(value: Any, indent: int = 0) -> str:
    """JSON in which lists of numbers take one line, and numbers the six digits that a clock is good for."""
    pad = "  " * (indent + 1)
    if isinstance(value, float):
        return json.dumps(float(f"{value:.6g}"))
    if isinstance(value, Mapping) and value:
        rows = [f"{pad}{json.dumps(str(key))}: {_dumps(item, indent + 1)}" for key, item in value.items()]
        return "{\n" + ",\n".join(rows) + "\n" + "  " * indent + "}"
    if isinstance(value, list | tuple) and any(isinstance(item, Mapping | list | tuple) for item in value):
        rows = [pad + _dumps(item, indent + 1) for item in value]
        return "[\n" + ",\n".join(rows) + "\n" + "  " * indent + "]"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_dumps(item) for item in value) + "]"
    return json.dumps(value)
