"""Rivals of `side_moe`: the published formulation, and the best we know in plain PyTorch."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Weights(NamedTuple):
    """A level's weights; the last expert is trainable, the others are frozen."""

    router: Tensor  # (E+1, D)
    down: Tensor  # (E, R, D)
    up: Tensor  # (E, R, D)


def by_level(levels: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all levels, named as in "level 1 router"."""
    return {f"level {place} {name}": t for place, level in enumerate(levels, start=1) for name, t in level.items()}


def modality_prefix(place: int, modalities: int) -> str:
    """What the names of a modality's tensors begin with: nothing where it is the only one."""
    return f"modality {place + 1} " if modalities > 1 else ""


def by_modality(modalities: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all modalities, named as in "modality 2 level 1 router"."""
    count = len(modalities)
    return {modality_prefix(place, count) + name: t for place, one in enumerate(modalities) for name, t in one.items()}


class Level(nn.Module):
    """One side level: `leaves` take gradients, `counters` grow by the norms of gated outputs and by the gates."""

    norm: Tensor
    gate: Tensor

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        branches, device = len(weights.router), weights.router.device
        self.register_buffer("norm", torch.zeros(branches, dtype=torch.float64, device=device))
        self.register_buffer("gate", torch.zeros(branches, dtype=torch.float64, device=device))

    def leaves(self) -> dict[str, Tensor]:
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
    """A module per expert, their outputs stacked with the backbone's rows, gated, measured and summed."""

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

    def leaves(self) -> dict[str, Tensor]:
        last = self.experts[-1]
        assert isinstance(last, PublishedExpert)
        return {"router": self.router.weight, "down": last.fc_down.weight, "up": last.fc_up.weight}


class EagerLevel(Level):
    """Two wide products of all frozen experts, two narrow ones of the trainable expert, and no (N, E, D) tensor.

    With the residuals gathered, y = g_0 h + (1 - g_0) x + (g * a) up. Norms of expert outputs come from
    ||x + a up||^2 = ||x||^2 + 2 a.(x up^T) + a (up up^T) a^T, where x up^T of the frozen experts comes out of the same
    product as x down^T, and their Gram matrices are computed once.
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

    def leaves(self) -> dict[str, Tensor]:
        return {"router": self.router, "down": self.down, "up": self.up}


def _square(activated: Tensor, across: Tensor, through: Tensor, wide: torch.dtype) -> Tensor:
    """2 a.(x up^T) + a (up up^T) a^T for each row and expert."""
    # Not `torch.add` with alpha=2: Inductor of torch 2.13 drops the alpha where it fuses the sum into the product.
    return torch.linalg.vecdot(activated.to(wide), (through + 2 * across).to(wide))


class Ladder(nn.Module):
    """Levels on top of each other."""

    def __init__(self, kind: type[Level], weights: Sequence[Weights], dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.levels = nn.ModuleList(kind(Weights(*(t.detach().to(dtype) for t in level))) for level in weights)

    def forward(self, x: Tensor, *backbones: Tensor) -> Tensor:
        for level, backbone in zip(self.levels, backbones, strict=True):
            x = level(x, backbone)
        return x

    def leaves(self) -> dict[str, Tensor]:
        """What takes gradients."""
        return by_level(level.leaves() for level in self._levels())

    def counters(self) -> dict[str, Tensor]:
        """Copies of what has been counted."""
        return by_level({"norm": level.norm.clone(), "gate": level.gate.clone()} for level in self._levels())

    def reset(self) -> None:
        """Sets the counters to zero."""
        for level in self._levels():
            level.norm.zero_()
            level.gate.zero_()

    def tidy(self, name: str, gradient: Tensor) -> Tensor:
        """A gradient of a leaf in side_moe's layout: `nn.Linear` holds the up projection as (D, R)."""
        published = isinstance(self.levels[0], PublishedLevel)
        return gradient.T if published and name.endswith(" up") else gradient

    def _levels(self) -> list[Level]:
        return [level for level in self.levels if isinstance(level, Level)]


class Ladders(nn.Module):
    """A ladder for each modality."""

    def __init__(self, kind: type[Level], weights: Sequence[Sequence[Weights]], dtype: torch.dtype) -> None:
        super().__init__()
        self.ladders = nn.ModuleList(Ladder(kind, levels, dtype) for levels in weights)

    def forward(self, *rows: Tensor) -> list[Tensor]:
        """The last level of each modality, from x and the backbones of one after the other."""
        each = len(rows) // len(self.ladders)
        return [ladder(*rows[place * each : (place + 1) * each]) for place, ladder in enumerate(self.ladders)]

    def leaves(self) -> dict[str, Tensor]:
        """What takes gradients."""
        return by_modality([ladder.leaves() for ladder in self._all()])

    def counters(self) -> dict[str, Tensor]:
        """Copies of what has been counted."""
        return by_modality([ladder.counters() for ladder in self._all()])

    def reset(self) -> None:
        """Sets the counters to zero."""
        for ladder in self._all():
            ladder.reset()

    def tidy(self, name: str, gradient: Tensor) -> Tensor:
        """As `Ladder.tidy`."""
        return self._all()[0].tidy(name, gradient)

    def _all(self) -> list[Ladder]:
        return [ladder for ladder in self.ladders if isinstance(ladder, Ladder)]
