"""CUDA graphs: a step without the time that Python and the launches take."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch

from bench.workload import Absent, Tensors, Variant, gradients

T = TypeVar("T")
Step = Callable[[], tuple[Tensors, Tensors]]
Recorder = Callable[[Step], tuple[Callable[[], None], tuple[Tensors, Tensors]]]

# Ahead of a recording: what is compiled, tuned or allocated the first time must not happen within it.
WARM_UP = 3


def on_cuda(device: torch.device, *names: str) -> tuple[str, ...]:
    """The names of variants that only a GPU has."""
    return names if device.type == "cuda" else ()


class StaticRows:
    """Rows that always lie at the same place, where a graph reads them."""

    def __init__(self) -> None:
        self.rows: Tensors = {}

    def take(self, rows: Tensors) -> Tensors:
        """Copies a round's rows."""
        if not self.rows:
            self.rows = {
                name: tensor.detach().clone().requires_grad_(tensor.requires_grad) for name, tensor in rows.items()
            }
        with torch.no_grad():
            for name, tensor in self.rows.items():
                tensor.copy_(rows[name])
        return self.rows


def record(step: Callable[[], T]) -> tuple[Callable[[], None], T]:
    """What replays a step, and where its results lie then."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    return graph.replay, found


def replayed(variant: Variant, device: torch.device, recorder: Recorder = record) -> Variant:
    """A variant whose forward and backward are recorded once, as one graph, and then replayed.

    Raises:
        Absent: the device has no graphs.
    """
    if device.type != "cuda":
        raise Absent(f"CUDA graphs need a CUDA device, not {device.type}")
    static = StaticRows()
    recorded: list[tuple[Callable[[], None], tuple[Tensors, Tensors]]] = []

    def whole() -> tuple[Tensors, Tensors]:
        results = variant.forward(static.rows)
        return results, gradients(variant, static.rows, results)

    def prepare(rows: Tensors) -> Tensors:
        taken = static.take(rows)
        if not recorded:
            recorded.append(recorder(whole))
        return taken

    def step(rows: Tensors) -> tuple[Tensors, Tensors]:
        replay, found = recorded[0]
        replay()
        return found

    return replace(variant, prepare=prepare, step=step)


def replayed_like(build: Callable[[str], Variant], name: str, device: torch.device) -> Variant:
    """The variant "some-graph" of "some", whose products are the same."""
    base = name.removesuffix("-graph")
    return replace(replayed(build(base), device), name=name, like=base)


def kept_in_place(variant: Variant) -> Variant:
    """A variant of `torch.compile(mode="reduce-overhead")`, whose graphs read rows where they lie, as `replayed`'s do.

    Otherwise they would copy them each time, within what is timed.
    """
    static = StaticRows()

    def prepare(rows: Tensors) -> Tensors:
        new = not static.rows
        taken = static.take(rows)
        if new:
            for tensor in taken.values():
                torch._dynamo.mark_static_address(tensor)
        return taken

    def forward(rows: Tensors) -> Tensors:
        torch.compiler.cudagraph_mark_step_begin()
        return variant.forward(rows)

    return replace(variant, prepare=prepare, forward=forward)


def skipped() -> int:
    """How often torch.compile has left CUDA graphs out so far, though it was asked for them."""
    return int(torch._dynamo.utils.counters["inductor"].get("cudagraph_skips", 0))
