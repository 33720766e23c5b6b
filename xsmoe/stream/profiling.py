"""A profile of a few training steps: torch's trace, and what each named part of a step takes."""

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile, record_function, schedule

from xsmoe_kernels.runtime.profiler_ranges import opening_ranges

WAIT, WARM_UP, STEPS = 5, 3, 10
"""Steps that are left alone, that warm the profiler up, and that are profiled."""
TRACE = "trace.json.gz"


@dataclass
class Range:
    """What one named part took, over all profiled steps.

    Attributes:
        name: of the part.
        inside: the part that it is a part of; None for one of the step itself.
        calls: how often it ran.
        cpu_seconds: that it took on the host.
        cuda_seconds: that its work took on the GPU, from its first to its last moment in the stream; None without one.
    """

    name: str
    inside: str | None
    calls: int = 0
    cpu_seconds: float = 0.0
    cuda_seconds: float | None = None


@dataclass
class StepProfile:
    """What came of a profile.

    Attributes:
        trace: the file with torch's trace.
        problem: why it could not be written; None if it was.
        window, epoch: where the last profiled step was.
        steps: that were profiled.
        ranges: in the order in which a step goes through them, parts of parts right behind these.
    """

    trace: Path
    problem: str | None
    window: int
    epoch: int
    steps: int
    ranges: list[Range]


class StepProfiler:
    """Profiles some of the steps that a trainer takes while this is open; a listener of `StreamingTrainer`.

    What is trained does not change: the same numbers come out with a profiler and without.

    Args:
        folder: where the trace goes, see `require_folder`.
        device: where the steps run.

    Attributes:
        result: None until enough steps were taken, or training ended amid the profiled ones.
        steps: taken while this was open.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._trace = folder / TRACE
        self._device = device
        self.result: StepProfile | None = None
        self.steps = 0
        self._place = (0, 0)
        self._recording = False
        self._profiled = 0
        self._given_up = False
        self._inside: list[str] = []
        self._ranges: dict[tuple[str | None, str], Range] = {}
        self._marks: list[tuple[Range, torch.cuda.Event, torch.cuda.Event]] = []
        self._open = ExitStack()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._profiler = profile(
            activities=activities,
            schedule=schedule(wait=WAIT, warmup=WARM_UP, active=STEPS, repeat=1),
            on_trace_ready=self._finish,
        )

    def __enter__(self) -> Self:
        self._open.enter_context(opening_ranges(self._range))
        self._profiler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A step that failed is none to be counted, and what it raised must not be hidden by what comes of its profile.
        self._given_up = kind is not None
        with self._open:
            self._profiler.stop()

    def __call__(self, event: str, fields: Mapping[str, Any]) -> None:
        """Takes an event of the trainer."""
        if event != "batch" or self.result is not None:
            return
        self.steps += 1
        self._profiled += self._recording
        self._place = fields["window"], fields["epoch"]
        self._profiler.step()
        action = self._profiler.current_action
        self._recording = self.result is None and action in (ProfilerAction.RECORD, ProfilerAction.RECORD_AND_SAVE)
        if self.result is not None:
            self._open.close()

    @contextmanager
    def _range(self, name: str) -> Iterator[None]:
        if not self._recording:
            yield
            return
        inside = self._inside[-1] if self._inside else None
        found = self._ranges.setdefault((inside, name), Range(name, inside))
        self._inside.append(name)
        start = time.perf_counter()
        try:
            with record_function(name):
                first = self._mark()
                yield
                last = self._mark()
            found.calls += 1
            found.cpu_seconds += time.perf_counter() - start
            if first is not None and last is not None:
                self._marks.append((found, first, last))
        finally:
            self._inside.pop()

    def _mark(self) -> torch.cuda.Event | None:
        if self._device.type != "cuda":
            return None
        mark = torch.cuda.Event(enable_timing=True)
        mark.record(torch.cuda.current_stream(self._device))
        return mark

    def _finish(self, profiler: profile) -> None:
        if self._given_up or not self._profiled:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        for found, first, last in self._marks:
            found.cuda_seconds = (found.cuda_seconds or 0.0) + first.elapsed_time(last) / 1000
        self._marks.clear()
        outer = [found for found in self._ranges.values() if found.inside is None]
        ordered = [one for found in outer for one in [found, *self._parts(found.name)]]
        problem = None
        try:
            profiler.export_chrome_trace(str(self._trace))
        except OSError as error:
            # No reason to end a training that may have taken days.
            problem = f"cannot write {self._trace}: {error.strerror}"
        self.result = StepProfile(self._trace, problem, *self._place, self._profiled, ordered)

    def _parts(self, name: str) -> list[Range]:
        parts = [found for found in self._ranges.values() if found.inside == name]
        return [one for found in parts for one in [found, *self._parts(found.name)]]


def require_folder(folder: Path) -> None:
    """Makes the folder of a profile where it is missing.

    Raises:
        ValueError: it is a file, or nothing can be written there.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--profile: {folder} is a file; give a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--profile: cannot write into {folder}: {error.strerror}; give another folder") from error
