"""What a room of the bench provides: a workload, which draws inputs, knows its exact result, and builds variants."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from xsmoe_kernels import BackendUnavailable
from xsmoe_kernels.runtime import dispatch

Tensors = dict[str, Tensor]
PASSES = ("forward", "backward")


class Absent(RuntimeError):
    """A variant cannot run here; the message says why."""


@dataclass(frozen=True)
class Work:
    """The least that a pass must do: FLOP of matrix products, and bytes that go to and from memory."""

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
class Variant:
    """One way to compute a workload.

    Attributes:
        name: what its rows are called.
        forward: from one set of rows to results by name; "y" takes the gradient "grad", see `upstream`.
        leaves: the tensors that take gradients, under the names that these have in the exact result.
        counters: what has been counted since `reset`, by name.
        dtype: of the rows it is given, where that is not the workload's.
        tidy: brings a gradient into the exact result's layout.
        holds: weights, trainable or not, and caches: what it keeps anyhow, and does not save for backward.
        products: FLOP of the matrix products that each pass runs; None has them counted as they run.
        like: another variant whose products are the same, where they cannot be counted.
        compiled: whether torch.compile made it, so that its first run takes long.
        prepare: brings a round's rows to where this variant reads them, ahead of what is timed.
        solves: the workload whose exact result it is held to, if that is an easier one; its title says what it is.
        step: forward and backward in one, for a variant that knows no halves: results, and gradients by leaf.
        whole: what is timed in one, where it is more than forward and backward; these are what the gate sees.
    """

    name: str
    forward: Callable[[Tensors], Tensors]
    leaves: Callable[[Tensors], Tensors]
    counters: Callable[[], Tensors] = dict
    reset: Callable[[], None] = lambda: None
    dtype: torch.dtype | None = None
    tidy: Callable[[str, Tensor], Tensor] = lambda _, gradient: gradient
    holds: Callable[[], Iterable[Tensor]] = tuple
    products: Mapping[str, float] | None = None
    like: str = ""
    compiled: bool = False
    prepare: Callable[[Tensors], Tensors] | None = None
    step: Callable[[Tensors], tuple[Tensors, Tensors]] | None = None
    whole: Callable[[Tensors], None] | None = None
    solves: "Workload | None" = None


def upstream(results: Tensors, rows: Tensors) -> tuple[list[Tensor], list[Tensor]]:
    """The results that take a gradient, and the gradients: "y" takes "grad", and "some y" takes "some grad"."""
    names = [name for name in rows if name.endswith("grad")]
    return [results[name.removesuffix("grad") + "y"] for name in names], [rows[name] for name in names]


def gradients(variant: Variant, rows: Tensors, results: Tensors) -> Tensors:
    """The gradients of a variant's leaves."""
    leaves = variant.leaves(rows)
    if not leaves:
        return {}
    ys, grads = upstream(results, rows)
    return dict(zip(leaves, torch.autograd.grad(ys, list(leaves.values()), grads), strict=True))


def both_passes(variant: Variant, rows: Tensors) -> list[Tensor]:
    """A forward and a backward: all results and gradients."""
    results = variant.forward(rows)
    return [*results.values(), *gradients(variant, rows, results).values()]


@dataclass
class Workload(ABC):
    """An operator at one size: feeds correctness, speed and memory.

    Attributes:
        operator: the name of the operator in xsmoe_kernels.
        letters: the sizes it takes, with their default values; a run covers all combinations.
        cuda_sizes: the default values on a GPU, for the letters that differ from `letters`.
        quick_sizes: those of `--quick` and of pytest-benchmark, for the letters that differ from `letters`.
        tiny_sizes: the same for tests, which look at results and not at times.
        operators: how many of them a result goes through one after the other.
        dtypes: those that it is measured in.
        sizes: one value for each letter.
        dtype: of the rows and weights that are drawn.
        device: where they lie.
        seed: what they are drawn with.
    """

    operator: ClassVar[str]
    letters: ClassVar[Mapping[str, Sequence[int]]]
    cuda_sizes: ClassVar[Mapping[str, Sequence[int]]] = {}
    quick_sizes: ClassVar[Mapping[str, Sequence[int]]] = {}
    tiny_sizes: ClassVar[Mapping[str, Sequence[int]]] = {}
    operators: ClassVar[int] = 1
    dtypes: ClassVar[Sequence[torch.dtype]] = (torch.float32, torch.bfloat16, torch.float16)

    sizes: dict[str, int]
    dtype: torch.dtype
    device: torch.device
    seed: int = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    @classmethod
    def sensible(cls, sizes: Mapping[str, int]) -> bool:
        """Whether a combination of sizes occurs in practice; others are measured only if none does."""
        return True

    @property
    @abstractmethod
    def title(self) -> str:
        """What is computed, in one line."""

    @abstractmethod
    def variants(self) -> tuple[str, ...]:
        """Variants of an ordinary run, in the order of the table."""

    def optional(self) -> tuple[str, ...]:
        """Variants that run only when they are named."""
        return ()

    def baselines(self) -> tuple[str, ...]:
        """The variants that others are compared with unless the user says otherwise."""
        return self.variants()[:1]

    @abstractmethod
    def draw(self) -> Tensors:
        """A fresh set of rows in the workload's dtype, with the gradients of results, if there are any."""

    @abstractmethod
    def exact(self, rows: Tensors) -> Tensors:
        """All results and gradients in float64."""

    @abstractmethod
    def reference(self) -> Variant:
        """The specification in the workload's dtype, whose error is the measure of others'."""

    @abstractmethod
    def build(self, name: str) -> Variant:
        """The variant of that name.

        Raises:
            Absent: it cannot run here.
        """

    @abstractmethod
    def work(self) -> Mapping[str, Work]:
        """The least that each pass must do."""

    def products(self) -> Sequence[Product]:
        """The products whose speed, the best of them, is the matrix rate of the floor."""
        return ()

    def memory(self, name: str) -> float:
        """Bytes that a variant takes at its peak, roughly, beyond its inputs; for refusing what cannot fit."""
        return 0.0

    def kept(self, name: str) -> int | None:
        """Bytes that a variant by its design saves for backward, beyond inputs and weights; None if none are stated."""
        return None

    def need(self, backend: str, *operators: str) -> None:
        """Goes on only where a backend of ours serves these operators here.

        Raises:
            Absent: it does not serve one of them; the message says why.
        """
        try:
            for operator in operators:
                dispatch.select(operator, backend, self.device, self.dtype)
        except BackendUnavailable as reason:
            raise Absent(str(reason)) from None

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal random numbers in the workload's dtype."""
        return (torch.randn(shape, generator=self.generator) * scale).to(self.device, self.dtype)
