"""`in_batch_softmax_loss` of B users with eleven items each, of which ten are targets: M = 10 B queries, C items."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.core.baselines import load_library, try_library
from bench.core.benchmark import Benchmark, Implementation, Product, Tensors, Variant, Work
from bench.core.cuda_graphs import our_variants
from bench.core.results import Role
from xsmoe_kernels import in_batch_softmax_loss, use_backend
from xsmoe_kernels.runtime import dispatch

PLACES = 11
"""Items of a user. Every item but the first is a target."""
LIBRARIES = {"cut-cross-entropy": "cut_cross_entropy", "liger": "liger_kernel.transformers"}
"""Libraries with the loss of a linear layer without its logits, and the module of each.

They solve an easier problem: they support neither rejected items nor counts, and they are measured without logQ.
"""
Loss = Callable[[Tensor, Tensor], Tensor]


class InBatchSoftmaxLoss(Benchmark):
    """The loss of a training step, with logQ and counts. Users reject their own items."""

    operator: ClassVar[str] = "in_batch_softmax_loss"
    default_sizes: ClassVar[Mapping[str, Sequence[int]]] = {"B": (32, 256), "C": (2640, 20000), "d": (128,)}
    cuda_sizes: ClassVar[Mapping[str, Sequence[int]]] = {"B": (256, 1024)}
    quick_sizes: ClassVar[Mapping[str, Sequence[int]]] = {"B": (256,), "C": (2640,)}
    tiny_sizes: ClassVar[Mapping[str, Sequence[int]]] = {"B": (3,), "C": (29,), "d": (16,)}

    def __post_init__(self) -> None:
        super().__post_init__()
        users, items = self.sizes["B"], self.sizes["C"]
        # Every item occurs, as far as there are places. Some occur twice.
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

    def variants(self) -> list[Variant]:
        logits = 4.0 * len(self.targets) * max(self.sizes["C"], self.places.numel())

        def compiled() -> Implementation:
            return _implementation(torch.compile(self._eager, fullgraph=True, dynamic=False))

        found = [
            Variant("published", Role.PAPER, lambda: _implementation(self._published), baseline=True,
                    peak_estimate=8 * logits),
            Variant("eager", Role.EAGER, lambda: _implementation(self._eager), baseline=True,
                    peak_estimate=5 * logits),
            Variant("compiled", Role.COMPILED, compiled, compiled=True, flop_like="eager", peak_estimate=5 * logits),
            *our_variants(self, self._ours),
            Variant("ours-plain", Role.OURS, self._ours_plain, default=self.on_cuda),
        ]  # fmt: skip
        for name in LIBRARIES:
            found.append(Variant(name, Role.LIBRARY, partial(self._library, name), flop_like="ours-plain"))
        return [*found, Variant("reference", Role.REFERENCE, self.reference, default=False)]

    def make_inputs(self) -> Tensors:
        items, dim = self.sizes["C"], self.sizes["d"]
        queries = self.normal(len(self.targets), dim, scale=dim**-0.5).requires_grad_()
        return {
            "queries": queries,
            "items": self.normal(items, dim).requires_grad_(),
            "grad": torch.ones((), device=self.device),
        }

    def exact(self, inputs: Tensors) -> Tensors:
        wide = {name: inputs[name].detach().double().requires_grad_() for name in ("queries", "items")}
        loss = self._loss(*wide.values())
        found = torch.autograd.grad(loss, list(wide.values()), inputs["grad"].double())
        return {"y": loss.detach(), **dict(zip(wide, found, strict=True))}

    def reference(self) -> Implementation:
        return self._ours("reference")

    def work(self) -> Mapping[str, Work]:
        product, _ = self.products()
        read = (product.rows + product.columns) * product.inner * self.dtype.itemsize
        return {"forward": Work(product.flop, read), "backward": Work(2 * product.flop, 2 * read)}

    def products(self) -> Sequence[Product]:
        # The first one writes all logits. A kernel that writes none is compared with the second one.
        return Product(len(self.targets), self.sizes["d"], self.sizes["C"]), Product(1024, 1024, 1024)

    def _plain(self) -> "PlainSoftmaxLoss":
        return PlainSoftmaxLoss(self.sizes, self.dtype, self.device, self.seed)

    def _loss(self, queries: Tensor, items: Tensor) -> Tensor:
        return in_batch_softmax_loss(
            queries, items, self.targets, self.places, users=self.users, logq=self.logq, counts=self.counts
        )

    def _ours(self, backend: str, solves: Benchmark | None = None) -> Implementation:
        def loss(queries: Tensor, items: Tensor) -> Tensor:
            with use_backend(backend):
                return self._loss(queries, items)

        native = dispatch.select(self.operator, backend, self.device, self.dtype) == "native"
        # Native kernels compute the gradients together with the loss.
        flop = {"forward": 3 * self.products()[0].flop, "backward": 0.0} if native else None
        return _implementation(loss, flop, solves)

    def _ours_plain(self) -> Implementation:
        plain = self._plain()
        return plain._ours("auto", solves=plain)

    def _library(self, name: str) -> Implementation:
        """Return a library's loss with its default options.

        Raises:
            Absent: it is not installed, or does not run here.
        """
        module = load_library(name, LIBRARIES[name], self.device)

        liger = module.LigerFusedLinearCrossEntropyLoss() if name == "liger" else None

        def loss(queries: Tensor, items: Tensor, targets: Tensor) -> Tensor:
            run = module.linear_cross_entropy if liger is None else liger
            found: Tensor = run(queries, items, targets) if liger is None else run(items, queries, targets)
            return found

        def trial() -> None:
            queries, items = (
                torch.zeros(rows, 32, device=self.device, dtype=self.dtype, requires_grad=True) for rows in (16, 64)
            )
            loss(queries, items, torch.zeros(16, device=self.device, dtype=torch.int64)).backward()

        try_library(name, trial)
        return _implementation(lambda queries, items: loss(queries, items, self.targets).float(), solves=self._plain())

    def _eager(self, queries: Tensor, items: Tensor) -> Tensor:
        """The fastest formulation in whole tensors that we found: one product, two in-place scatters."""
        own = (queries * items[self.targets]).float().sum(1) - self.logq[self.targets]
        logits = (queries @ items.T).float() + (self.counts.log() - self.logq)
        logits = logits.scatter_(1, self.places[self.users], -torch.inf)
        return F.cross_entropy(logits.scatter_(1, self.targets[:, None], own[:, None]), self.targets)

    def _published(self, queries: Tensor, items: Tensor) -> Tensor:
        """A column for every place of the batch. A loop over the users masks their own items in the logits."""
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
    """The problem that libraries solve: the same queries, items and targets, but every item is one negative."""

    @property
    def title(self) -> str:
        return f"{super().title} without rejected items, counts and logQ"

    def _loss(self, queries: Tensor, items: Tensor) -> Tensor:
        nothing = self.targets.new_empty(len(self.targets), 0)
        return in_batch_softmax_loss(queries, items, self.targets, nothing)


def _implementation(
    loss: Loss, flop: Mapping[str, float] | None = None, solves: Benchmark | None = None
) -> Implementation:
    return Implementation(
        lambda inputs: {"y": loss(inputs["queries"], inputs["items"])},
        leaves=lambda inputs: {name: inputs[name] for name in ("queries", "items")},
        flop=flop,
        solves=solves,
    )
