"""Result records of `python -m bench stream`, and their JSON files.

A file holds a `StreamRun` of kind "stream": the machine, the settings, and a `WindowRecord` for each trained window,
with a `RunRecord` for each formulation. Times are in seconds, sizes in bytes; HR and NDCG are between 0 and 1. Fields
may be added without a new `SCHEMA`: `load` ignores fields that it does not know. Other changes need a new one.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.core import results
from bench.core.results import Case, Role, Row, Run, Timing, record_from, rounded, write_json
from bench.core.timing import Quantiles, quantiles, ratios

KIND, SCHEMA = "stream", 1


@dataclass(frozen=True)
class RunRecord:
    """One formulation in one window.

    Attributes:
        refused: the error of a wrong step; None if the step is right. A refused run has no times.
        error: the largest error of the compared step, in units of the reference's error; None for the paper's run.
        worst: the result that has this error.
        rows: rows of each modality that a step encodes.
        steps: for each training step the seconds of its parts (`StreamRun.parts`), in time order.
        epochs: the seconds of each epoch, without validation.
        losses: the mean loss of each epoch.
        grow, test: seconds of the expansion before the window, and of the ranking for the window's test.
        peak_bytes: growth of the allocator in forward and backward of a step.
        weight_bytes: parameters, frozen experts, and tensors that are derived from them and kept.
        optimizer_bytes: state of the optimizer.
        test_scores: HR, NDCG and MRR on the next window with standard errors over users ("se"); None for the last one.
        difference: the same of this run minus the paper's, user by user.
    """

    refused: str | None = None
    error: float | None = None
    worst: str | None = None
    rows: int = 0
    steps: list[list[float]] = field(default_factory=list)
    epochs: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    grow: float = 0.0
    test: float = 0.0
    peak_bytes: int | None = None
    weight_bytes: int = 0
    optimizer_bytes: int = 0
    test_scores: dict[str, Any] | None = None
    difference: dict[str, Any] | None = None

    @property
    def step_seconds(self) -> list[float]:
        """Return each step's time."""
        return [sum(parts) for parts in self.steps]

    @property
    def seconds(self) -> float:
        """Return the time of the window: expansion, epochs, test."""
        return self.grow + sum(self.epochs) + self.test

    @property
    def held_bytes(self) -> int:
        """Return the bytes of weights and optimizer, which exist between steps."""
        return self.weight_bytes + self.optimizer_bytes

    @property
    def has_parts(self) -> bool:
        """Return whether the parts of its steps were timed. Those of a CUDA graph cannot be."""
        return len(self.steps[0]) > 1


@dataclass(frozen=True)
class WindowRecord:
    """One window.

    Attributes:
        experts: of each level while the window was trained.
        users, batches: training sequences, and steps per epoch.
        candidates: items that were ranked in the test.
        popularity: the scores of the most frequent items so far, in the same test.
        runs: by name; "published" is first.
    """

    window: int
    experts: int
    users: int
    batches: int
    candidates: int
    popularity: dict[str, Any] | None
    runs: dict[str, RunRecord]

    @property
    def paper(self) -> RunRecord:
        """Return the record of the paper's formulation."""
        return self.runs["published"]

    def timed(self, name: str) -> RunRecord | None:
        """Return a run's record, or None if it has no times."""
        found = self.runs.get(name)
        return found if found is not None and found.refused is None and found.steps else None

    def ratio(self, name: str) -> Quantiles | None:
        """Return the speed-up of a run's steps over the paper's: median, p10 and p90 over equal batches."""
        mine, theirs = self.timed(name), self.timed("published")
        if mine is None or theirs is None:
            return None
        return ratios(mine.step_seconds, theirs.step_seconds)


@dataclass(frozen=True)
class StreamRun:
    """Everything that one command measured. If it was stopped, `windows` is shorter than the stream."""

    command: list[str]
    machine: dict[str, Any]
    settings: dict[str, Any]
    parts: list[str]
    names: list[str]
    windows: list[WindowRecord]
    seconds: float
    kind: str = KIND
    schema: int = SCHEMA

    def refused(self) -> list[tuple[int, str, str]]:
        """Return (window, run, reason) of every wrong step."""
        return [(w.window, name, r.refused) for w in self.windows for name, r in w.runs.items() if r.refused]

    def as_run(self) -> Run:
        """Return the steps of each window as a case, for tables over several kinds of results."""
        return Run(self.command, self.machine, [self._case(window) for window in self.windows], self.seconds)

    def _case(self, window: WindowRecord) -> Case:
        rows = []
        for name, record in window.runs.items():
            role = Role.PAPER if record is window.paper else Role.OURS
            if record.refused is not None:
                rows.append(Row(name, role, "refused", record.refused))
            elif record.steps:
                seconds = record.step_seconds
                passes = {"both": Timing(*quantiles(seconds), seconds, {}, bound=0.0, of_bound=0.0, flop=None)}
                measured: dict[str, Any] = {
                    "error": record.error,
                    "worst": record.worst,
                    "peak_bytes": record.peak_bytes,
                }
                rows.append(Row(name, role, "measured", passes=passes, **measured))
        s = self.settings
        operator, sizes = f"stream_step_{s['pooling']}", {"B": s["batch"], "E": window.experts}
        title, rounds = f"window {window.window}", max((len(row.step.samples) for row in rows if row.step), default=0)
        return Case(operator, title, sizes, s["dtype"], s["device"], 0.0, 0.0, {}, {}, rounds, rows)


def save(run: StreamRun, path: Path) -> None:
    """Write a run. The replacement of an existing file is atomic."""
    write_json(asdict(run), path)


def load(path: Path) -> StreamRun:
    """Read a file that `save` wrote.

    Raises:
        ValueError: the file has other content, or another schema.
    """
    data = json.loads(path.read_text())
    if not isinstance(data, dict) or data.get("kind") != KIND:
        raise ValueError(f"{path} was not written by `python -m bench stream --json`")
    if data.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {data.get('schema')}; this version reads {SCHEMA}; measure again")
    return _run(data)


def load_any(path: Path) -> Run:
    """Read a file of `python -m bench kernels`, `step`, `memory` or `stream`."""
    return load(path).as_run() if f'"kind": "{KIND}"' in path.read_text() else results.load(path)


def as_saved(run: StreamRun) -> StreamRun:
    """Return a run with the digits that `save` keeps, so that its printed tables equal those of the file."""
    return _run(rounded(asdict(run)))


def _run(data: dict[str, Any]) -> StreamRun:
    windows = [
        record_from(
            WindowRecord, one | {"runs": {name: record_from(RunRecord, run) for name, run in one["runs"].items()}}
        )
        for one in data["windows"]
    ]
    return record_from(StreamRun, data | {"windows": windows})
