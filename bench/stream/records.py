"""What a stream's run found, as JSON holds it.

A file is one `StreamRun`, of kind "stream": the machine, the settings, and a `WindowRecord` for each window that was
trained, which holds a `RunRecord` for each formulation. Times are seconds, sizes bytes, HR and NDCG shares of 1. Names
and their meaning change only together with `SCHEMA`; fields may be added without it, and `load` passes over those that
it does not know.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench import results
from bench.measure import Quantiles, ratios

KIND, SCHEMA = "stream", 1


@dataclass(frozen=True)
class RunRecord:
    """One formulation in one window.

    Attributes:
        refused: why it has no times: what was wrong with a step. None if nothing was.
        error: the largest error of the step that was judged, in units of the reference's; None for the published one.
        worst: the result in which that was found.
        rows: what a step encodes, of each modality.
        steps: for each training step the seconds of its parts (`StreamRun.parts`), in the order they ran.
        epochs: the seconds of each epoch, all but validation.
        losses: the mean loss of each epoch.
        grow, test: seconds of expansion ahead of the window, and of ranking for the window's test.
        peak_bytes: by how much the allocator grew in a step's forward and backward.
        weight_bytes: parameters, frozen experts, and what is derived from these and kept.
        optimizer_bytes: what the optimizer keeps.
        test_scores: HR, NDCG and MRR on the next window with standard errors over users ("se"); None for the last.
        difference: the same of this run minus the published one, user by user.
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
        """Each step's whole time."""
        return [sum(parts) for parts in self.steps]

    @property
    def seconds(self) -> float:
        """The whole window: expansion, epochs, test."""
        return self.grow + sum(self.epochs) + self.test


@dataclass(frozen=True)
class WindowRecord:
    """One window.

    Attributes:
        experts: of each level while the window was trained.
        users, batches: sequences trained on, and steps an epoch.
        candidates: items ranked in the test.
        popularity: the scores of the items most taken so far, in the same test.
        runs: by name; "published" first.
    """

    window: int
    experts: int
    users: int
    batches: int
    candidates: int
    popularity: dict[str, Any] | None
    runs: dict[str, RunRecord]

    def timed(self, name: str) -> RunRecord | None:
        """A run's record, if it has times."""
        found = self.runs.get(name)
        return found if found is not None and found.refused is None and found.steps else None

    def ratio(self, name: str) -> Quantiles | None:
        """How many times faster a run's steps are than the published one's: median, p10 and p90, batch by batch."""
        mine, theirs = self.timed(name), self.timed("published")
        if mine is None or theirs is None:
            return None
        return ratios(mine.step_seconds, theirs.step_seconds)


@dataclass(frozen=True)
class StreamRun:
    """All that one command measured; `windows` is shorter than the stream where it was stopped."""

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
        """(window, run, reason) of every step that was wrong."""
        return [(w.window, name, r.refused) for w in self.windows for name, r in w.runs.items() if r.refused]


def save(run: StreamRun, path: Path) -> None:
    """Writes a run; what was there before is replaced in one step."""
    results.write(asdict(run), path)


def load(path: Path) -> StreamRun:
    """Reads what `save` wrote.

    Raises:
        ValueError: the file holds something else, or has another schema.
    """
    data = json.loads(path.read_text())
    if not isinstance(data, dict) or data.get("kind") != KIND:
        raise ValueError(f"{path} was not written by `python -m bench stream --json`")
    if data.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {data.get('schema')}, and this version reads {SCHEMA}; measure again")
    return _run(data)


def as_saved(run: StreamRun) -> StreamRun:
    """A run with the digits that `save` keeps, so that its tables are those of the file."""
    return _run(results.rounded(asdict(run)))


def _run(data: dict[str, Any]) -> StreamRun:
    windows = [
        results.record_of(
            WindowRecord, one | {"runs": {name: results.record_of(RunRecord, run) for name, run in one["runs"].items()}}
        )
        for one in data["windows"]
    ]
    return results.record_of(StreamRun, data | {"windows": windows})
