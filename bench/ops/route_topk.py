"""`route_topk`: logits of N rows, k of E experts chosen for each row, and the choices sorted by expert."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from bench.core.benchmark import Benchmark, Implementation, Tensors, Variant, Work
from bench.core.cuda_graphs import our_variants, with_graph
from bench.core.results import Role
from xsmoe_kernels import route_topk, use_backend

_INDEX_BYTES = 8


class RouteTopk(Benchmark):
    """Forward returns gates, experts, order and offsets; backward returns the gradient of the logits."""

    operator: ClassVar[str] = "route_topk"
    default_sizes: ClassVar[Mapping[str, Sequence[int]]] = {"N": (256, 2816, 65536), "E": (10, 64), "k": (2,)}
    quick_sizes: ClassVar[Mapping[str, Sequence[int]]] = {"N": (2816,)}
    tiny_sizes: ClassVar[Mapping[str, Sequence[int]]] = {"N": (67,), "E": (5,)}

    @property
    def title(self) -> str:
        return f"the best {self.sizes['k']} of {self.sizes['E']} experts for each row, sorted by expert"

    def variants(self) -> list[Variant]:
        chosen = self.sizes["k"]

        def compiled() -> Implementation:
            run = torch.compile(_eager, fullgraph=True, dynamic=False)
            return Implementation(lambda inputs: run(inputs["logits"], chosen), _leaves)

        def eager() -> Implementation:
            return Implementation(lambda inputs: _eager(inputs["logits"], chosen), _leaves)

        plain = Variant("eager", Role.EAGER, eager, baseline=True)
        found = [plain, *([with_graph(plain, self.device, baseline=True)] if self.on_cuda else [])]
        found.append(Variant("compiled", Role.COMPILED, compiled, compiled=True))
        found += our_variants(self, self._ours, ("triton", "cuda"))
        return [*found, Variant("reference", Role.REFERENCE, self.reference, default=False)]

    def make_inputs(self) -> Tensors:
        rows, experts, chosen = (self.sizes[letter] for letter in "NEk")
        # Every row has the same numbers in another order. Baselines break ties differently, so there are none.
        grid = torch.linspace(-2, 2, experts, dtype=torch.float64)
        logits = grid[torch.rand(rows, experts, generator=self.generator).argsort(dim=1)]
        logits = logits.to(self.device, self.dtype).requires_grad_()
        return {"logits": logits, "grad": self.normal(rows, chosen)}

    def exact(self, inputs: Tensors) -> Tensors:
        logits = inputs["logits"].detach().double().requires_grad_()
        results = _eager(logits, self.sizes["k"])
        (gradient,) = torch.autograd.grad(results["y"], logits, inputs["grad"].double())
        return results | {"logits": gradient}

    def reference(self) -> Implementation:
        return self._ours("reference")

    def work(self) -> Mapping[str, Work]:
        rows, experts, chosen = (self.sizes[letter] for letter in "NEk")
        logits, gates = rows * experts * self.dtype.itemsize, rows * chosen * self.dtype.itemsize
        indices = (2 * rows * chosen + experts + 1) * _INDEX_BYTES
        return {
            "forward": Work(bytes=logits + gates + indices),
            "backward": Work(bytes=gates + rows * chosen * _INDEX_BYTES + 2 * logits),
        }

    def _ours(self, backend: str) -> Implementation:
        self.require(backend, "route_topk", "route_topk_backward")

        def forward(inputs: Tensors) -> Tensors:
            with use_backend(backend):
                gates, experts, order, offsets = route_topk(inputs["logits"], self.sizes["k"])
            return {"y": gates, "experts": experts, "order": order, "offsets": offsets}

        return Implementation(forward, _leaves)


def _leaves(inputs: Tensors) -> Tensors:
    return {"logits": inputs["logits"]}


def _eager(logits: Tensor, chosen: int) -> Tensors:
    wide = logits.float() if logits.itemsize == 2 else logits
    top = wide.topk(chosen, dim=1)
    # Dividing the chosen gates by their sum equals a softmax over the chosen logits.
    gates = top.values.softmax(dim=1).to(logits.dtype)
    in_order = top.indices.flatten().sort(stable=True)
    offsets = (_offsets_by_search if logits.is_cuda else _offsets_by_count)(in_order.values, logits.shape[1])
    return {"y": gates, "experts": top.indices, "order": in_order.indices, "offsets": offsets}


def _offsets_by_count(experts: Tensor, num_experts: int) -> Tensor:
    counts = torch.bincount(experts, minlength=num_experts)
    return torch.cat((counts.new_zeros(1), counts.cumsum(0)))


def _offsets_by_search(experts: Tensor, num_experts: int) -> Tensor:
    """Return the offsets of sorted experts without `torch.bincount`, which synchronizes the host with a GPU."""
    return torch.searchsorted(experts, torch.arange(num_experts + 1, device=experts.device))
