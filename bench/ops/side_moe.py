"""`side_moe` as in a training step: two levels of a side network, counters on, all experts but the last one frozen.

With several modalities, each has its own side network, and our operator computes a level of all of them in one call.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.core.benchmark import Benchmark, Implementation, Product, Tensors, Variant, Work, gradients
from bench.core.cuda_graphs import at_fixed_addresses, our_variants, with_graph
from bench.core.results import Role
from xsmoe_kernels import FrozenExperts, Utilization, side_moe, side_moe_group, use_backend

T = TypeVar("T")

LEVELS = 2
# Rows of the exact result per chunk. The published formula creates tensors of (rows, E+1, D) in float64.
EXACT_ROWS = 512


class Weights(NamedTuple):
    """The weights of a level. The last expert is trainable, the others are frozen."""

    router: Tensor  # (E+1, D)
    down: Tensor  # (E, R, D)
    up: Tensor  # (E, R, D)


class SideMoE(Benchmark):
    """Level 1 computes from `x`, which needs no gradient, and level 2 from the output of level 1."""

    operator: ClassVar[str] = "side_moe"
    default_sizes: ClassVar[Mapping[str, Sequence[int]]] = {
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
        self.prefixes = [f"modality {place} " for place in range(1, self.modalities + 1)]
        if self.modalities == 1:
            self.prefixes = [""]
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

    def variants(self) -> list[Variant]:
        narrow = self.dtype != torch.float32
        last_paper = "naive-autocast" if narrow else "naive"
        rows, experts, dim, rank = (self.sizes[letter] for letter in "NEDR")
        # The published formulation saves a stack per level. Its branches, gated copy and their gradients come on top.
        stacks = 4.0 * (LEVELS + 4) * self.modalities * rows * (experts + 1) * dim
        lean = 16.0 * LEVELS * self.modalities * rows * (2 * experts * rank + 2 * dim)

        def stacked(name: str, role: Role, *, autocast: bool = False, mode: str | None = None, **more: Any) -> Variant:
            compiled = role == Role.COMPILED

            def build() -> Implementation:
                return self._networks(PublishedLevel, torch.float32, autocast=autocast, compiled=compiled, mode=mode)

            declared: dict[str, Any] = {"dtype": torch.float32, "compiled": compiled, "peak_estimate": stacks}
            return Variant(name, role, build, **declared | more)

        found = [stacked("naive", Role.PAPER, baseline=True, expected_saved_bytes=self._saved_by_paper())]
        if narrow:
            found.append(stacked("naive-autocast", Role.PAPER, autocast=True, baseline=True))
        found.append(stacked("compiled", Role.COMPILED, autocast=narrow, flop_like=last_paper))
        on_gpu = {"cuda_graph": self.on_cuda, "default": self.on_cuda, "flop_like": last_paper}
        found.append(stacked("compiled-graph", Role.COMPILED, autocast=narrow, mode="reduce-overhead", **on_gpu))
        eager = Variant("eager", Role.EAGER, lambda: self._networks(EagerLevel, self.dtype), peak_estimate=lean)
        found += [eager, *([with_graph(eager, self.device)] if self.on_cuda else [])]
        found += our_variants(
            self, self._ours, ("triton", "cuda"), peak_estimate=lean, expected_saved_bytes=self._saved_by_ours(False)
        )
        recompute = partial(self._ours, "auto", recompute=True)
        saved = self._saved_by_ours(True)
        found.append(Variant("ours-recompute", Role.OURS, recompute, peak_estimate=lean, expected_saved_bytes=saved))
        if narrow:
            build = partial(self._networks, PublishedLevel, self.dtype)
            found.append(Variant("naive-narrow", Role.PAPER, build, default=False, peak_estimate=stacks))
        build = partial(self._networks, EagerLevel, self.dtype, compiled=True)
        found.append(
            replace(eager, name="compiled-eager", role=Role.COMPILED, build=build, compiled=True, default=False,
                    flop_like="eager"),
        )  # fmt: skip
        found.append(Variant("reference", Role.REFERENCE, self.reference, default=False, peak_estimate=lean))
        return found

    def make_inputs(self) -> Tensors:
        shape = self.sizes["N"], self.sizes["D"]
        found: Tensors = {}
        for prefix in self.prefixes:
            hidden = {f"{prefix}backbone {level}": self.normal(*shape) for level in range(1, LEVELS + 1)}
            found |= {f"{prefix}x": self.normal(*shape), **hidden, f"{prefix}grad": self.normal(*shape)}
        return found

    def exact(self, inputs: Tensors) -> Tensors:
        paper = self._networks(PublishedLevel, torch.float64)
        chunks: dict[str, list[Tensor]] = {}
        total: Tensors = {}
        for chunk in zip(*(t.split(EXACT_ROWS) for t in inputs.values()), strict=True):
            mine = dict(zip(inputs, (t.double() for t in chunk), strict=True))
            results = paper.forward(mine)
            for name, gradient in gradients(paper, mine, results).items():
                total[name] = total[name] + gradient if name in total else gradient
            for name, y in results.items():
                chunks.setdefault(name, []).append(y.detach())
        found = {name: torch.cat(parts) for name, parts in chunks.items()}
        return found | {name: paper.normalize(name, gradient) for name, gradient in total.items()} | paper.counters()

    def reference(self) -> Implementation:
        return self._ours("reference")

    def work(self) -> Mapping[str, Work]:
        rows, experts, dim, rank = (self.sizes[letter] for letter in "NEDR")
        forward, backward = Work(), Work()
        for need_x in [level > 0 for level in range(LEVELS)] * self.modalities:
            forward += level_forward(rows, experts, dim, rank, self.dtype.itemsize)
            backward += level_backward(rows, experts, dim, rank, self.dtype.itemsize, trainable=1, need_x=need_x)
        return {"forward": forward, "backward": backward}

    def products(self) -> Sequence[Product]:
        # Of all modalities: one launch may hold them, and a larger product is a faster one.
        rows, dim, hidden = self.sizes["N"] * self.modalities, self.sizes["D"], self.sizes["E"] * self.sizes["R"]
        return Product(rows, dim, hidden), Product(rows, hidden, dim)

    def _saved_by_paper(self) -> int:
        rows, experts, dim, rank = (self.sizes[letter] for letter in "NEDR")
        stacks = LEVELS * rows * (experts + 1) * dim
        # GELU's input of every expert through which a gradient flows, and its output if a weight needs a gradient.
        hidden = (1 + (LEVELS - 1) * experts + LEVELS) * rows * rank
        return self.modalities * (self._saved_gates() + 4 * (stacks + (LEVELS - 1) * rows * dim + hidden))

    def _saved_by_ours(self, recompute: bool) -> int:
        rows, experts, dim, rank = (self.sizes[letter] for letter in "NEDR")
        # The first level's x is an input, the others' x is the output of the level below.
        states, hidden = (LEVELS - 1) * rows * dim, 0 if recompute else LEVELS * rows * experts * rank
        return self.modalities * (self._saved_gates() + self.dtype.itemsize * (states + hidden))

    def _saved_gates(self) -> int:
        # Gates are float32 in every dtype.
        return LEVELS * self.sizes["N"] * (self.sizes["E"] + 1) * 4

    def _ours(self, backend: str, *, recompute: bool = False) -> Implementation:
        self.require(backend, "side_moe", "side_moe_backward")
        networks = [[_OurLevel(weights, recompute) for weights in levels] for levels in self.weights]
        every = [level for levels in networks for level in levels]

        def forward(inputs: Tensors) -> Tensors:
            with use_backend(backend):
                states = [inputs[f"{prefix}x"] for prefix in self.prefixes]
                for place, levels in enumerate(zip(*networks, strict=True), start=1):
                    backbones = [inputs[f"{prefix}backbone {place}"] for prefix in self.prefixes]
                    states = one_level(levels, states, backbones)
            return {f"{prefix}y": y for prefix, y in zip(self.prefixes, states, strict=True)}

        def reset() -> None:
            for level in every:
                level.used.reset()

        rows, experts, dim, rank = (self.sizes[letter] for letter in "NEDR")
        gating, again = Product(rows, dim, experts + 1).flop, Product(rows, dim, experts * rank).flop
        extra = (2 * LEVELS - 1) * gating + LEVELS * again * recompute
        least = self.work()
        return Implementation(
            forward,
            leaves=lambda _: self._named(networks, lambda level: level.leaves()),
            counters=lambda: self._named(networks, lambda level: level.used.state_dict()),
            reset=reset,
            normalize=lambda _, gradient: gradient.view(-1, dim),
            owned=lambda: [tensor for level in every for tensor in level.owned()],
            # The bound's products, the router's, and recomputation. The products of norms are counted as zero.
            flop={
                "forward": least["forward"].flop + self.modalities * LEVELS * gating,
                "backward": least["backward"].flop + self.modalities * extra,
            },
        )

    def _networks(
        self,
        kind: "type[Level]",
        dtype: torch.dtype,
        *,
        autocast: bool = False,
        compiled: bool = False,
        mode: str | None = None,
    ) -> Implementation:
        """Return side networks of plain PyTorch, one for each modality."""
        networks = SideNetworks(kind, self.weights, dtype)
        run = torch.compile(networks, fullgraph=True, dynamic=False, mode=mode) if compiled else networks
        backbones = [f"backbone {level}" for level in range(1, LEVELS + 1)]
        order = [f"{prefix}{one}" for prefix in self.prefixes for one in ("x", *backbones)]
        every = [level for levels in networks.levels() for level in levels]

        def forward(inputs: Tensors) -> Tensors:
            with torch.autocast(self.device.type, self.dtype) if autocast else nullcontext():
                ys = run(*(inputs[one] for one in order))
            return {f"{prefix}y": y for prefix, y in zip(self.prefixes, ys, strict=True)}

        def reset() -> None:
            for level in every:
                level.norm.zero_()
                level.gate.zero_()

        found = Implementation(
            forward,
            leaves=lambda _: self._named(networks.levels(), lambda level: level.leaves()),
            counters=lambda: self._named(
                networks.levels(), lambda level: {"norm": level.norm.clone(), "gate": level.gate.clone()}
            ),
            reset=reset,
            # `nn.Linear` stores the up projection as (D, R).
            normalize=lambda name, gradient: (
                gradient.T if kind is PublishedLevel and name.endswith(" up") else gradient
            ),
            owned=lambda: [*networks.parameters(), *networks.buffers()],
        )
        return at_fixed_addresses(found) if mode == "reduce-overhead" else found

    def _named(self, networks: Sequence[Sequence[T]], tensors: Callable[[T], Tensors]) -> Tensors:
        """Return the tensors of all levels, named as in "modality 2 level 1 router"."""
        return {
            f"{prefix}level {place} {name}": tensor
            for prefix, levels in zip(self.prefixes, networks, strict=True)
            for place, level in enumerate(levels, start=1)
            for name, tensor in tensors(level).items()
        }


def one_level(levels: "Sequence[_OurLevel]", states: Sequence[Tensor], backbones: Sequence[Tensor]) -> list[Tensor]:
    """Return the next states of all modalities."""
    layers = [level.arguments(x, rows) for level, x, rows in zip(levels, states, backbones, strict=True)]
    return [side_moe(**layers[0])] if len(layers) == 1 else side_moe_group(layers)


class _OurLevel:
    """The tensors of a level as `side_moe` expects them: frozen experts in one object, one trainable expert."""

    def __init__(self, weights: Weights, recompute: bool) -> None:
        self.router, self.down, self.up = (
            t.detach().clone().requires_grad_() for t in (weights.router, weights.down[-1:], weights.up[-1:])
        )
        frozen_down, frozen_up = weights.down[:-1], weights.up[:-1]
        self.frozen = FrozenExperts(frozen_down.clone(), frozen_up.clone()) if len(frozen_down) else None
        self.used = Utilization(len(weights.down), device=weights.router.device)
        self.recompute = recompute

    def arguments(self, x: Tensor, backbone: Tensor) -> dict[str, Any]:
        """Return the arguments of `side_moe`."""
        return {
            "x": x,
            "backbone": backbone,
            **self.leaves(),
            "frozen": self.frozen,
            "utilization": self.used,
            "recompute": self.recompute,
        }

    def leaves(self) -> Tensors:
        return {"router": self.router, "down": self.down, "up": self.up}

    def owned(self) -> list[Tensor]:
        # The prepacked weights of frozen experts are computed once.
        frozen = [] if self.frozen is None else [self.frozen.down, self.frozen.up, self.frozen.pack()]
        return [*self.leaves().values(), *(tensor for tensor in frozen if tensor is not None)]


def level_forward(rows: int, experts: int, dim: int, rank: int, itemsize: int) -> Work:
    """Return the least work of one level's forward: two products; x and the backbone read, y written."""
    return Work(4.0 * rows * experts * rank * dim, 3.0 * rows * dim * itemsize)


def level_backward(
    rows: int, experts: int, dim: int, rank: int, itemsize: int, *, trainable: int, need_x: bool
) -> Work:
    """Return the least work of one level's backward, without recomputation.

    Products: go up^T for the gates, dx if it is needed, and two for the weights of each trainable expert. Bytes: the
    gradient, x and the backbone read, dx written.
    """
    product = 2.0 * rows * experts * rank * dim
    flop = product + need_x * product + 4.0 * rows * rank * dim * trainable
    return Work(flop, (3.0 + need_x) * rows * dim * itemsize)


class Level(nn.Module):
    """A baseline's side level. `norm` sums the norms of gated outputs, and `gate` the gates."""

    norm: Tensor
    gate: Tensor

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        branches, device = len(weights.router), weights.router.device
        self.register_buffer("norm", torch.zeros(branches, dtype=torch.float64, device=device))
        self.register_buffer("gate", torch.zeros(branches, dtype=torch.float64, device=device))

    def leaves(self) -> Tensors:
        """Return the tensors that receive gradients."""
        raise NotImplementedError


class PublishedExpert(nn.Module):
    """A bottleneck adapter with a residual."""

    def __init__(self, down: Tensor, up: Tensor, trainable: bool) -> None:
        super().__init__()
        rank, dim = down.shape
        self.fc_down = nn.Linear(dim, rank, bias=False, device=down.device, dtype=down.dtype)
        self.fc_up = nn.Linear(rank, dim, bias=False, device=down.device, dtype=down.dtype)
        with torch.no_grad():
            self.fc_down.weight.copy_(down)
            self.fc_up.weight.copy_(up.T)
        self.requires_grad_(trainable)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc_up(F.gelu(self.fc_down(x)))


class PublishedLevel(Level):
    """The published formulation: a module per expert; outputs are stacked with the backbone, gated and summed."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights)
        branches, dim = weights.router.shape
        last = len(weights.down) - 1
        self.router = nn.Linear(dim, branches, bias=False, device=weights.router.device, dtype=weights.router.dtype)
        with torch.no_grad():
            self.router.weight.copy_(weights.router)
        self.experts = nn.ModuleList(
            PublishedExpert(down, up, trainable=expert == last)
            for expert, (down, up) in enumerate(zip(weights.down, weights.up, strict=True))
        )

    def forward(self, x: Tensor, backbone: Tensor) -> Tensor:
        gates = torch.softmax(self.router(x), dim=-1)
        outputs = torch.stack([backbone, *(expert(x) for expert in self.experts)], dim=1)
        gated = gates.unsqueeze(-1) * outputs
        with torch.no_grad():
            self.norm += gated.norm(dim=-1).sum(dim=0, dtype=torch.float64)
            self.gate += gates.sum(dim=0, dtype=torch.float64)
        return gated.sum(dim=1)

    def leaves(self) -> Tensors:
        last = self.experts[-1]
        assert isinstance(last, PublishedExpert)
        return {"router": self.router.weight, "down": last.fc_down.weight, "up": last.fc_up.weight}


class EagerLevel(Level):
    """The fastest plain PyTorch that we found: wide products of all frozen experts, and no (N, E, D) tensor.

    With the residuals collected, y = g_0 h + (1 - g_0) x + (g * a) up. Norms of expert outputs come from
    ||x + a up||^2 = ||x||^2 + 2 a.(x up^T) + a (up up^T) a^T, where one
    product computes x up^T and x down^T of the frozen experts, and their Gram matrices are computed once.
    """

    frozen_in: Tensor
    frozen_up: Tensor
    frozen_gram: Tensor

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights)
        experts, rank, dim = weights.down.shape
        self.frozen, self.rank = experts - 1, rank
        width = self.frozen * rank
        frozen_down, frozen_up = weights.down[:-1].reshape(width, dim), weights.up[:-1].reshape(width, dim)
        self.register_buffer("frozen_in", torch.cat((frozen_down, frozen_up)))
        self.register_buffer("frozen_up", frozen_up.clone())
        self.register_buffer("frozen_gram", weights.up[:-1] @ weights.up[:-1].mT)
        self.router = nn.Parameter(weights.router.clone())
        self.down = nn.Parameter(weights.down[-1].clone())
        self.up = nn.Parameter(weights.up[-1].clone())

    def forward(self, x: Tensor, backbone: Tensor) -> Tensor:
        rows, width = len(x), self.frozen * self.rank
        wide = torch.float32 if x.itemsize == 2 else x.dtype
        gates = torch.softmax(F.linear(x, self.router).to(wide), dim=-1)
        narrow_gates = gates.to(x.dtype)

        activated = F.gelu(F.linear(x, self.down))
        gated = narrow_gates[:, -1:] * activated
        y = torch.addmm(torch.lerp(x, backbone, narrow_gates[:, :1]), gated, self.up)
        frozen_activated, frozen_across = None, None
        if self.frozen:
            if x.requires_grad:
                hidden = F.linear(x, self.frozen_in[:width])
                with torch.no_grad():
                    frozen_across = F.linear(x, self.frozen_up)
            else:
                hidden, frozen_across = F.linear(x, self.frozen_in).split(width, dim=1)
            frozen_activated = F.gelu(hidden).view(rows, self.frozen, self.rank)
            gated = (narrow_gates[:, 1:-1, None] * frozen_activated).view(rows, width)
            y = torch.addmm(y, gated, self.frozen_up)
        self._count(x, backbone, gates, activated, frozen_activated, frozen_across)
        return y

    @torch.no_grad()
    def _count(
        self,
        x: Tensor,
        backbone: Tensor,
        gates: Tensor,
        activated: Tensor,
        frozen_activated: Tensor | None,
        frozen_across: Tensor | None,
    ) -> None:
        squares = [_square(activated, F.linear(x, self.up), activated @ (self.up @ self.up.T), gates.dtype)[:, None]]
        if frozen_activated is not None and frozen_across is not None:
            through = torch.matmul(frozen_activated.transpose(0, 1), self.frozen_gram).transpose(0, 1)
            squares.insert(0, _square(frozen_activated, frozen_across.view_as(frozen_activated), through, gates.dtype))
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=gates.dtype)
        norms = torch.cat(squares, dim=1).add_(length.square()).clamp_min_(0).sqrt_()
        backbone_norm = torch.linalg.vector_norm(backbone, dim=-1, keepdim=True, dtype=gates.dtype)
        self.norm += (gates * torch.cat((backbone_norm, norms), dim=1)).sum(0, dtype=torch.float64)
        self.gate += gates.sum(0, dtype=torch.float64)

    def leaves(self) -> Tensors:
        return {"router": self.router, "down": self.down, "up": self.up}


def _square(activated: Tensor, across: Tensor, through: Tensor, wide: torch.dtype) -> Tensor:
    """Return 2 a.(x up^T) + a (up up^T) a^T for each row and expert."""
    # Not `torch.add` with alpha=2: Inductor of torch 2.13 drops alpha when it fuses the sum into the product.
    return torch.linalg.vecdot(activated.to(wide), (through + 2 * across).to(wide))


class SideNetworks(nn.Module):
    """A stack of levels for each modality."""

    def __init__(self, kind: type[Level], weights: Sequence[Sequence[Weights]], dtype: torch.dtype) -> None:
        super().__init__()
        self.networks = nn.ModuleList(
            nn.ModuleList(kind(Weights(*(t.detach().to(dtype) for t in level))) for level in levels)
            for levels in weights
        )

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        """Return the last state of each modality, from x and the backbones of one modality after the other."""
        each = len(inputs) // len(self.networks)
        states = []
        for place, levels in enumerate(self.levels()):
            x, *backbones = inputs[place * each : (place + 1) * each]
            for level, backbone in zip(levels, backbones, strict=True):
                x = level(x, backbone)
            states.append(x)
        return states

    def levels(self) -> list[list[Level]]:
        """Return the levels of each modality."""
        return [list(cast("Iterable[Level]", levels)) for levels in self.networks]
