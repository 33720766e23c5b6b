"""`route_topk`: logits of N rows, k of E experts chosen for each, and the choices sorted by expert."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from bench.graph import on_cuda, replayed_like
from bench.workload import Tensors, Variant, Work, Workload
from xsmoe_kernels import route_topk, use_backend

BACKENDS = {"reference": "reference", "ours": "auto", "ours-triton": "triton", "ours-cuda": "cuda"}
"""Variants that are our operator, and the backend that serves them."""
_INDEX_BYTES = 8


class RouteTopk(Workload):
    """Forward gives gates, experts, order and offsets; backward the gradient of the logits."""

    operator: ClassVar[str] = "route_topk"
    letters: ClassVar[Mapping[str, Sequence[int]]] = {"N": (256, 2816, 65536), "E": (10, 64), "k": (2,)}
    quick_sizes: ClassVar[Mapping[str, Sequence[int]]] = {"N": (2816,)}
    tiny_sizes: ClassVar[Mapping[str, Sequence[int]]] = {"N": (67,), "E": (5,)}

    @property
    def title(self) -> str:
        return f"the best {self.sizes['k']} of {self.sizes['E']} experts for each row, sorted by expert"

    def variants(self) -> tuple[str, ...]:
        named = "ours-triton", "ours-triton-graph", "ours-cuda", "ours-cuda-graph"
        ours = "ours", *on_cuda(self.device, "ours-graph", *named)
        return *self.baselines(), "compiled", *ours

    def baselines(self) -> tuple[str, ...]:
        return "eager", *on_cuda(self.device, "eager-graph")

    def optional(self) -> tuple[str, ...]:
        return ("reference",)

    def draw(self) -> Tensors:
        rows, experts, chosen = (self.sizes[letter] for letter in "NEk")
        # Every row has the same numbers in another order: rivals break ties as they like, so there are none.
        grid = torch.linspace(-2, 2, experts, dtype=torch.float64)
        logits = grid[torch.rand(rows, experts, generator=self.generator).argsort(dim=1)]
        logits = logits.to(self.device, self.dtype).requires_grad_()
        return {"logits": logits, "grad": self.normal(rows, chosen)}

    def exact(self, rows: Tensors) -> Tensors:
        logits = rows["logits"].detach().double().requires_grad_()
        results = _eager(logits, self.sizes["k"])
        (gradient,) = torch.autograd.grad(results["y"], logits, rows["grad"].double())
        return results | {"logits": gradient}

    def reference(self) -> Variant:
        return self._ours("reference")

    def build(self, name: str) -> Variant:
        if name in BACKENDS:
            return self._ours(name)
        if (base := name.removesuffix("-graph")) != name and (base == "eager" or base in BACKENDS):
            return replayed_like(self.build, name, self.device)
        chosen = self.sizes["k"]
        if name == "eager":
            return Variant(name, lambda rows: _eager(rows["logits"], chosen), _leaves)
        if name == "compiled":
            run = torch.compile(_eager, fullgraph=True, dynamic=False)
            return Variant(name, lambda rows: run(rows["logits"], chosen), _leaves, compiled=True)
        raise ValueError(f"route_topk has no variant {name!r}")

    def work(self) -> Mapping[str, Work]:
        rows, experts, chosen = (self.sizes[letter] for letter in "NEk")
        logits, gates = rows * experts * self.dtype.itemsize, rows * chosen * self.dtype.itemsize
        indices = (2 * rows * chosen + experts + 1) * _INDEX_BYTES
        return {
            "forward": Work(bytes=logits + gates + indices),
            "backward": Work(bytes=gates + rows * chosen * _INDEX_BYTES + 2 * logits),
        }

    def _ours(self, name: str) -> Variant:
        backend = BACKENDS[name]
        self.need(backend, "route_topk", "route_topk_backward")

        def forward(rows: Tensors) -> Tensors:
            with use_backend(backend):
                gates, experts, order, offsets = route_topk(rows["logits"], self.sizes["k"])
            return {"y": gates, "experts": experts, "order": order, "offsets": offsets}

        return Variant(name, forward, _leaves)


def _leaves(rows: Tensors) -> Tensors:
    return {"logits": rows["logits"]}


def _eager(logits: Tensor, chosen: int) -> Tensors:
    wide = logits.float() if logits.itemsize == 2 else logits
    top = wide.topk(chosen, dim=1)
    # Dividing the chosen gates by their sum is a softmax over the chosen logits.
    gates = top.values.softmax(dim=1).to(logits.dtype)
    in_order = top.indices.flatten().sort(stable=True)
    offsets = (_offsets_by_search if logits.is_cuda else _offsets_by_count)(in_order.values, logits.shape[1])
    return {"y": gates, "experts": top.indices, "order": in_order.indices, "offsets": offsets}


def _offsets_by_count(experts: Tensor, every: int) -> Tensor:
    counts = torch.bincount(experts, minlength=every)
    return torch.cat((counts.new_zeros(1), counts.cumsum(0)))


def _offsets_by_search(experts: Tensor, every: int) -> Tensor:
    """The same of sorted experts, for a GPU, where `torch.bincount` has the host wait for the largest of them."""
    return torch.searchsorted(experts, torch.arange(every + 1, device=experts.device))
