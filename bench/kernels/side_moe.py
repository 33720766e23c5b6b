"""`side_moe` as in a training step: two levels of a side network, counters on, all experts but the last one frozen.

With several modalities, each has a ladder of its own, and ours computes a level of all of them at once.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from bench.graph import kept_in_place, on_cuda, replayed_like
from bench.kernels.side_moe_rivals import (
    EagerLevel,
    Ladders,
    Level,
    PublishedLevel,
    Weights,
    by_level,
    by_modality,
    modality_prefix,
)
from bench.workload import Product, Tensors, Variant, Work, Workload, gradients
from xsmoe_kernels import (
    FrozenExperts,
    Utilization,
    side_moe,
    side_moe_group,
    use_backend,
)

LEVELS = 2
BACKENDS = {
    "reference": "reference",
    "ours": "auto",
    "ours-recompute": "auto",
    "ours-triton": "triton",
    "ours-cuda": "cuda",
}
"""Variants that are our operator, and the backend that serves them."""
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
        "M": (1,),
    }
    cuda_sizes: ClassVar[Mapping[str, Sequence[int]]] = {"N": (256, 2816, 65536), "M": (2,)}
    quick_sizes: ClassVar[Mapping[str, Sequence[int]]] = {"N": (2816,), "E": (1, 10)}
    tiny_sizes: ClassVar[Mapping[str, Sequence[int]]] = {"N": (67,), "E": (1, 3), "D": (48,), "R": (8,)}

    def __post_init__(self) -> None:
        super().__post_init__()
        experts, dim, rank = (self.sizes[letter] for letter in "EDR")
        self.modalities = self.sizes.get("M", 1)
        self.weights = [
            [
                Weights(
                    self.normal(experts + 1, dim, scale=dim**-0.5),
                    self.normal(experts, rank, dim, scale=dim**-0.5),
                    self.normal(experts, rank, dim, scale=rank**-0.5),
                )
                for _ in range(LEVELS)
            ]
            for _ in range(self.modalities)
        ]

    @property
    def title(self) -> str:
        experts = self.sizes["E"]
        levels = f"{LEVELS} levels" + (f" of {self.modalities} modalities" if self.modalities > 1 else "")
        return f"{levels} in training, {experts - 1} of {experts} experts frozen, utilization counted"

    def variants(self) -> tuple[str, ...]:
        compiled = "compiled", *on_cuda(self.device, "compiled-graph")
        eager = "eager", *on_cuda(self.device, "eager-graph")
        named = "ours-triton", "ours-triton-graph", "ours-cuda", "ours-cuda-graph"
        ours = "ours", "ours-recompute", *on_cuda(self.device, "ours-graph", *named)
        return *self.baselines(), *compiled, *eager, *ours

    def optional(self) -> tuple[str, ...]:
        return *(() if self.dtype == torch.float32 else ("naive-narrow",)), "compiled-eager", "reference"

    def baselines(self) -> tuple[str, ...]:
        return ("naive",) if self.dtype == torch.float32 else ("naive", "naive-autocast")

    def draw(self) -> Tensors:
        return by_modality([self._rows() for _ in range(self.modalities)])

    def _rows(self) -> Tensors:
        shape = self.sizes["N"], self.sizes["D"]
        hidden = {f"backbone {level}": self.normal(*shape) for level in range(1, LEVELS + 1)}
        return {"x": self.normal(*shape), **hidden, "grad": self.normal(*shape)}

    def exact(self, rows: Tensors) -> Tensors:
        variant = self._ladders("exact", PublishedLevel, torch.float64)
        chunks: dict[str, list[Tensor]] = {}
        total: Tensors = {}
        for chunk in zip(*(t.split(EXACT_ROWS) for t in rows.values()), strict=True):
            taken = dict(zip(rows, (t.double() for t in chunk), strict=True))
            results = variant.forward(taken)
            for name, gradient in gradients(variant, taken, results).items():
                total[name] = total[name] + gradient if name in total else gradient
            for name, y in results.items():
                chunks.setdefault(name, []).append(y.detach())
        tidy = {name: variant.tidy(name, gradient) for name, gradient in total.items()}
        return {name: torch.cat(parts) for name, parts in chunks.items()} | tidy | dict(variant.counters())

    def reference(self) -> Variant:
        return self._ours("reference")

    def build(self, name: str) -> Variant:
        autocast = self.dtype != torch.float32
        if name == "naive":
            return self._ladders(name, PublishedLevel, torch.float32)
        if name == "naive-autocast":
            return self._ladders(name, PublishedLevel, torch.float32, autocast=True)
        if name == "compiled":
            return self._ladders(name, PublishedLevel, torch.float32, autocast=autocast, compiled=True)
        if name == "compiled-graph":
            mode = "reduce-overhead"
            return kept_in_place(
                self._ladders(name, PublishedLevel, torch.float32, autocast=autocast, compiled=True, mode=mode)
            )
        if name == "naive-narrow":
            return self._ladders(name, PublishedLevel, self.dtype)
        if name == "eager":
            return self._ladders(name, EagerLevel, self.dtype)
        if name == "compiled-eager":
            return self._ladders(name, EagerLevel, self.dtype, compiled=True)
        if name in BACKENDS:
            return self._ours(name)
        if (base := name.removesuffix("-graph")) != name and (base == "eager" or base in BACKENDS):
            return replayed_like(self.build, name, self.device)
        raise ValueError(f"side_moe has no variant {name!r}")

    def work(self) -> Mapping[str, Work]:
        rows, experts, dim, rank = (self.sizes[letter] for letter in "NEDR")
        forward, backward = Work(), Work()
        for need_x in [level > 0 for level in range(LEVELS)] * self.modalities:
            forward += floor_forward(rows, experts, dim, rank, self.dtype.itemsize)
            backward += floor_backward(rows, experts, dim, rank, self.dtype.itemsize, trainable=1, need_x=need_x)
        return {"forward": forward, "backward": backward}

    def products(self) -> Sequence[Product]:
        # Of all modalities: one launch may hold them, and a larger product is a faster one.
        rows, dim, hidden = self.sizes["N"] * self.modalities, self.sizes["D"], self.sizes["E"] * self.sizes["R"]
        return Product(rows, dim, hidden), Product(rows, hidden, dim)

    def memory(self, name: str) -> float:
        experts, dim, rank = (self.sizes[letter] for letter in "EDR")
        rows = self.sizes["N"] * self.modalities
        if name.startswith("naive") or name in ("compiled", "compiled-graph"):
            # Every level keeps its stack; on top come its branches, its gated copy, and the gradients of both.
            return (LEVELS + 4) * rows * (experts + 1) * dim * 4.0
        return 4.0 * LEVELS * rows * (2 * experts * rank + 2 * dim) * 4.0

    def kept(self, name: str) -> int | None:
        rows, experts, dim, rank = (self.sizes[letter] for letter in "NEDR")
        # Gates are float32 in every dtype. The first level's rows are an input, the others' the last level's result.
        gates, states = LEVELS * rows * (experts + 1) * 4, (LEVELS - 1) * rows * dim
        if name == "naive":
            stacks = LEVELS * rows * (experts + 1) * dim
            # GELU's input of every expert through which a gradient flows, and its result where a weight takes one.
            hidden = (1 + (LEVELS - 1) * experts + LEVELS) * rows * rank
            return self.modalities * (gates + 4 * (stacks + states + hidden))
        if name not in ("ours", "ours-recompute"):
            return None
        hidden = 0 if name == "ours-recompute" else LEVELS * rows * experts * rank
        return self.modalities * (gates + self.dtype.itemsize * (states + hidden))

    def _ours(self, name: str) -> Variant:
        backend, recompute = BACKENDS[name], name == "ours-recompute"
        self.need(backend, "side_moe", "side_moe_backward")
        ladders = [[_OurLevel(weights, recompute) for weights in levels] for levels in self.weights]
        every = [level for levels in ladders for level in levels]
        prefixes = self._prefixes()

        def forward(rows: Tensors) -> Tensors:
            with use_backend(backend):
                states = [rows[f"{prefix}x"] for prefix in prefixes]
                for place, levels in enumerate(zip(*ladders, strict=True), start=1):
                    backbones = [rows[f"{prefix}backbone {place}"] for prefix in prefixes]
                    states = together(levels, states, backbones)
            return {f"{prefix}y": y for prefix, y in zip(prefixes, states, strict=True)}

        def reset() -> None:
            for level in every:
                level.used.reset()

        rows, experts, dim, rank = (self.sizes[letter] for letter in "NEDR")
        gating, again = Product(rows, dim, experts + 1).flop, Product(rows, dim, experts * rank).flop
        extra = (2 * LEVELS - 1) * gating + LEVELS * again * recompute
        least = self.work()
        return Variant(
            name,
            forward,
            leaves=lambda _: by_modality([by_level(level.leaves() for level in levels) for levels in ladders]),
            counters=lambda: by_modality([by_level(level.used.state_dict() for level in levels) for levels in ladders]),
            reset=reset,
            tidy=lambda _, gradient: gradient.view(-1, dim),
            holds=lambda: [tensor for level in every for tensor in level.holds()],
            # The floor's products, the router's, and recomputation; norms are taken to cost none.
            products={
                "forward": least["forward"].flop + self.modalities * LEVELS * gating,
                "backward": least["backward"].flop + self.modalities * extra,
            },
        )

    def _ladders(
        self,
        name: str,
        kind: type[Level],
        dtype: torch.dtype,
        *,
        autocast: bool = False,
        compiled: bool = False,
        mode: str | None = None,
    ) -> Variant:
        ladders = Ladders(kind, self.weights, dtype)
        run = torch.compile(ladders, fullgraph=True, dynamic=False, mode=mode) if compiled else ladders
        prefixes = self._prefixes()
        inputs = [f"{prefix}{one}" for prefix in prefixes for one in ("x", *_backbones())]

        def context() -> AbstractContextManager[object]:
            return torch.autocast(self.device.type, self.dtype) if autocast else nullcontext()

        def forward(rows: Tensors) -> Tensors:
            with context():
                ys = run(*(rows[one] for one in inputs))
            return {f"{prefix}y": y for prefix, y in zip(prefixes, ys, strict=True)}

        return Variant(
            name,
            forward,
            leaves=lambda _: ladders.leaves(),
            counters=ladders.counters,
            reset=ladders.reset,
            dtype=dtype,
            tidy=ladders.tidy,
            holds=lambda: [*ladders.parameters(), *ladders.buffers()],
            like=("eager" if kind is EagerLevel else self.baselines()[-1]) if compiled else "",
            compiled=compiled,
        )

    def _prefixes(self) -> list[str]:
        return [modality_prefix(place, self.modalities) for place in range(self.modalities)]


def _backbones() -> list[str]:
    return [f"backbone {level}" for level in range(1, LEVELS + 1)]


def together(levels: "Sequence[_OurLevel]", states: Sequence[Tensor], backbones: Sequence[Tensor]) -> list[Tensor]:
    """The next states of all modalities."""
    layers = [level.arguments(x, rows) for level, x, rows in zip(levels, states, backbones, strict=True)]
    return [side_moe(**layers[0])] if len(layers) == 1 else side_moe_group(layers)


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

    def arguments(self, x: Tensor, backbone: Tensor) -> dict[str, Any]:
        """Those of `side_moe`."""
        return {
            "x": x,
            "backbone": backbone,
            "router": self.router,
            "down": self.down,
            "up": self.up,
            "frozen": self.frozen,
            "utilization": self.used,
            "recompute": self.recompute,
        }

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
