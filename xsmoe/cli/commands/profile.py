"""Option `--profile`: profile of training steps as a table."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from xsmoe.cli.display import Display
from xsmoe.report import tables
from xsmoe.stream.profiling import STEPS, WAIT, WARM_UP, StepProfile, StepProfiler
from xsmoe.stream.trainer import Listener


@contextmanager
def profiled(folder: Path | None, device: torch.device, display: Display, listeners: list[Listener]) -> Iterator[None]:
    """Profile the first steps inside the block, and show the table when it is complete.

    Args:
        folder: folder of the trace; None disables the profile.
        device: device of the steps.
        display: display of the command.
        listeners: listeners of the trainer. The profiler is added inside the block.
    """
    if folder is None:
        yield
        return
    profiler = StepProfiler(folder, device)
    shown = False

    def listen(event: str, fields: Mapping[str, Any]) -> None:
        nonlocal shown
        profiler(event, fields)
        if profiler.result is not None and not shown:
            shown = True
            show(profiler.result, display)

    with profiler:
        listeners.append(listen)
        try:
            yield
        finally:
            listeners.remove(listen)
    if profiler.result is None:
        display.warn(
            f"--profile: nothing was profiled, because this command ran {profiler.steps} training steps, but the "
            f"profile starts after {WAIT + WARM_UP} steps"
        )
    elif not shown:
        show(profiler.result, display)


def show(found: StepProfile, display: Display) -> None:
    """Show the table of a step's parts, and the file of the trace."""
    fewer = "" if found.steps == STEPS else f", fewer than {STEPS} because training ended"
    display.heading(
        f"Profile of {found.steps} steps{fewer} (window {found.window}, epoch {found.epoch}), mean per step"
    )
    display.lines(tables.aligned(rows(found)))
    if found.problem is not None:
        display.warn(f"--profile: {found.problem}")
    else:
        display.say(f"Trace: {found.trace}; open it at https://ui.perfetto.dev or in chrome://tracing.")


def rows(found: StepProfile) -> list[list[str]]:
    """Return the table: a header, a row for each range, and the sum. Nested ranges are indented and not in the sum."""
    outer = [one for one in found.ranges if one.parent is None]
    cpu = sum(one.cpu_seconds for one in outer)
    on_cuda = any(one.cuda_seconds is not None for one in outer)
    cuda = sum(one.cuda_seconds or 0.0 for one in outer)

    def row(name: str, calls: str, cpu_seconds: float, cuda_seconds: float) -> list[str]:
        cells = [name, calls, f"{1000 * cpu_seconds / found.steps:.3f}", f"{cpu_seconds / cpu:.1%}"]
        if on_cuda:
            cells += [f"{1000 * cuda_seconds / found.steps:.3f}", f"{cuda_seconds / cuda:.1%}" if cuda else ""]
        return cells

    return [
        ["range", "calls", "CPU ms", "share", *(["CUDA ms", "share"] if on_cuda else [])],
        *(
            row(
                one.name if one.parent is None else f"  {one.name}",
                f"{one.calls / found.steps:g}",
                one.cpu_seconds,
                one.cuda_seconds or 0.0,
            )
            for one in found.ranges
        ),
        row("all", "", cpu, cuda),
    ]
