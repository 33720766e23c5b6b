"""Launches and host time of the Triton backend's calls, counted and timed without a GPU.

    python -m tests.kernels.helpers.triton_host_time                 # a table of all calls
    python -m tests.kernels.helpers.triton_host_time --rows 2816     # with another number of rows
    python -m tests.kernels.helpers.triton_host_time --json PATH     # the launches only, for the test

Each call runs forward and backward through the public functions, on CPU tensors and a driver that launches nothing.
Host time is what Python costs: on a GPU the driver's own time comes on top.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # Triton reads it when it is imported.

import torch
from torch import Tensor

import xsmoe_kernels as kernels
from tests.kernels.helpers.triton_fake_driver import fake_driver

DTYPE = torch.bfloat16
_NO_LAUNCH = (
    "empty empty_like empty_strided new_empty view _unsafe_view as_strided reshape expand slice select narrow permute "
    "transpose t unsqueeze squeeze detach alias unbind split flatten unflatten to result_type lift_fresh item "
    "_local_scalar_dense is_nonzero"
)
NO_LAUNCH = frozenset(f"aten::{name}" for name in _NO_LAUNCH.split())
"""Operations of torch that allocate memory or return a view, and start no kernel on a GPU."""

Call = Callable[[], object]


def side_levels(count: int, rows: int, **options: Any) -> list[dict[str, Any]]:
    """Return side levels at the paper's sizes, with 9 of 10 experts frozen."""
    dim, rank, experts = 768, 64, 10

    def weights(*shape: int) -> Tensor:
        return torch.randn(shape).to(DTYPE).requires_grad_()

    return [
        {
            "x": torch.randn(rows, dim).to(DTYPE).requires_grad_(),
            "backbone": torch.randn(rows, dim).to(DTYPE),
            "router": weights(experts + 1, dim),
            "down": weights(1, rank, dim),
            "up": weights(1, rank, dim),
            "frozen": kernels.FrozenExperts(*torch.randn(2, experts - 1, rank, dim).to(DTYPE)),
            "utilization": kernels.Utilization(experts),
            **options,
        }
        for _ in range(count)
    ]


def leaves(levels: list[dict[str, Any]]) -> list[Tensor]:
    """Return the tensors that get a gradient."""
    return [level[name] for level in levels for name in ("x", "router", "down", "up")]


def calls(rows: int) -> dict[str, Call]:
    """Return the measured calls by name; operators with a gradient run forward and backward."""
    one, two = side_levels(1, rows), side_levels(2, rows)
    recomputed = side_levels(1, rows, recompute=True)
    gradients = [torch.randn(rows, 768).to(DTYPE) for _ in range(2)]
    logits = torch.randn(rows, 10).to(DTYPE).requires_grad_()
    x, weight = torch.randn(rows, 768).to(DTYPE).requires_grad_(), torch.randn(10, 768, 64).to(DTYPE).requires_grad_()
    offsets = torch.linspace(0, rows, 11).long()
    queries, items = (torch.randn(size, 128).to(DTYPE).requires_grad_() for size in (rows, 2640))
    targets, history = torch.randint(0, 2640, (rows,)), torch.randint(0, 2640, (rows, 11))
    fixed_queries, fixed_items = queries.detach(), items.detach()
    seen = (history.flatten(), 11 * torch.arange(rows + 1))
    ones = torch.ones(rows, 64, dtype=DTYPE)

    def side_moe(level: dict[str, Any]) -> object:
        return torch.autograd.grad(kernels.side_moe(**level), leaves([level]), gradients[0])

    def side_moe_group() -> object:
        return torch.autograd.grad(kernels.side_moe_group(two), leaves(two), gradients)

    def route_topk() -> object:
        gates, _ = kernels.route_topk(logits, 2)[:2]
        return torch.autograd.grad(gates, logits, ones[:, :2])

    def grouped_mm() -> object:
        return torch.autograd.grad(kernels.grouped_mm(x, weight, offsets), (x, weight), ones)

    def in_batch_softmax_loss() -> object:
        loss = kernels.in_batch_softmax_loss(queries, items, targets, history)
        return torch.autograd.grad(loss, (queries, items), torch.ones_like(loss))

    return {
        "side_moe": lambda: side_moe(one[0]),
        "side_moe with recompute": lambda: side_moe(recomputed[0]),
        "side_moe_group of two": side_moe_group,
        "route_topk": route_topk,
        "grouped_mm": grouped_mm,
        "in_batch_softmax_loss": in_batch_softmax_loss,
        "rank_of_target": lambda: kernels.rank_of_target(fixed_queries, fixed_items, targets, seen),
        "topk_items": lambda: kernels.topk_items(fixed_queries, fixed_items, 10, seen),
    }


def count(call: Call, launches: list[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Return how often a call launches each Triton kernel, and each operation of torch that starts a kernel."""
    call()  # The first call fills caches.
    launches.clear()
    with torch.autograd.profiler.profile() as profile:
        call()
    leaves = [
        event.name
        for event in profile.function_events
        if event.name.startswith("aten::") and not any(child.name.startswith("aten::") for child in event.cpu_children)
    ]
    return dict(Counter(launches)), dict(Counter(name for name in leaves if name not in NO_LAUNCH))


def host_seconds(call: Call, repeats: int) -> float:
    """Return the median time of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Print a line for each call, or write the counts to a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=256, help="rows of each call's inputs (default 256)")
    parser.add_argument("--repeats", type=int, default=60, help="timed calls, of which the median is printed")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the counts to a file, and time nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    counts: dict[str, Any] = {}
    with fake_driver() as launches, kernels.use_backend("triton"):
        for name, call in calls(options.rows).items():
            counts[name] = count(call, launches)
            if options.json is None:
                launched, operations = (sum(found.values()) for found in counts[name])
                microseconds = 1e6 * host_seconds(call, options.repeats)
                print(f"{name:26} {launched:3} kernels, {operations:3} operations of torch, {microseconds:8.0f} us")
    if options.json is not None:
        options.json.write_text(json.dumps(counts, indent=1))


if __name__ == "__main__":
    sys.exit(main())
