"""`grouped_mm`: rows sorted by expert, each group times its expert's weight, all experts but the last one frozen."""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.graph import on_cuda, replayed_like
from bench.kernels import grouped_mm_rivals
from bench.workload import Absent, Product, Tensors, Variant, Work, Workload
from xsmoe.out_of_memory import is_shortage
from xsmoe_kernels import grouped_mm, use_backend


class GroupedMM(Workload):
    """The two products of a top-k side level: D to R and R to D. Group sizes are drawn, and one group is empty."""

    operator: ClassVar[str] = "grouped_mm"
    letters: ClassVar[Mapping[str, Sequence[int]]] = {
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
        bounds = (shares.cumsum(0) / shares.sum() * self.sizes["M"]).round().long()
        bounds[-1] = self.sizes["M"]
        self.bounds = [0, *bounds.tolist()]
        self.offsets = torch.tensor(self.bounds, device=self.device)

    @classmethod
    def sensible(cls, sizes: Mapping[str, int]) -> bool:
        """A side level multiplies to its rank and back."""
        return sizes["K"] != sizes["P"]

    @property
    def title(self) -> str:
        experts = self.sizes["E"]
        groups = self._counts()
        return f"groups of {min(groups)} to {max(groups)} rows, {experts - 1} of {experts} experts frozen"

    def variants(self) -> tuple[str, ...]:
        names = "loop", "padded", "torch", "ours"
        return *names, *on_cuda(self.device, *(f"{name}-graph" for name in names)), *grouped_mm_rivals.MODULES

    def baselines(self) -> tuple[str, ...]:
        return "loop", *on_cuda(self.device, "loop-graph", "torch-graph")

    def optional(self) -> tuple[str, ...]:
        return "compiled-loop", "reference"

    def draw(self) -> Tensors:
        rows, inner, columns = (self.sizes[letter] for letter in "MKP")
        return {"x": self.normal(rows, inner).requires_grad_(), "grad": self.normal(rows, columns)}

    def exact(self, rows: Tensors) -> Tensors:
        x, grad = rows["x"].detach().double(), rows["grad"].double()
        weight, first = self.weight.double(), self.bounds[-2]
        groups = list(zip(x.split(self._counts()), grad.split(self._counts()), weight, strict=True))
        return {
            "y": torch.cat([mine @ expert for mine, _, expert in groups]),
            "x": torch.cat([mine @ expert.T for _, mine, expert in groups]),
            "weight": x[first:].T @ grad[first:],
        }

    def reference(self) -> Variant:
        return self._ours("reference", "reference")

    def build(self, name: str) -> Variant:
        if name == "reference":
            return self.reference()
        if name == "ours":
            return self._ours(name, "auto")
        if name in ("loop-graph", "padded-graph", "torch-graph", "ours-graph"):
            return replayed_like(self.build, name, self.device)
        if name == "loop":
            return self._split(name, self._loop)
        if name == "compiled-loop":
            run = torch.compile(self._loop, fullgraph=True, dynamic=False)
            return self._split(name, run, compiled=True)
        if name == "padded":
            return self._padded(name)
        if name == "torch":
            return self._torch(name)
        if name in grouped_mm_rivals.MODULES:
            return self._library(name)
        raise ValueError(f"grouped_mm has no variant {name!r}")

    def work(self) -> Mapping[str, Work]:
        rows, _, inner, columns = (self.sizes[letter] for letter in "MEKP")
        trained, size = self._counts()[-1], self.dtype.itemsize
        product = Product(rows, inner, columns).flop
        read = (rows * inner + rows * columns) * size
        return {
            "forward": Work(product, read),
            "backward": Work(product + Product(inner, trained, columns).flop, read + trained * inner * size),
        }

    def products(self) -> Sequence[Product]:
        rows, inner, columns = (self.sizes[letter] for letter in "MKP")
        return Product(rows, inner, columns), Product(rows, columns, inner)

    def _counts(self) -> list[int]:
        return [last - first for first, last in zip(self.bounds, self.bounds[1:], strict=False)]

    def _ours(self, name: str, backend: str) -> Variant:
        weight = self.weight.clone().requires_grad_()

        def forward(rows: Tensors) -> Tensors:
            with use_backend(backend):
                return {"y": grouped_mm(rows["x"], weight, self.offsets, num_frozen=self.sizes["E"] - 1)}

        least = {name: work.flop for name, work in self.work().items()}
        return self._whole(name, forward, weight, products=least)

    def _whole(
        self,
        name: str,
        forward: Callable[[Tensors], Tensors],
        weight: Tensor,
        *,
        products: Mapping[str, float] | None = None,
    ) -> Variant:
        """A variant that takes the gradient of one tensor of all weights, of which the last expert's matters."""
        return Variant(
            name,
            forward,
            leaves=lambda rows: {"x": rows["x"], "weight": weight},
            tidy=lambda leaf, gradient: gradient[-1] if leaf == "weight" else gradient,
            holds=lambda: [weight, self.offsets],
            products=products,
        )

    def _split(self, name: str, run: Callable[[Tensor, Tensor, Tensor], Tensor], *, compiled: bool = False) -> Variant:
        """A variant that has the trainable expert's weight apart."""
        frozen, trained = self.weight[:-1].clone(), self.weight[-1].clone().requires_grad_()
        return Variant(
            name,
            lambda rows: {"y": run(rows["x"], frozen, trained)},
            leaves=lambda rows: {"x": rows["x"], "weight": trained},
            holds=lambda: [frozen, trained],
            like="loop" if compiled else "",
            compiled=compiled,
        )

    def _loop(self, x: Tensor, frozen: Tensor, trained: Tensor) -> Tensor:
        groups = zip(x.split(self._counts()), (*frozen, trained), strict=True)
        return torch.cat([rows @ weight for rows, weight in groups])

    def _padded(self, name: str) -> Variant:
        counts = torch.tensor(self._counts())
        most, experts = int(counts.max()), self.sizes["E"]
        place = torch.arange(self.sizes["M"]) - torch.tensor(self.bounds[:-1]).repeat_interleave(counts)
        slot = (torch.arange(experts).repeat_interleave(counts) * most + place).to(self.device)
        weight = self.weight.clone().requires_grad_()

        def forward(rows: Tensors) -> Tensors:
            x = rows["x"]
            padded = x.new_zeros(experts * most, x.shape[1]).index_copy(0, slot, x)
            product = torch.bmm(padded.view(experts, most, -1), weight)
            return {"y": product.flatten(0, 1).index_select(0, slot)}

        return self._whole(name, forward, weight)

    def _torch(self, name: str) -> Variant:
        run = getattr(F, "grouped_mm", None)
        if run is None:
            raise Absent(f"torch {torch.__version__} has no torch.nn.functional.grouped_mm")
        weight, ends = self.weight.clone().requires_grad_(), self.offsets[1:].to(torch.int32)

        def forward(rows: Tensors) -> Tensors:
            return {"y": run(rows["x"], weight, offs=ends)}

        try:
            trial = self.draw()
            torch.autograd.grad(forward(trial)["y"], [trial["x"], weight], trial["grad"])
        except RuntimeError as error:
            if is_shortage(error):
                raise
            raise Absent(f"torch's grouped_mm fails here: {str(error).splitlines()[0]}") from error
        return self._all_weights(name, forward, weight)

    def _library(self, name: str) -> Variant:
        run = grouped_mm_rivals.product_of(name, self._counts(), self.device, self.dtype)
        weight = self.weight.clone().requires_grad_()
        return self._all_weights(name, lambda rows: {"y": run(rows["x"], weight)}, weight)

    def _all_weights(self, name: str, forward: Callable[[Tensors], Tensors], weight: Tensor) -> Variant:
        """A variant that cannot leave out the weight gradients of frozen experts, and whose products nobody counts."""
        product = Product(*(self.sizes[letter] for letter in "MKP")).flop
        return self._whole(name, forward, weight, products={"forward": product, "backward": 2 * product})
