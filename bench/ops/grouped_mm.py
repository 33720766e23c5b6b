"""`grouped_mm`: rows sorted by expert, each group times its expert's weight, all experts but the last one frozen."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.core.baselines import load_library, try_library
from bench.core.benchmark import Absent, Benchmark, Implementation, Product, Tensors, Variant, Work
from bench.core.cuda_graphs import with_graph
from bench.core.memory import is_out_of_memory
from bench.core.results import Role
from xsmoe_kernels import grouped_mm, use_backend

LIBRARIES = {"scattermoe": "scattermoe.parallel_experts", "megablocks": "megablocks.grouped_gemm_util"}
"""Libraries for mixtures of experts with a separate grouped product, and the module of each.

Their weights are one tensor (E, K, P), which receives gradients as a whole: they cannot skip frozen experts.
"""
GroupedProduct = Callable[[Tensor, Tensor], Tensor]
"""From rows (M, K), sorted by expert, and weights (E, K, P)."""


class GroupedMM(Benchmark):
    """The two products of a top-k side level: D to R and R to D. Group sizes are random, and one group is empty."""

    operator: ClassVar[str] = "grouped_mm"
    default_sizes: ClassVar[Mapping[str, Sequence[int]]] = {
        "M": (512, 5632, 40000),
        "E": (10, 32),
        "K": (768, 64),
        "P": (64, 768),
    }
    cuda_sizes: ClassVar[Mapping[str, Sequence[int]]] = {"M": (512, 5632, 131072)}
    quick_sizes: ClassVar[Mapping[str, Sequence[int]]] = {"M": (5632,), "E": (10,)}
    tiny_sizes: ClassVar[Mapping[str, Sequence[int]]] = {"M": (67,), "E": (3,), "K": (48,), "P": (8,)}

    def __post_init__(self) -> None:
        super().__post_init__()
        experts, inner, columns = (self.sizes[letter] for letter in "EKP")
        self.weight = self.normal(experts, inner, columns, scale=inner**-0.5)
        # The middle group is empty, unless it is the only one.
        shares = torch.rand(experts, generator=self.generator, dtype=torch.float64) + 0.5
        if experts > 1:
            shares[(experts - 1) // 2] = 0
        ends = (shares.cumsum(0) / shares.sum() * self.sizes["M"]).round().long()
        ends[-1] = self.sizes["M"]
        bounds = [0, *ends.tolist()]
        self.starts, self.offsets = bounds[:-1], torch.tensor(bounds, device=self.device)
        self.counts = [last - first for first, last in itertools.pairwise(bounds)]

    @classmethod
    def realistic(cls, sizes: Mapping[str, int]) -> bool:
        """Return whether the product is one of a side level: to its rank, or back."""
        return sizes["K"] != sizes["P"]

    @property
    def title(self) -> str:
        experts = self.sizes["E"]
        return f"groups of {min(self.counts)} to {max(self.counts)} rows, {experts - 1} of {experts} experts frozen"

    def variants(self) -> list[Variant]:
        def compiled() -> Implementation:
            return self._separate(torch.compile(self._loop, fullgraph=True, dynamic=False))

        usual = [
            Variant("loop", Role.EAGER, lambda: self._separate(self._loop), baseline=True),
            Variant("padded", Role.EAGER, self._padded),
            Variant("torch", Role.EAGER, self._torch),
            Variant("ours", Role.OURS, lambda: self._ours("auto")),
        ]
        compared = ("loop", "torch")
        graphs = [with_graph(one, self.device, baseline=one.name in compared) for one in usual]
        return [
            *usual,
            *(graphs if self.on_cuda else []),
            *(Variant(name, Role.LIBRARY, partial(self._library, name)) for name in LIBRARIES),
            Variant("compiled-loop", Role.COMPILED, compiled, compiled=True, default=False, flop_like="loop"),
            Variant("reference", Role.REFERENCE, self.reference, default=False),
        ]

    def make_inputs(self) -> Tensors:
        rows, inner, columns = (self.sizes[letter] for letter in "MKP")
        return {"x": self.normal(rows, inner).requires_grad_(), "grad": self.normal(rows, columns)}

    def exact(self, inputs: Tensors) -> Tensors:
        x, grad = inputs["x"].detach().double(), inputs["grad"].double()
        weight, first = self.weight.double(), self.starts[-1]
        groups = list(zip(x.split(self.counts), grad.split(self.counts), weight, strict=True))
        return {
            "y": torch.cat([mine @ expert for mine, _, expert in groups]),
            "x": torch.cat([mine @ expert.T for _, mine, expert in groups]),
            "weight": x[first:].T @ grad[first:],
        }

    def reference(self) -> Implementation:
        return self._ours("reference")

    def work(self) -> Mapping[str, Work]:
        rows, _, inner, columns = (self.sizes[letter] for letter in "MEKP")
        trained, size = self.counts[-1], self.dtype.itemsize
        product = Product(rows, inner, columns).flop
        read = (rows * inner + rows * columns) * size
        return {
            "forward": Work(product, read),
            "backward": Work(product + Product(inner, trained, columns).flop, read + trained * inner * size),
        }

    def products(self) -> Sequence[Product]:
        rows, inner, columns = (self.sizes[letter] for letter in "MKP")
        return Product(rows, inner, columns), Product(rows, columns, inner)

    def _ours(self, backend: str) -> Implementation:
        def product(x: Tensor, weight: Tensor) -> Tensor:
            with use_backend(backend):
                return grouped_mm(x, weight, self.offsets, num_frozen=self.sizes["E"] - 1)

        return self._joint(product, {name: work.flop for name, work in self.work().items()})

    def _joint(self, product: GroupedProduct, flop: Mapping[str, float] | None = None) -> Implementation:
        """Return an implementation with one tensor of all weights. Of its gradient, the last expert's is checked."""
        weight = self.weight.clone().requires_grad_()
        return Implementation(
            lambda inputs: {"y": product(inputs["x"], weight)},
            leaves=lambda inputs: {"x": inputs["x"], "weight": weight},
            normalize=lambda leaf, gradient: gradient[-1] if leaf == "weight" else gradient,
            owned=lambda: [weight, self.offsets],
            flop=flop,
        )

    def _separate(self, run: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Implementation:
        """Return an implementation with a separate tensor for the trainable expert."""
        frozen, trained = self.weight[:-1].clone(), self.weight[-1].clone().requires_grad_()
        return Implementation(
            lambda inputs: {"y": run(inputs["x"], frozen, trained)},
            leaves=lambda inputs: {"x": inputs["x"], "weight": trained},
            owned=lambda: [frozen, trained],
        )

    def _loop(self, x: Tensor, frozen: Tensor, trained: Tensor) -> Tensor:
        groups = zip(x.split(self.counts), (*frozen, trained), strict=True)
        return torch.cat([rows @ weight for rows, weight in groups])

    def _padded(self) -> Implementation:
        counts = torch.tensor(self.counts)
        most, experts = int(counts.max()), self.sizes["E"]
        place = torch.arange(self.sizes["M"]) - torch.tensor(self.starts).repeat_interleave(counts)
        slot = (torch.arange(experts).repeat_interleave(counts) * most + place).to(self.device)

        def product(x: Tensor, weight: Tensor) -> Tensor:
            padded = x.new_zeros(experts * most, x.shape[1]).index_copy(0, slot, x)
            return torch.bmm(padded.view(experts, most, -1), weight).flatten(0, 1).index_select(0, slot)

        return self._joint(product)

    def _torch(self) -> Implementation:
        run = getattr(F, "grouped_mm", None)
        if run is None:
            raise Absent(f"torch {torch.__version__} has no torch.nn.functional.grouped_mm")
        ends = self.offsets[1:].to(torch.int32)

        def product(x: Tensor, weight: Tensor) -> Tensor:
            y: Tensor = run(x, weight, offs=ends)
            return y

        try:
            trial, weight = self.make_inputs(), self.weight.clone().requires_grad_()
            torch.autograd.grad(product(trial["x"], weight), [trial["x"], weight], trial["grad"])
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise Absent(f"torch's grouped_mm fails here: {str(error).splitlines()[0]}") from error
        return self._joint(product, self._flop_of_all_gradients())

    def _library(self, name: str) -> Implementation:
        """Return a library's product.

        Raises:
            Absent: it is not installed, or does not run here.
        """
        make = _scattermoe if name == "scattermoe" else _megablocks

        def trial() -> None:
            sizes = [16, 0, 48]
            rows = torch.zeros(sum(sizes), 64, device=self.device, dtype=self.dtype, requires_grad=True)
            weight = torch.zeros(len(sizes), 64, 64, device=self.device, dtype=self.dtype, requires_grad=True)
            y = make(sizes, self.device, self.dtype)(rows, weight)
            torch.autograd.grad(y, [rows, weight], torch.zeros_like(y))

        product = make(self.counts, self.device, self.dtype)
        try_library(name, trial)
        return self._joint(product, self._flop_of_all_gradients())

    def _flop_of_all_gradients(self) -> Mapping[str, float]:
        """Return the FLOP of a product that computes the weight gradients of frozen experts, too."""
        product = Product(*(self.sizes[letter] for letter in "MKP")).flop
        return {"forward": product, "backward": 2 * product}


def _scattermoe(counts: Sequence[int], device: torch.device, dtype: torch.dtype) -> GroupedProduct:
    """Return ScatterMoE's linear layer of experts, with grouped rows as input and output."""
    module = load_library("scattermoe", LIBRARIES["scattermoe"], device)
    kernels: Any = getattr(getattr(module, "kernels", None), "ops", None)
    if dtype == torch.float32 and hasattr(kernels, "ALLOW_TF32"):
        # Its default is TF32, which the correctness check refuses. It gets torch's setting.
        kernels.ALLOW_TF32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    sizes = torch.tensor(list(counts), device=device)
    experts = torch.arange(len(counts), device=device).repeat_interleave(sizes)
    places, ends = torch.arange(len(experts), device=device), sizes.cumsum(0)

    def product(rows: Tensor, weight: Tensor) -> Tensor:
        y: Tensor = module.parallel_linear(
            rows,
            weight,
            1,
            sorted_expert_idxs=experts,
            sorted_scattered_idxs=places,
            expert_offsets=ends,
            grouped_in=True,
            grouped_out=True,
        )
        return y

    return product


def _megablocks(counts: Sequence[int], device: torch.device, dtype: torch.dtype) -> GroupedProduct:
    """Return the product of MegaBlocks' dropless layers: grouped_gemm, which `megablocks[gg]` installs."""
    module = load_library("megablocks", LIBRARIES["megablocks"], device)
    if module.ops is None:
        raise Absent("megablocks is installed without grouped_gemm, which megablocks[gg] installs")
    # On the host, as in its layers.
    sizes = torch.tensor(list(counts))

    def product(rows: Tensor, weight: Tensor) -> Tensor:
        y: Tensor = module.ops.gmm(rows, weight, sizes)
        return y

    return product
