"""Profile of a few training steps: torch's trace, and the time of each named part of a step."""

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
"""Numbers of steps: skipped, warm-up of the profiler, and profiled."""
TRACE = "trace.json.gz"


@dataclass
class Range:
    """Time of a named part of a step, summed over all profiled steps.

    Attributes:
        name: name of the part.
        parent: name of the enclosing part; None for a part of the step itself.
        calls: number of calls.
        cpu_seconds: time on the host.
        cuda_seconds: time on the GPU, from the start to the end of the part in the stream; None without a GPU.
    """

    name: str
    parent: str | None
    calls: int = 0
    cpu_seconds: float = 0.0
    cuda_seconds: float | None = None


@dataclass
class StepProfile:
    """Result of a profile.

    Attributes:
        trace: file of torch's trace.
        problem: why the trace could not be written; None if it was written.
        window, epoch: position of the last profiled step.
        steps: number of profiled steps.
        ranges: parts in the order of their execution. The parts of a part follow it directly.
    """

    trace: Path
    problem: str | None
    window: int
    epoch: int
    steps: int
    ranges: list[Range]


class StepProfiler:
    """Profiles some training steps while the context is open. It is a listener of `StreamingTrainer`.

    Profiling does not change the results of the training.

    Args:
        folder: folder of the trace, see `require_writable_folder`.
        device: device of the steps.

    Attributes:
        result: the profile; None until all steps are profiled, or training ends.
        steps: number of steps since the context was opened.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._trace = folder / TRACE
        self._device = device
        self.result: StepProfile | None = None
        self.steps = 0
        self._place = (0, 0)
        self._recording = False
        self._profiled = 0
        self._failed = False
        self._open_parts: list[str] = []
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
        # The failed step must not be counted, and an error of the profiler must not hide the error of the step.
        self._failed = kind is not None
        with self._open:
            self._profiler.stop()

    def __call__(self, event: str, fields: Mapping[str, Any]) -> None:
        """Handle an event of the trainer."""
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
        parent = self._open_parts[-1] if self._open_parts else None
        found = self._ranges.setdefault((parent, name), Range(name, parent))
        self._open_parts.append(name)
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
            self._open_parts.pop()

    def _mark(self) -> torch.cuda.Event | None:
        if self._device.type != "cuda":
            return None
        mark = torch.cuda.Event(enable_timing=True)
        mark.record(torch.cuda.current_stream(self._device))
        return mark

    def _finish(self, profiler: profile) -> None:
        if self._failed or not self._profiled:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        for found, first, last in self._marks:
            found.cuda_seconds = (found.cuda_seconds or 0.0) + first.elapsed_time(last) / 1000
        self._marks.clear()
        outer = [found for found in self._ranges.values() if found.parent is None]
        ordered = [one for found in outer for one in [found, *self._parts(found.name)]]
        problem = None
        try:
            profiler.export_chrome_trace(str(self._trace))
        except OSError as error:
            # A missing trace must not stop a training that may have run for days.
            problem = f"cannot write {self._trace}: {error.strerror}"
        self.result = StepProfile(self._trace, problem, *self._place, self._profiled, ordered)

    def _parts(self, name: str) -> list[Range]:
        parts = [found for found in self._ranges.values() if found.parent == name]
        return [one for found in parts for one in [found, *self._parts(found.name)]]


def require_writable_folder(folder: Path) -> None:
    """Create the folder of a profile if it does not exist.

    Raises:
        ValueError: it is a file, or not writable.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--profile: {folder} is a file; give a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--profile: cannot write into {folder}: {error.strerror}; give another folder") from error
