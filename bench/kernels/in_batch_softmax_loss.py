"""`in_batch_softmax_loss` of B users with eleven items each, of which ten are targets: M = 10 B queries, C items."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.graph import on_cuda, replayed
from bench.kernels import softmax_loss_rivals
from bench.workload import Product, Tensors, Variant, Work, Workload
from xsmoe_kernels import in_batch_softmax_loss, use_backend
from xsmoe_kernels.runtime import dispatch

PLACES = 11
"""Items of a user; every one but the first is a target."""


class InBatchSoftmaxLoss(Workload):
    """The loss of a training step, with logQ and counts; users reject their own items."""

    operator: ClassVar[str] = "in_batch_softmax_loss"
    letters: ClassVar[Mapping[str, Sequence[int]]] = {"B": (32, 256), "C": (2640, 20000), "d": (128,)}
    cuda_sizes: ClassVar[Mapping[str, Sequence[int]]] = {"B": (256, 1024)}
    quick_sizes: ClassVar[Mapping[str, Sequence[int]]] = {"B": (256,), "C": (2640,)}
    tiny_sizes: ClassVar[Mapping[str, Sequence[int]]] = {"B": (3,), "C": (29,), "d": (16,)}

    def __post_init__(self) -> None:
        super().__post_init__()
        users, items = self.sizes["B"], self.sizes["C"]
        # Every item occurs, as far as there are places; some occur twice.
        surplus = torch.randint(items, (max(0, users * PLACES - items),), generator=self.generator)
        everything = torch.cat([torch.randperm(items, generator=self.generator), surplus])
        places = everything[torch.randperm(len(everything), generator=self.generator)][: users * PLACES]
        logq = torch.randn(items, generator=self.generator).log_softmax(0)
        counts = torch.bincount(places, minlength=items).float()
        self.places = places.view(users, PLACES).to(self.device)
        self.targets = self.places[:, 1:].flatten()
        self.users = torch.arange(users, device=self.device).repeat_interleave(PLACES - 1)
        self.logq, self.counts = logq.to(self.device), counts.to(self.device)

    @property
    def title(self) -> str:
        return f"{len(self.targets)} queries of {self.sizes['B']} users against {self.sizes['C']} items"

    def variants(self) -> tuple[str, ...]:
        names = "published", "eager", "compiled", "ours"
        return *names, *on_cuda(self.device, "ours-graph", "ours-plain"), *softmax_loss_rivals.MODULES

    def optional(self) -> tuple[str, ...]:
        return ("reference", *(() if self.device.type == "cuda" else ("ours-plain",)))

    def baselines(self) -> tuple[str, ...]:
        return "published", "eager"

    def draw(self) -> Tensors:
        items, dim = self.sizes["C"], self.sizes["d"]
        queries = self.normal(len(self.targets), dim, scale=dim**-0.5).requires_grad_()
        return {
            "queries": queries,
            "items": self.normal(items, dim).requires_grad_(),
            "grad": torch.ones((), device=self.device),
        }

    def exact(self, rows: Tensors) -> Tensors:
        wide = {name: rows[name].detach().double().requires_grad_() for name in ("queries", "items")}
        loss = self._loss(wide)
        found = torch.autograd.grad(loss, list(wide.values()), rows["grad"].double())
        return {"y": loss.detach(), **dict(zip(wide, found, strict=True))}

    def reference(self) -> Variant:
        return self._ours("reference", "reference")

    def build(self, name: str) -> Variant:
        if name == "reference":
            return self.reference()
        if name == "ours":
            return self._ours(name, "auto")
        if name == "ours-graph":
            return replayed(self._ours(name, "auto"), self.device)
        if name == "ours-plain":
            plain = self._plain()
            return replace(plain._ours(name, "auto"), solves=plain)
        if name in softmax_loss_rivals.MODULES:
            rival = softmax_loss_rivals.loss_of(name, self.device, self.dtype)
            return Variant(
                name,
                lambda rows: {"y": rival(rows["queries"], rows["items"], self.targets).float()},
                _leaves,
                like="ours-plain",
                solves=self._plain(),
            )
        if name == "published":
            return Variant(name, lambda rows: {"y": self._published(rows["queries"], rows["items"])}, _leaves)
        if name == "eager":
            return Variant(name, lambda rows: {"y": self._eager(rows["queries"], rows["items"])}, _leaves)
        if name == "compiled":
            return self._compiled(name, torch.compile(self._eager, fullgraph=True, dynamic=False))
        raise ValueError(f"in_batch_softmax_loss has no variant {name!r}")

    def work(self) -> Mapping[str, Work]:
        product, _ = self.products()
        read = (product.rows + product.columns) * product.inner * self.dtype.itemsize
        return {"forward": Work(product.flop, read), "backward": Work(2 * product.flop, 2 * read)}

    def products(self) -> Sequence[Product]:
        # The first writes all logits; a kernel that writes none is held to the second.
        return Product(len(self.targets), self.sizes["d"], self.sizes["C"]), Product(1024, 1024, 1024)

    def memory(self, name: str) -> float:
        logits = 4.0 * len(self.targets) * max(self.sizes["C"], self.places.numel())
        return {"published": 8, "eager": 5, "compiled": 5}.get(name, 0) * logits

    def _plain(self) -> "PlainSoftmaxLoss":
        return PlainSoftmaxLoss(self.sizes, self.dtype, self.device, self.seed)

    def _loss(self, rows: Tensors) -> Tensor:
        return in_batch_softmax_loss(
            rows["queries"],
            rows["items"],
            self.targets,
            self.places,
            users=self.users,
            logq=self.logq,
            counts=self.counts,
        )

    def _ours(self, name: str, backend: str) -> Variant:
        def forward(rows: Tensors) -> Tensors:
            with use_backend(backend):
                return {"y": self._loss(rows)}

        native = dispatch.select(self.operator, backend, self.device, self.dtype) == "native"
        flop = self.products()[0].flop
        # Native kernels get the gradients with the loss.
        ahead = {"forward": 3 * flop, "backward": 0.0}
        return Variant(name, forward, _leaves, products=ahead if native else None)

    def _compiled(self, name: str, run: Callable[[Tensor, Tensor], Tensor]) -> Variant:
        return Variant(
            name, lambda rows: {"y": run(rows["queries"], rows["items"])}, _leaves, like="eager", compiled=True
        )

    def _eager(self, queries: Tensor, items: Tensor) -> Tensor:
        """The fastest formulation of whole tensors that was found: one product, two scatters in place."""
        own = (queries * items[self.targets]).float().sum(1) - self.logq[self.targets]
        logits = (queries @ items.T).float() + (self.counts.log() - self.logq)
        logits = logits.scatter_(1, self.places[self.users], -torch.inf)
        return F.cross_entropy(logits.scatter_(1, self.targets[:, None], own[:, None]), self.targets)

    def _published(self, queries: Tensor, items: Tensor) -> Tensor:
        """A column for every place of the batch; a loop over the users masks their own items where the logits lie."""
        users = self.sizes["B"]
        columns = self.places.flatten()
        logits = queries.view(users, PLACES - 1, -1) @ items[columns].T
        logits = logits.float() - self.logq[columns]
        for user in range(users):
            closed = (columns == self.places[user][:, None]).any(0).repeat(PLACES - 1, 1)
            for position in range(PLACES - 1):
                closed[position, user * PLACES + position + 1] = False
            logits[user][closed] = -torch.inf
        own = torch.arange(users * PLACES, device=logits.device).view(users, PLACES)[:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), own.flatten())


class PlainSoftmaxLoss(InBatchSoftmaxLoss):
    """The same queries, items and targets, but every item is a negative, once: what other libraries can do."""

    @property
    def title(self) -> str:
        return f"{super().title} without rejected items, counts and logQ"

    def _loss(self, rows: Tensors) -> Tensor:
        nothing = self.targets.new_empty(len(self.targets), 0)
        return in_batch_softmax_loss(rows["queries"], rows["items"], self.targets, nothing)


def _leaves(rows: Tensors) -> Tensors:
    return {"queries": rows["queries"], "items": rows["items"]}
