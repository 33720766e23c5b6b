"""The peak of a process's resident memory in a step, in a process of its own for every point.

Linux keeps the largest resident size that a process ever had. Here it is set back just before the step, and read after
it. What ran in the process before would show, because freed memory may stay with it and be used again without growth;
so every point has a process that has run nothing else, and free memory is given back ahead of the step.
"""

import ctypes
import gc
import multiprocessing
import sys
import tempfile
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from bench.memory.step import step_of, warm_up
from bench.rows import Rows
from bench.shortage import first_line
from bench.workload import Workload
from xsmoe.out_of_memory import is_shortage

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# What makes the kernel set the largest resident size back to the present one.
_RESET = "5"


# Rooms, and what the first backward imports.
PRELOADED = [
    __name__,
    "bench.kernels.side_moe",
    "bench.steps.training_step",
    "torch.fx.experimental.symbolic_shapes",
]


class NotResident(RuntimeError):
    """Resident memory cannot be measured; the message says why."""


@dataclass(frozen=True)
class Point:
    """What a process of its own measures: a variant of a room at one size."""

    kind: type[Workload]
    sizes: dict[str, int]
    dtype: torch.dtype
    seed: int
    variant: str
    threads: int


def resident_growth(point: Point) -> int:
    """By how many bytes a step's resident memory exceeds, at its peak, that of the process ahead of it.

    Raises:
        NotResident: this is no Linux, the kernel does not let the mark be set back, memory does not suffice, or the
            process was killed.
    """
    if not sys.platform.startswith("linux"):
        raise NotResident(f"only Linux tells the peak of a process anew, not {sys.platform}")
    # A server that has imported torch and run nothing forks the processes, which would import it for seconds each.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    # A process that is killed leaves its files; here they go.
    with tempfile.TemporaryDirectory(prefix="xsmoe-bench-") as folder:
        process = context.Process(target=_measure, args=(point, folder, sender), daemon=True)
        process.start()
        sender.close()
        try:
            found = receiver.recv()
        except EOFError:
            found = None
        finally:
            # Nothing to wait for if this was interrupted.
            process.join(10 if sys.exc_info()[0] is None else 0)
            process.kill()
            process.join()
            receiver.close()
    if isinstance(found, int):
        return found
    if isinstance(found, NotResident):
        raise found
    if found is None:
        raise NotResident(f"its process ended with code {process.exitcode}, perhaps for want of memory")
    raise RuntimeError(f"{point.variant} at {point.sizes}, in a process of its own:\n{found}")


def _measure(point: Point, folder: str, sender: Connection) -> None:
    tempfile.tempdir = folder
    try:
        sender.send(growth(point))
    except NotResident as error:
        sender.send(error)
    except KeyboardInterrupt:
        # The parent, which got it too, says so.
        pass
    except Exception as error:
        short = is_shortage(error)
        sender.send(NotResident(f"out of memory: {first_line(error)}") if short else traceback.format_exc())


def growth(point: Point) -> int:
    """The same in this process, which must have run nothing before."""
    torch.set_num_threads(point.threads)
    workload = point.kind(point.sizes, point.dtype, torch.device("cpu"), point.seed)
    rows = Rows(workload, sets=1)
    variant = workload.build(point.variant)
    taken = rows.get(0, variant.dtype)
    # What comes once is no part of a step: compilation, thread pools, pages of code, the state of an optimizer.
    warm_up(variant, taken)
    gc.collect()
    _give_back()
    try:
        _CLEAR.write_text(_RESET)
    except OSError as error:
        raise NotResident(f"{_CLEAR} cannot be written: {error.strerror}") from None
    before = _status("VmRSS")
    # Held until the peak is read.
    results = step_of(variant, taken)()
    after = _status("VmHWM")
    del results
    return max(0, after - before)


def _give_back() -> None:
    """Free memory of the C library's allocator goes back to the system, so that using it again shows."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        raise NotResident("the C library cannot give free memory back (it has no malloc_trim)")
    trim(0)


def _status(field: str) -> int:
    """A field of the process's status in bytes."""
    for row in _STATUS.read_text().splitlines():
        name, _, amount = row.partition(":")
        if name == field:
            return int(amount.split()[0]) << 10
    raise NotResident(f"{_STATUS} has no {field}")
