"""The peak of a process's resident memory in a step, measured in a new process for every point.

Linux records the largest resident size of a process. It is reset just before the step and read after it. Earlier work
of a process would change the result: memory that was freed may stay with the process and be used again without growth.
Therefore each point has a process that has run nothing else, and free memory is returned to the system before the step.
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

from bench.core.benchmark import Benchmark, InputSets, run_step, warm_up
from bench.core.memory import first_line, is_out_of_memory

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Written to clear_refs, it resets the largest resident size to the current one.
_RESET = "5"


# The benchmarks, and a module that the first backward imports.
PRELOADED = [
    __name__,
    "bench.ops.side_moe",
    "bench.e2e.step.training_step",
    "torch.fx.experimental.symbolic_shapes",
]


class NotMeasurable(RuntimeError):
    """Resident memory cannot be measured; the message gives the reason."""


@dataclass(frozen=True)
class Point:
    """The work of one process: a variant of a benchmark at one size."""

    kind: type[Benchmark]
    sizes: dict[str, int]
    dtype: torch.dtype
    seed: int
    variant: str
    threads: int


def resident_growth(point: Point) -> int:
    """Return the peak resident memory during a step minus the resident memory before it, in bytes.

    Raises:
        NotMeasurable: this is not Linux, the kernel does not allow the reset, the step is out of memory, or the process
            was killed.
    """
    if not sys.platform.startswith("linux"):
        raise NotMeasurable(f"only Linux can reset the peak of a process, not {sys.platform}")
    # The server has imported torch and run nothing. Processes that it forks need not import torch, which takes seconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    # A killed process leaves its temporary files. They are removed here.
    with tempfile.TemporaryDirectory(prefix="xsmoe-bench-") as folder:
        process = context.Process(target=_measure, args=(point, folder, sender), daemon=True)
        process.start()
        sender.close()
        try:
            found = receiver.recv()
        except EOFError:
            found = None
        finally:
            # After an interruption there is nothing to wait for.
            process.join(10 if sys.exc_info()[0] is None else 0)
            process.kill()
            process.join()
            receiver.close()
    if isinstance(found, int):
        return found
    if isinstance(found, NotMeasurable):
        raise found
    if found is None:
        raise NotMeasurable(f"its process ended with code {process.exitcode}, perhaps because memory ran out")
    raise RuntimeError(f"{point.variant} at {point.sizes}, in its own process:\n{found}")


def _measure(point: Point, folder: str, sender: Connection) -> None:
    tempfile.tempdir = folder
    try:
        sender.send(growth(point))
    except NotMeasurable as error:
        sender.send(error)
    except KeyboardInterrupt:
        # The parent is interrupted too, and reports it.
        pass
    except Exception as error:
        found = NotMeasurable(f"out of memory: {first_line(error)}") if is_out_of_memory(error) else None
        sender.send(found or traceback.format_exc())


def growth(point: Point) -> int:
    """Return the same for this process, which must not have run anything before."""
    torch.set_num_threads(point.threads)
    benchmark = point.kind(point.sizes, point.dtype, torch.device("cpu"), point.seed)
    inputs = InputSets(benchmark, sets=1)
    variant = benchmark.variant(point.variant)
    built, mine = variant.build(), inputs.get(0, variant.dtype)
    # Compilation, thread pools, code pages and optimizer state are no part of a step.
    warm_up(built, mine)
    gc.collect()
    _trim_heap()
    try:
        _CLEAR.write_text(_RESET)
    except OSError as error:
        raise NotMeasurable(f"{_CLEAR} cannot be written: {error.strerror}") from None
    before = _status("VmRSS")
    # The results exist until the peak is read.
    results = run_step(built, mine)
    after = _status("VmHWM")
    del results
    return max(0, after - before)


def _trim_heap() -> None:
    """Return free memory of the C library's allocator to the system, so that its reuse counts as growth."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        raise NotMeasurable("the C library cannot return free memory (it has no malloc_trim)")
    trim(0)


def _status(field: str) -> int:
    """Return a field of the process's status in bytes."""
    for row in _STATUS.read_text().splitlines():
        name, _, amount = row.partition(":")
        if name == field:
            return int(amount.split()[0]) << 10
    raise NotMeasurable(f"{_STATUS} has no {field}")
