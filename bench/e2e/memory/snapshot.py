"""A snapshot of all allocations of a step on a GPU, for PyTorch's memory viewer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from bench.core.benchmark import Benchmark, Variant, run_step, warm_up
from bench.core.results import Case, Role

VIEWER = "https://docs.pytorch.org/memory_viz"


@contextmanager
def record_allocations(path: Path) -> Iterator[None]:
    """Record all allocations on the GPU inside the block, with their Python stack, and write them to a file.

    `VIEWER` opens the file. It reads the file in the browser and uploads nothing.

    Raises:
        RuntimeError: there is no GPU. torch records allocations on GPUs only.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("a snapshot of allocations needs a GPU, and torch finds none")
    torch.cuda.synchronize()
    torch.cuda.memory._record_memory_history(stacks="python")
    try:
        yield
        torch.cuda.synchronize()
        torch.cuda.memory._dump_snapshot(str(path))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def snapshot_variant(benchmark: Benchmark) -> Variant:
    """Return our first variant that replays no CUDA graph. A replay allocates nothing."""
    return next(variant for variant in benchmark.variants() if variant.role == Role.OURS and not variant.cuda_graph)


def write_snapshot(benchmark: Benchmark, cases: Sequence[Case], path: Path) -> bool:
    """Write a snapshot of a step if its variant was measured at these sizes and is right; return whether it was."""
    variant = snapshot_variant(benchmark)
    rows = [row for case in cases if case.sizes == benchmark.sizes for row in case.rows if row.variant == variant.name]
    if not rows or rows[0].status != "measured":
        why = rows[0].status if rows else "not measured at the centre, which is not among the values of --sizes"
        print(f"\nno snapshot: {variant.name} is {why}", flush=True)
        return False
    built = variant.build()
    inputs = benchmark.make_inputs()
    # The first step compiles kernels and allocates the optimizer's state.
    warm_up(built, inputs)
    with record_allocations(path):
        run_step(built, inputs)
    print(f"\nsnapshot of a step of {variant.name}: {path}; open {VIEWER} in a browser and drop the file there")
    return True
