"""Benchmarks and their variants: what an operator's file provides.

A `Benchmark` is an operator at one size. It creates inputs, computes the exact result, and lists its `Variant`s. A
variant is a typed record; its `build` returns the `Implementation` that runs.
"""

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from bench.core.results import Role, Row
from xsmoe_kernels import BackendUnavailable
from xsmoe_kernels.runtime import dispatch

Tensors = dict[str, Tensor]

ROTATED_BYTES = 128 << 20
"""Memory of the input sets that rounds rotate through. No round finds the inputs of the last one in a cache."""
MAX_INPUT_SETS = 16


class Absent(RuntimeError):
    """A variant cannot run here; the message gives the reason."""


@dataclass(frozen=True)
class Work:
    """The least work of a pass: FLOP of matrix products, and bytes that are read from and written to memory."""

    flop: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flop + other.flop, self.bytes + other.bytes)


class Product(NamedTuple):
    """A matrix product (rows, inner) x (inner, columns)."""

    rows: int
    inner: int
    columns: int

    @property
    def flop(self) -> float:
        return 2.0 * self.rows * self.inner * self.columns


@dataclass(frozen=True)
class Implementation:
    """Code that computes a benchmark in one way.

    Attributes:
        forward: from one set of inputs to results by name. "y" receives the gradient "grad"; see `gradients`.
        leaves: the tensors that receive gradients, under their names in the exact result.
        counters: what was counted since `reset`, by name.
        normalize: converts a gradient to the layout of the exact result.
        owned: weights, trainable or not, and caches. They exist between steps and are not saved activations.
        flop: FLOP of the matrix products of each pass; None if they are to be counted while they run.
        prepare: copies a round's inputs to where the implementation reads them. It is not timed.
        step: forward and backward in one call, for an implementation without separate passes: results, and gradients
            by leaf.
        whole_step: what is timed as one, if a step is more than forward and backward. The correctness check runs
            `forward` or `step`.
        solves: the easier problem whose exact result is required; None for the benchmark itself.
    """

    forward: Callable[[Tensors], Tensors]
    leaves: Callable[[Tensors], Tensors] = lambda _: {}
    counters: Callable[[], Tensors] = dict
    reset: Callable[[], None] = lambda: None
    normalize: Callable[[str, Tensor], Tensor] = lambda _, gradient: gradient
    owned: Callable[[], Iterable[Tensor]] = tuple
    flop: Mapping[str, float] | None = None
    prepare: Callable[[Tensors], Tensors] | None = None
    step: Callable[[Tensors], tuple[Tensors, Tensors]] | None = None
    whole_step: Callable[[Tensors], None] | None = None
    solves: "Benchmark | None" = None


@dataclass(frozen=True)
class Variant:
    """One way to compute a benchmark, as it is declared.

    Attributes:
        name: the name of its rows.
        role: what it is.
        build: returns the implementation; raises `Absent` if it cannot run here.
        compiled: whether torch.compile makes it; its first run is slow.
        cuda_graph: whether it replays a CUDA graph.
        dtype: of its inputs, if it is not the benchmark's.
        default: whether an ordinary run includes it; other variants run only if they are named.
        baseline: whether other variants are compared with it unless --against names others.
        flop_like: the variant that executes the same products, if they cannot be counted in this one.
        peak_estimate: rough peak in bytes beyond the inputs. A variant that cannot fit is skipped.
        expected_saved_bytes: saved activations by design; None if the design states none.
    """

    name: str
    role: Role
    build: Callable[[], Implementation]
    compiled: bool = False
    cuda_graph: bool = False
    dtype: torch.dtype | None = None
    default: bool = True
    baseline: bool = False
    flop_like: str = ""
    peak_estimate: float = 0.0
    expected_saved_bytes: int | None = None

    def row(self, status: str, reason: str | None = None) -> Row:
        """Return a row of this variant without measurements."""
        return Row(
            self.name,
            self.role,
            status,
            reason,
            dtype=None if self.dtype is None else dtype_name(self.dtype),
            cuda_graph=self.cuda_graph,
            compiled=self.compiled,
        )


@dataclass
class Benchmark(ABC):
    """An operator at one size, for the correctness check, speed and memory.

    Attributes:
        operator: the name of the operator in xsmoe_kernels.
        default_sizes: the values of each size letter. A run covers all combinations.
        cuda_sizes: the values on a GPU, for letters that differ from `default_sizes`.
        quick_sizes: the values of `--quick` and of pytest-benchmark, for letters that differ.
        tiny_sizes: the values of tests, which check results and not times.
        chained_operators: the number of operators that a result passes through.
        dtypes: the supported dtypes.
        sizes: one value for each letter.
        dtype: of inputs and weights.
        device: of inputs and weights.
        seed: of the random generator.
    """

    operator: ClassVar[str]
    default_sizes: ClassVar[Mapping[str, Sequence[int]]]
    cuda_sizes: ClassVar[Mapping[str, Sequence[int]]] = {}
    quick_sizes: ClassVar[Mapping[str, Sequence[int]]] = {}
    tiny_sizes: ClassVar[Mapping[str, Sequence[int]]] = {}
    chained_operators: ClassVar[int] = 1
    dtypes: ClassVar[Sequence[torch.dtype]] = (torch.float32, torch.bfloat16, torch.float16)

    sizes: dict[str, int]
    dtype: torch.dtype
    device: torch.device
    seed: int = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    @classmethod
    def realistic(cls, sizes: Mapping[str, int]) -> bool:
        """Return whether a combination of sizes occurs in practice. Others are measured only if none does."""
        return True

    @property
    @abstractmethod
    def title(self) -> str:
        """Return what is computed, in one line."""

    @abstractmethod
    def variants(self) -> list[Variant]:
        """Return the variants on this device, in the order of the table."""

    @abstractmethod
    def make_inputs(self) -> Tensors:
        """Return new inputs in the benchmark's dtype, with the gradients of the results, if any."""

    @abstractmethod
    def exact(self, inputs: Tensors) -> Tensors:
        """Return all results and gradients in float64."""

    @abstractmethod
    def reference(self) -> Implementation:
        """Return the specification in the benchmark's dtype. Its error is the unit of the others' errors."""

    @abstractmethod
    def work(self) -> Mapping[str, Work]:
        """Return the least work of each pass."""

    def products(self) -> Sequence[Product]:
        """Return the products whose best rate is the matrix rate of the speed-of-light bound."""
        return ()

    def select(self, names: Sequence[str]) -> list[Variant]:
        """Return the variants of these names."""
        known = {variant.name: variant for variant in self.variants()}
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"{self.operator} has no variant {unknown[0]!r}; it has {', '.join(known)}")
        return [known[name] for name in names]

    def variant(self, name: str) -> Variant:
        """Return the variant of that name."""
        return self.select([name])[0]

    def require(self, backend: str, *operators: str) -> None:
        """Check that a backend supports these operators on this device.

        Raises:
            Absent: it does not support one of them; the message gives the reason.
        """
        try:
            for operator in operators:
                dispatch.select(operator, backend, self.device, self.dtype)
        except BackendUnavailable as reason:
            raise Absent(str(reason)) from None

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Return normal random numbers in the benchmark's dtype."""
        return (torch.randn(shape, generator=self.generator) * scale).to(self.device, self.dtype)

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    @classmethod
    def smallest(cls, dtype: torch.dtype, device: torch.device) -> Self:
        """Return the benchmark with all sizes 1, for its names, which do not depend on sizes."""
        return cls(dict.fromkeys(cls.default_sizes, 1), dtype, device)


class InputSets:
    """Sets of inputs that rounds rotate through, in every dtype that a variant needs."""

    def __init__(self, benchmark: Benchmark, sets: int | None = None) -> None:
        first = benchmark.make_inputs()
        size = max(1, sum(tensor.nbytes for tensor in first.values()))
        count = sets or min(MAX_INPUT_SETS, max(2, math.ceil(ROTATED_BYTES / size)))
        self._dtype = benchmark.dtype
        self._sets = {benchmark.dtype: [first, *(benchmark.make_inputs() for _ in range(count - 1))]}

    def get(self, turn: int, dtype: torch.dtype | None = None) -> Tensors:
        """Return the inputs of a round. Their values are the same in every dtype."""
        dtype = dtype or self._dtype
        if dtype not in self._sets:
            self._sets[dtype] = [
                {name: _cast(t, dtype) for name, t in inputs.items()} for inputs in self._sets[self._dtype]
            ]
        return self._sets[dtype][turn % len(self._sets[dtype])]


def load_benchmark(registry: Mapping[str, str], name: str) -> type[Benchmark]:
    """Import the benchmark `name` of a registry, whose values are "module:Class"."""
    module, _, attribute = registry[name].partition(":")
    kind: type[Benchmark] = getattr(importlib.import_module(module), attribute)
    return kind


def gradients(implementation: Implementation, inputs: Tensors, results: Tensors) -> Tensors:
    """Return the gradients of the leaves. Result "y" receives the input "grad", and "some y" receives "some grad"."""
    leaves = implementation.leaves(inputs)
    if not leaves:
        return {}
    names = [name for name in inputs if name.endswith("grad")]
    ys, grads = [results[name.removesuffix("grad") + "y"] for name in names], [inputs[name] for name in names]
    return dict(zip(leaves, torch.autograd.grad(ys, list(leaves.values()), grads), strict=True))


def forward_backward(implementation: Implementation, inputs: Tensors) -> list[Tensor]:
    """Run forward and backward; return all results and gradients."""
    results = implementation.forward(inputs)
    return [*results.values(), *gradients(implementation, inputs, results).values()]


def run_step(implementation: Implementation, inputs: Tensors) -> list[Tensor]:
    """Run a whole step. Return its results and gradients, or nothing if it ends with an optimizer step."""
    if implementation.whole_step is None:
        return forward_backward(implementation, inputs)
    implementation.whole_step(inputs)
    return []


def warm_up(implementation: Implementation, inputs: Tensors) -> None:
    """Run a step and free its gradients, so that the next step allocates nothing that is allocated only once."""
    run_step(implementation, inputs)
    if implementation.whole_step is not None:
        for leaf in implementation.leaves(inputs).values():
            leaf.grad = None


def dtype_name(dtype: torch.dtype) -> str:
    """Return "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)
