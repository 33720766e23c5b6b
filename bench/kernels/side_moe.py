"""`side_moe` as in a training step: two levels of a side network, counters on, all experts but the last one frozen."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import torch
from torch import Tensor

from bench.kernels.side_moe_rivals import EagerLevel, Ladder, Level, PublishedLevel, Weights, by_level
from bench.workload import Product, Tensors, Variant, Work, Workload
from xsmoe_kernels import FrozenExperts, Utilization, side_moe, use_backend

LEVELS = 2
# Rows of the exact result at a time: the formula as it is published makes tensors of (rows, E+1, D) float64.
EXACT_ROWS = 512


class SideMoE(Workload):
    """Level 1 climbs from `x`, which needs no gradient, and level 2 from what level 1 gives."""

    operator: ClassVar[str] = "side_moe"
    letters: ClassVar[Mapping[str, Sequence[int]]] = {
        "N": (256, 2816, 20000),
        "E": (1, 2, 4, 10, 32),
        "D": (768,),
        "R": (64,),
    }
    quick_sizes: ClassVar[Mapping[str, Sequence[int]]] = {"N": (2816,), "E": (1, 10)}
    tiny_sizes: ClassVar[Mapping[str, Sequence[int]]] = {"N": (67,), "E": (1, 3), "D": (48,), "R": (8,)}

    def __post_init__(self) -> None:
        super().__post_init__()
        experts, dim, rank = (self.sizes[letter] for letter in "EDR")
        self.weights = [
            Weights(
                self.normal(experts + 1, dim, scale=dim**-0.5),
                self.normal(experts, rank, dim, scale=dim**-0.5),
                self.normal(experts, rank, dim, scale=rank**-0.5),
            )
            for _ in range(LEVELS)
        ]

    @property
    def title(self) -> str:
        experts = self.sizes["E"]
        return f"{LEVELS} levels in training, {experts - 1} of {experts} experts frozen, utilization counted"

    def variants(self) -> tuple[str, ...]:
        return *self.baselines(), "compiled", "eager", "ours", "ours-recompute"

    def optional(self) -> tuple[str, ...]:
        return "compiled-eager", "reference"

    def baselines(self) -> tuple[str, ...]:
        return ("naive",) if self.dtype == torch.float32 else ("naive", "naive-autocast")

    def draw(self) -> Tensors:
        shape = self.sizes["N"], self.sizes["D"]
        hidden = {f"backbone {level}": self.normal(*shape) for level in range(1, LEVELS + 1)}
        return {"x": self.normal(*shape), **hidden, "grad": self.normal(*shape)}

    def exact(self, rows: Tensors) -> Tensors:
        ladder = Ladder(PublishedLevel, self.weights, torch.float64)
        chunks = []
        for chunk in zip(*(t.split(EXACT_ROWS) for t in rows.values()), strict=True):
            *inputs, grad = (t.double() for t in chunk)
            y = ladder(*inputs)
            y.backward(grad)
            chunks.append(y.detach())
        gradients = {
            name: ladder.tidy(name, leaf.grad) for name, leaf in ladder.leaves().items() if leaf.grad is not None
        }
        return {"y": torch.cat(chunks), **gradients, **ladder.counters()}

    def reference(self) -> Variant:
        return self._ours("reference", recompute=False, backend="reference")

    def build(self, name: str) -> Variant:
        autocast = self.dtype != torch.float32
        if name == "naive":
            return self._ladder(name, PublishedLevel, torch.float32)
        if name == "naive-autocast":
            return self._ladder(name, PublishedLevel, torch.float32, autocast=True)
        if name == "compiled":
            return self._ladder(name, PublishedLevel, torch.float32, autocast=autocast, compiled=True)
        if name == "eager":
            return self._ladder(name, EagerLevel, self.dtype)
        if name == "compiled-eager":
            return self._ladder(name, EagerLevel, self.dtype, compiled=True)
        if name == "ours":
            return self._ours(name, recompute=False, backend="auto")
        if name == "ours-recompute":
            return self._ours(name, recompute=True, backend="auto")
        if name == "reference":
            return self.reference()
        raise ValueError(f"side_moe has no variant {name!r}")

    def work(self) -> Mapping[str, Work]:
        rows, experts, dim, rank = (self.sizes[letter] for letter in "NEDR")
        forward, backward = Work(), Work()
        for level in range(LEVELS):
            need_x = level > 0
            forward += floor_forward(rows, experts, dim, rank, self.dtype.itemsize)
            backward += floor_backward(rows, experts, dim, rank, self.dtype.itemsize, trainable=1, need_x=need_x)
        return {"forward": forward, "backward": backward}

    def products(self) -> Sequence[Product]:
        rows, dim, hidden = self.sizes["N"], self.sizes["D"], self.sizes["E"] * self.sizes["R"]
        return Product(rows, dim, hidden), Product(rows, hidden, dim)

    def memory(self, name: str) -> float:
        rows, experts, dim, rank = (self.sizes[letter] for letter in "NEDR")
        if name in ("naive", "naive-autocast", "compiled"):
            # Every level keeps its stack; on top come its branches, its gated copy, and the gradients of both.
            return (LEVELS + 4) * rows * (experts + 1) * dim * 4.0
        return 4.0 * LEVELS * rows * (2 * experts * rank + 2 * dim) * 4.0

    def _ours(self, name: str, *, recompute: bool, backend: str) -> Variant:
        levels = [_OurLevel(weights, recompute) for weights in self.weights]

        def forward(rows: Tensors) -> Tensors:
            with use_backend(backend):
                x = rows["x"]
                for place, level in enumerate(levels, start=1):
                    x = level(x, rows[f"backbone {place}"])
            return {"y": x}

        def reset() -> None:
            for level in levels:
                level.used.reset()

        rows, experts, dim, rank = (self.sizes[letter] for letter in "NEDR")
        gating, again = Product(rows, dim, experts + 1).flop, Product(rows, dim, experts * rank).flop
        least = self.work()
        return Variant(
            name,
            forward,
            leaves=lambda _: by_level(level.leaves() for level in levels),
            counters=lambda: by_level(level.used.state_dict() for level in levels),
            reset=reset,
            tidy=lambda _, gradient: gradient.view(-1, dim),
            holds=lambda: [tensor for level in levels for tensor in level.holds()],
            # The floor's products, the router's, and recomputation; norms are taken to cost none.
            products={
                "forward": least["forward"].flop + LEVELS * gating,
                "backward": least["backward"].flop + (2 * LEVELS - 1) * gating + LEVELS * again * recompute,
            },
        )

    def _ladder(
        self, name: str, kind: type[Level], dtype: torch.dtype, *, autocast: bool = False, compiled: bool = False
    ) -> Variant:
        ladder = Ladder(kind, self.weights, dtype)
        run = torch.compile(ladder, fullgraph=True, dynamic=False) if compiled else ladder

        def context() -> AbstractContextManager[object]:
            return torch.autocast(self.device.type, self.dtype) if autocast else nullcontext()

        def forward(rows: Tensors) -> Tensors:
            with context():
                return {"y": run(rows["x"], *(rows[f"backbone {level}"] for level in range(1, LEVELS + 1)))}

        return Variant(
            name,
            forward,
            leaves=lambda _: ladder.leaves(),
            counters=ladder.counters,
            reset=ladder.reset,
            dtype=dtype,
            tidy=ladder.tidy,
            holds=lambda: [*ladder.parameters(), *ladder.buffers()],
            like=("eager" if kind is EagerLevel else self.baselines()[-1]) if compiled else "",
            compiled=compiled,
        )


class _OurLevel:
    """A level as `side_moe` takes it: frozen experts apart, one trainable."""

    def __init__(self, weights: Weights, recompute: bool) -> None:
        self.router, self.down, self.up = (
            t.detach().clone().requires_grad_() for t in (weights.router, weights.down[-1:], weights.up[-1:])
        )
        frozen_down, frozen_up = weights.down[:-1], weights.up[:-1]
        self.frozen = FrozenExperts(frozen_down.clone(), frozen_up.clone()) if len(frozen_down) else None
        self.used = Utilization(len(weights.down), device=weights.router.device)
        self.recompute = recompute

    def __call__(self, x: Tensor, backbone: Tensor) -> Tensor:
        return side_moe(
            x,
            backbone,
            self.router,
            self.down,
            self.up,
            frozen=self.frozen,
            utilization=self.used,
            recompute=self.recompute,
        )

    def leaves(self) -> Tensors:
        return {"router": self.router, "down": self.down, "up": self.up}

    def holds(self) -> list[Tensor]:
        # With what is derived from frozen weights once, their packs for native kernels.
        frozen = [] if self.frozen is None else [self.frozen.down, self.frozen.up, self.frozen.pack()]
        return [*self.leaves().values(), *(tensor for tensor in frozen if tensor is not None)]


def floor_forward(rows: int, experts: int, dim: int, rank: int, itemsize: int) -> Work:
    """The least of one level's forward: two products; x and the backbone read, y written."""
    return Work(4.0 * rows * experts * rank * dim, 3.0 * rows * dim * itemsize)


def floor_backward(
    rows: int, experts: int, dim: int, rank: int, itemsize: int, *, trainable: int, need_x: bool
) -> Work:
    """The least of one level's backward, without recomputation: go up^T for the gates, dx where it is needed, and two
    products for the weights of each trainable expert; the gradient, x and the backbone read, dx written."""
    product = 2.0 * rows * experts * rank * dim
    flop = product + need_x * product + 4.0 * rows * rank * dim * trainable
    return Work(flop, (3.0 + need_x) * rows * dim * itemsize)
