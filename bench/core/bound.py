"""The speed-of-light bound: the time of the least possible work at rates that are measured in the same run."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch

from bench.core.benchmark import Product, Work
from bench.core.cuda_graphs import record
from bench.core.timing import FLUSHED_BYTES, Samples, Stopwatch, Task, quantiles

COPIED_BYTES = 96 << 20
# A GPU's second-level cache may be larger than that.
CUDA_COPIED_BYTES = 1 << 30
# A probe on a GPU runs this often per round. A single run is mostly launch time.
REPEATS = 20
_CPU = torch.device("cpu")
_COPY = "probe copy"
_LAYOUTS = ("row-major", "transposed")
Recorder = Callable[[Callable[[], None]], tuple[Callable[[], None], None]]


class Rates(NamedTuple):
    """The rates that the machine reaches, per second; `flop` is 0 if no product was measured."""

    flop: float
    bytes: float


def seconds(work: Work, rates: Rates) -> float:
    """Return the larger of FLOP over the matrix rate and bytes over the bandwidth."""
    arithmetic = work.flop / rates.flop if work.flop and rates.flop else 0.0
    return max(arithmetic, work.bytes / rates.bytes if rates.bytes else 0.0)


def total(work: Mapping[str, Work]) -> Work:
    """Return the work of all passes together."""
    return sum(work.values(), start=Work())


def probes(products: Sequence[Product], dtype: torch.dtype, device: torch.device) -> dict[str, Task]:
    """Return tasks to interleave with the variants: each product by `torch.mm`, and a copy.

    A product is measured with both layouts of the weight, because libraries differ in which is faster.
    """
    tasks: dict[str, Task] = {}
    for product in products:
        for one in _probe_dtypes(dtype, device):
            count = operand_sets(product, one) if device.type == "cuda" else 1
            lefts = [torch.randn(product.rows, product.inner, device=device).to(one) for _ in range(count)]
            right = torch.randn(product.inner, product.columns, device=device).to(one)
            for layout, weight in zip(_LAYOUTS, (right, right.T.contiguous().T), strict=True):
                runs = [partial(torch.mm, left, weight) for left in lefts]
                tasks[_name(product, one, layout)] = _timed(device, runs)
    source = torch.ones(_copied_bytes(device) // 4, device=device)
    tasks[_COPY] = _timed(device, [partial(torch.zeros_like(source).copy_, source)])
    return tasks


def operand_sets(product: Product, dtype: torch.dtype) -> int:
    """Return how many left operands a probe on a GPU rotates through, so that none is in the second-level cache."""
    size = product.rows * product.inner * dtype.itemsize
    return min(REPEATS, math.ceil(FLUSHED_BYTES / size) + 1)


def rates(samples: Samples, products: Sequence[Product], dtype: torch.dtype, device: torch.device = _CPU) -> Rates:
    """Return the rates of the best product and of the copy, from median times; 0 if a probe ran out of memory."""
    flop = [rate for _, _, rate in product_rates(samples, products, dtype, device)]
    return Rates(max(flop, default=0.0), byte_rate(samples, device))


def product_rates(
    samples: Samples, products: Sequence[Product], dtype: torch.dtype, device: torch.device = _CPU
) -> list[tuple[Product, torch.dtype, float]]:
    """Return each product's FLOP per second in each probed dtype, with the better layout of the weight."""
    found = []
    for product in products:
        for one in _probe_dtypes(dtype, device):
            names = [name for layout in _LAYOUTS if (name := _name(product, one, layout)) in samples]
            if names:
                found.append((product, one, max(product.flop / _median(samples, name) for name in names)))
    return found


def byte_rate(samples: Samples, device: torch.device = _CPU) -> float:
    """Return the copy's bytes per second, read and written; 0 if it ran out of memory."""
    return 2 * _copied_bytes(device) / _median(samples, _COPY) if _COPY in samples else 0.0


def repeated(runs: Sequence[Callable[[], object]], count: int, recorder: Recorder = record) -> Callable[[], None]:
    """Return a function that replays one CUDA graph of `count` runs, which cycle through `runs`."""

    def all_runs() -> None:
        for place in range(count):
            runs[place % len(runs)]()

    replay, _ = recorder(all_runs)
    return replay


def _probe_dtypes(dtype: torch.dtype, device: torch.device) -> tuple[torch.dtype, ...]:
    # On CPUs a library can be slow in 16 bits, and a kernel may widen. It must not be faster than the bound then.
    return (dtype,) if dtype == torch.float32 or device.type == "cuda" else (dtype, torch.float32)


def _copied_bytes(device: torch.device) -> int:
    return CUDA_COPIED_BYTES if device.type == "cuda" else COPIED_BYTES


def _median(samples: Samples, name: str) -> float:
    return quantiles([laps[0] for laps in samples[name]]).median


def _name(product: Product, dtype: torch.dtype, layout: str) -> str:
    return f"probe {dtype} {product.rows}x{product.inner}x{product.columns} {layout}"


def _timed(device: torch.device, runs: Sequence[Callable[[], object]]) -> Task:
    count = REPEATS if device.type == "cuda" else 1
    run = repeated(runs, count) if device.type == "cuda" else runs[0]

    def task(_: int) -> tuple[float, ...]:
        watch = Stopwatch(device)
        run()
        watch.mark()
        return tuple(lap / count for lap in watch.laps())

    return task
