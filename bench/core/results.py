"""Result records of the benchmarks, and their JSON files.

A file holds a `Run`: the machine, and cases in the order in which they ran. A case is an operator at one size, dtype
and device. It has a row per variant, and a row has a timing per pass: "forward", "backward", and "both", which is a
whole step. Times are in seconds, sizes in bytes, and rates are per second.

Fields may be added without a new `SCHEMA`: `load` ignores fields that it does not know. Other changes need a new one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

SCHEMA = 2
STATUSES = ("measured", "refused", "absent", "skipped")


class Role(StrEnum):
    """What a variant is: our kernels, our plain-PyTorch reference, or a kind of baseline."""

    OURS = "ours"
    REFERENCE = "reference"
    PAPER = "paper"
    EAGER = "eager"
    COMPILED = "compiled"
    LIBRARY = "library"


@dataclass(frozen=True)
class Timing:
    """One pass of one variant.

    Attributes:
        median, p10, p90: seconds, over the rounds.
        samples: the seconds of each round. In round i all variants of a case ran one after the other.
        against: for each baseline the speed-up over it: median, p10 and p90 of the ratios of paired rounds.
        bound: the speed-of-light bound: the time of the least possible work at the case's rates.
        of_bound: bound / median.
        flop: FLOP of the matrix products that were executed; None if they were not counted.
    """

    median: float
    p10: float
    p90: float
    samples: list[float]
    against: dict[str, tuple[float, float, float]]
    bound: float
    of_bound: float
    flop: float | None


@dataclass(frozen=True)
class Row:
    """One variant of a case.

    Attributes:
        role: what the variant is.
        status: "measured"; "refused": its results are wrong; "absent": it cannot run here; "skipped": out of memory.
        reason: why the row is not measured.
        problem: the easier problem that the variant solves; None if it solves the problem of the case.
        dtype: of the variant's inputs, if it is not the dtype of the case.
        cuda_graph: whether the variant replays a CUDA graph.
        compiled: whether torch.compile made the variant.
        backend: the backend of xsmoe_kernels that served it; None for baselines.
        error: its largest error, in units of the reference's error; None if nothing was computed.
        worst: the result that has this error.
        saved_bytes: saved activations: bytes kept for backward, without inputs and weights.
        compile_seconds: duration of the first run, if torch.compile made it. Inductor's disk cache may have been warm.
        peak_bytes: growth of torch's allocator during a step; None if it was not measured, as for CUDA graphs.
        returned_bytes: results and gradients of that step. Some of them may be part of `peak_bytes`.
        resident_bytes: growth of the process's resident memory at the peak of a step; None on a GPU.
        expected_saved_bytes: `saved_bytes` by the variant's design; None if the design states none.
        remark: a note for the reader of this row.
        passes: timings. Empty if only memory was measured; only "both" if the variant runs a whole step at once.
    """

    variant: str
    role: Role
    status: str
    reason: str | None = None
    problem: str | None = None
    dtype: str | None = None
    cuda_graph: bool = False
    compiled: bool = False
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

    @property
    def ours(self) -> bool:
        """Return whether the row measures our kernels."""
        return self.role == Role.OURS

    @property
    def step_pass(self) -> str:
        """Return the pass that is a whole step of this row."""
        return "both" if "both" in self.passes else "forward"

    @property
    def step(self) -> Timing | None:
        """Return the timing of a whole step, or None if the row has none."""
        return self.passes.get(self.step_pass)

    @property
    def label(self) -> str:
        """Return the variant's name, with an asterisk if it solves an easier problem."""
        return self.variant if self.problem is None else f"{self.variant}*"


@dataclass(frozen=True)
class Case:
    """An operator at one size.

    Attributes:
        flop_rate: FLOP per second of the best matrix product, measured between the variants' rounds; 0 without one.
        byte_rate: bytes per second of a copy, measured in the same way.
        flop, bytes: the least work of each pass, which the speed-of-light bound counts.
        rounds: the number of timed rounds.
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

    @property
    def label(self) -> str:
        """Return operator, dtype and sizes."""
        return f"{self.operator} {self.dtype} {sizes_text(self.sizes)}"


@dataclass(frozen=True)
class Run:
    """Everything that one command measured."""

    command: list[str]
    machine: dict[str, Any]
    cases: list[Case]
    seconds: float
    schema: int = SCHEMA

    def refused(self) -> list[tuple[Case, Row]]:
        """Return the rows whose results are wrong."""
        return [(case, row) for case in self.cases for row in case.rows if row.status == "refused"]


def sizes_text(sizes: Mapping[str, int]) -> str:
    """Return sizes in the format of --sizes."""
    return " ".join(f"{letter}={size}" for letter, size in sizes.items())


def save(run: Run, path: Path) -> None:
    """Write a run. The replacement of an existing file is atomic."""
    write_json(asdict(run), path)


def load(path: Path) -> Run:
    """Read a file that `save` wrote.

    Raises:
        ValueError: the file has other content, or another schema.
    """
    try:
        data = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict) or not data.get("cases"):
        raise ValueError(f"{path} has no cases; `python -m bench kernels`, `step` and `memory` write them with --json")
    if data.get("schema") not in (1, SCHEMA):
        raise ValueError(f"{path} has schema {data.get('schema')}; this version reads 1 and {SCHEMA}; measure again")
    try:
        if data["schema"] == 1:
            _convert_schema_1(data)
        cases = [_case(case) for case in data.pop("cases")]
        return record_from(Run, data | {"cases": cases})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}; measure again") from error


def load_folder(folder: Path, pattern: str = "*-cpu-*.json") -> dict[str, Run]:
    """Return the runs of a folder, by file name."""
    return {path.name: load(path) for path in sorted(folder.glob(pattern))}


def as_saved(case: Case) -> Case:
    """Return a case with the digits that `save` keeps, so that its printed table equals that of the file."""
    return _case(rounded(asdict(case)))


def write_json(data: Mapping[str, Any], path: Path) -> None:
    """Write JSON. The replacement of an existing file is atomic."""
    aside = path.with_name(path.name + ".part")
    aside.write_text(_dumps(data) + "\n")
    aside.replace(path)


def rounded(data: Mapping[str, Any]) -> Any:
    """Return `data` with the digits that `write_json` keeps."""
    return json.loads(_dumps(data))


def record_from(kind: type[T], data: Mapping[str, Any]) -> T:
    """Return a dataclass from a mapping; fields that it does not know are ignored."""
    known = {one.name for one in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in data.items() if name in known})


def _case(data: Mapping[str, Any]) -> Case:
    return record_from(Case, {**data, "rows": [_row(row) for row in data["rows"]]})


def _row(data: Mapping[str, Any]) -> Row:
    passes = {name: _timing(timing) for name, timing in data["passes"].items()}
    return record_from(Row, {**data, "role": Role(data["role"]), "passes": passes})


def _timing(data: Mapping[str, Any]) -> Timing:
    against: dict[str, Sequence[float]] = data["against"]
    return record_from(Timing, {**data, "against": {name: tuple(ratio) for name, ratio in against.items()}})


_SCHEMA_1_ROLES = {
    "reference": Role.REFERENCE,
    "plain": Role.REFERENCE,
    **dict.fromkeys(("published", "published-autocast", "naive", "naive-autocast", "naive-narrow"), Role.PAPER),
    **dict.fromkeys(("cut-cross-entropy", "liger", "scattermoe", "megablocks", "xformers", "flash"), Role.LIBRARY),
}


def _convert_schema_1(data: dict[str, Any]) -> None:
    """Add the typed fields to a file of schema 1, in which the variant's name and the remark stand for them."""
    data["schema"] = SCHEMA
    for row in (row for case in data["cases"] for row in case["rows"]):
        name: str = row["variant"]
        by_prefix = {"ours": Role.OURS, "compiled": Role.COMPILED}.get(name.partition("-")[0], Role.EAGER)
        row["role"] = _SCHEMA_1_ROLES.get(name, by_prefix)
        row["cuda_graph"], row["compiled"] = name.endswith("-graph"), name.startswith("compiled")
        remark: str = row.get("remark") or ""
        if remark.startswith("solves another problem: "):
            problem, _, rest = remark.removeprefix("solves another problem: ").partition("; ")
            row["problem"], row["remark"] = problem, rest or None
        for timing in row["passes"].values():
            timing["bound"], timing["of_bound"] = timing.pop("floor"), timing.pop("share")


def _dumps(value: Any, indent: int = 0) -> str:
    """Return JSON with a list of numbers on one line, and numbers with six significant digits."""
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
