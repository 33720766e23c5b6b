"""CUDA graphs: a step without the host time of Python and of kernel launches."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch

from bench.core.benchmark import Absent, Benchmark, Implementation, Tensors, Variant, gradients
from bench.core.results import Role

T = TypeVar("T")
Step = Callable[[], tuple[Tensors, Tensors]]
Recorder = Callable[[Step], tuple[Callable[[], None], tuple[Tensors, Tensors]]]

# Compilation, tuning and first allocations must not happen during the capture.
WARM_UP = 3


class StaticInputs:
    """Inputs at fixed addresses, from which a graph reads."""

    def __init__(self) -> None:
        self.inputs: Tensors = {}

    def copy(self, inputs: Tensors) -> Tensors:
        """Copy a round's inputs to the fixed addresses."""
        if not self.inputs:
            self.inputs = {
                name: tensor.detach().clone().requires_grad_(tensor.requires_grad) for name, tensor in inputs.items()
            }
        with torch.no_grad():
            for name, tensor in self.inputs.items():
                tensor.copy_(inputs[name])
        return self.inputs


def record(step: Callable[[], T]) -> tuple[Callable[[], None], T]:
    """Capture a step; return the function that replays it, and the tensors that a replay overwrites."""
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


def replayed(implementation: Implementation, device: torch.device, recorder: Recorder = record) -> Implementation:
    """Return an implementation that captures forward and backward once, as one graph, and then replays it.

    Raises:
        Absent: the device has no graphs.
    """
    if device.type != "cuda":
        raise Absent(f"CUDA graphs need a CUDA device, not {device.type}")
    static = StaticInputs()
    recorded: list[tuple[Callable[[], None], tuple[Tensors, Tensors]]] = []

    def run() -> tuple[Tensors, Tensors]:
        results = implementation.forward(static.inputs)
        return results, gradients(implementation, static.inputs, results)

    def prepare(inputs: Tensors) -> Tensors:
        copied = static.copy(inputs)
        if not recorded:
            recorded.append(recorder(run))
        return copied

    def step(_: Tensors) -> tuple[Tensors, Tensors]:
        replay, found = recorded[0]
        replay()
        return found

    return replace(implementation, prepare=prepare, step=step)


def with_graph(variant: Variant, device: torch.device, *, baseline: bool = False) -> Variant:
    """Return the variant "some-graph" of the variant "some"; `baseline` as in `Variant`."""
    return replace(
        variant,
        name=f"{variant.name}-graph",
        build=lambda: replayed(variant.build(), device),
        cuda_graph=True,
        baseline=baseline,
        flop_like=variant.name,
        expected_saved_bytes=None,
    )


def our_variants(
    benchmark: Benchmark, build: Callable[[str], Implementation], backends: Sequence[str] = (), **declared: Any
) -> list[Variant]:
    """Return "ours" and, on a GPU, its graph and two variants for each of `backends`.

    Args:
        benchmark: the operator.
        build: returns the implementation on a backend; "auto" is that of "ours".
        backends: backends that are measured by name.
        declared: more fields of the variants.
    """
    names = {"ours": "auto"} | ({f"ours-{one}": one for one in backends} if benchmark.on_cuda else {})
    found = [Variant(name, Role.OURS, partial(build, backend), **declared) for name, backend in names.items()]
    graphs = [[one, with_graph(one, benchmark.device)] for one in found]
    return [variant for pair in graphs for variant in pair] if benchmark.on_cuda else found


def at_fixed_addresses(implementation: Implementation) -> Implementation:
    """Return an implementation by `torch.compile(mode="reduce-overhead")` whose graphs read inputs in place.

    Otherwise the graphs would copy the inputs in every round, as part of what is timed.
    """
    static = StaticInputs()

    def prepare(inputs: Tensors) -> Tensors:
        new = not static.inputs
        copied = static.copy(inputs)
        if new:
            for tensor in copied.values():
                torch._dynamo.mark_static_address(tensor)
        return copied

    def forward(inputs: Tensors) -> Tensors:
        torch.compiler.cudagraph_mark_step_begin()
        return implementation.forward(inputs)

    return replace(implementation, prepare=prepare, forward=forward)


def skipped_graphs() -> int:
    """Return how often torch.compile has skipped CUDA graphs in this process although they were requested."""
    return int(torch._dynamo.utils.counters["inductor"].get("cudagraph_skips", 0))
