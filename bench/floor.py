"""The floor: the time that the least possible work takes at the rates which this machine shows in the same run."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch

from bench.graph import record
from bench.measure import FLUSHED_BYTES, Samples, Stopwatch, Task, quantiles
from bench.workload import Product, Work

COPIED_BYTES = 96 << 20
# On a GPU, whose second-level cache may be larger than that.
CUDA_COPIED_BYTES = 1 << 30
# How often a probe on a GPU runs what it measures: a single run is mostly its launch.
REPEATS = 20
_CPU = torch.device("cpu")
_COPY = "probe copy"
_LAYOUTS = ("as it is", "transposed")
Recorder = Callable[[Callable[[], None]], tuple[Callable[[], None], None]]


class Rates(NamedTuple):
    """What the machine reaches, a second; `flop` is 0 where no product was measured."""

    flop: float
    bytes: float


def seconds(work: Work, rates: Rates) -> float:
    """The larger of FLOP over the matrix rate and bytes over the bandwidth."""
    arithmetic = work.flop / rates.flop if work.flop and rates.flop else 0.0
    return max(arithmetic, work.bytes / rates.bytes if rates.bytes else 0.0)


def probes(products: Sequence[Product], dtype: torch.dtype, device: torch.device) -> dict[str, Task]:
    """Tasks to interleave with the variants: each product by `torch.mm`, in both layouts of the weight, and a copy."""
    tasks: dict[str, Task] = {}
    for product in products:
        for one in _dtypes(dtype, device):
            count = operands(product, one) if device.type == "cuda" else 1
            lefts = [torch.randn(product.rows, product.inner, device=device).to(one) for _ in range(count)]
            right = torch.randn(product.inner, product.columns, device=device).to(one)
            # A weight lies either way; libraries differ in which they like.
            for layout, weight in zip(_LAYOUTS, (right, right.T.contiguous().T), strict=True):
                runs = [partial(torch.mm, left, weight) for left in lefts]
                tasks[_name(product, one, layout)] = _timed(device, runs)
    source = torch.ones(_copied(device) // 4, device=device)
    tasks[_COPY] = _timed(device, [partial(torch.zeros_like(source).copy_, source)])
    return tasks


def operands(product: Product, dtype: torch.dtype) -> int:
    """How many sets of rows a probe rotates through on a GPU, so that none is found in the second-level cache."""
    size = product.rows * product.inner * dtype.itemsize
    return min(REPEATS, math.ceil(FLUSHED_BYTES / size) + 1)


def rates(samples: Samples, products: Sequence[Product], dtype: torch.dtype, device: torch.device = _CPU) -> Rates:
    """The best product's and the copy's rate, from their median times; 0 where memory did not suffice for a probe."""
    flop = [rate for _, _, rate in product_rates(samples, products, dtype, device)]
    return Rates(max(flop, default=0.0), byte_rate(samples, device))


def product_rates(
    samples: Samples, products: Sequence[Product], dtype: torch.dtype, device: torch.device = _CPU
) -> list[tuple[Product, torch.dtype, float]]:
    """Each product's FLOP a second in each dtype that counts, with the weight lying the better way."""
    found = []
    for product in products:
        for one in _dtypes(dtype, device):
            names = [name for layout in _LAYOUTS if (name := _name(product, one, layout)) in samples]
            if names:
                found.append((product, one, max(product.flop / _median(samples, name) for name in names)))
    return found


def byte_rate(samples: Samples, device: torch.device = _CPU) -> float:
    """The copy's bytes a second, read and written; 0 where memory did not suffice for it."""
    return 2 * _copied(device) / _median(samples, _COPY) if _COPY in samples else 0.0


def total(work: Mapping[str, Work]) -> Work:
    """What all passes must do together."""
    return sum(work.values(), start=Work())


def _dtypes(dtype: torch.dtype, device: torch.device) -> tuple[torch.dtype, ...]:
    # Where a library is slow in a narrow dtype, as on CPUs, a kernel may widen; that must not take it below the floor.
    return (dtype,) if dtype == torch.float32 or device.type == "cuda" else (dtype, torch.float32)


def _copied(device: torch.device) -> int:
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


def repeated(runs: Sequence[Callable[[], object]], count: int, recorder: Recorder = record) -> Callable[[], None]:
    """What replays a CUDA graph of so many runs, one after the other in turn."""

    def all_runs() -> None:
        for place in range(count):
            runs[place % len(runs)]()

    replay, _ = recorder(all_runs)
    return replay
