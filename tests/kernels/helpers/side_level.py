"""Inputs of a side level, and its formula: one expert after the other, outputs stacked."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from xsmoe_kernels.runtime.precision import wide_dtype

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda hidden: F.gelu(hidden, approximate="tanh"),
    "relu": F.relu,
}


class Level(NamedTuple):
    """Differentiable inputs of a side level, in `side_moe`'s order."""

    x: Tensor
    backbone: Tensor
    router: Tensor
    down: Tensor
    up: Tensor


def make_level(
    rows: int,
    dim: int,
    experts: int,
    rank: int,
    *,
    one_row: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    requires_grad: bool = True,
) -> Level:
    """Return inputs such that hidden states, logits and outputs have unit scale; x is (1, D) with `one_row`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, dtype=torch.float64, generator=generator) * scale
        return drawn.to(dtype).requires_grad_(requires_grad)

    return Level(
        x=normal(1 if one_row else rows, dim),
        backbone=normal(rows, dim),
        router=normal(experts + 1, dim, scale=max(dim, 1) ** -0.5),
        down=normal(experts, rank, dim, scale=max(dim, 1) ** -0.5),
        up=normal(experts, rank, dim, scale=max(rank, 1) ** -0.5),
    )


def to(level: Level, dtype: torch.dtype) -> Level:
    """Return the same values as new leaves of another dtype."""
    return Level(*(t.detach().to(dtype).requires_grad_(t.requires_grad) for t in level))


def naive(
    x: Tensor,
    backbone: Tensor,
    router: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    activation: str = "gelu",
    row_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, norm, gate): products in the dtype of the arguments, gates and sums at least in float32; differentiable."""
    dtype, wide = x.dtype, wide_dtype(x.dtype)
    x = x.expand(len(backbone), -1)
    gates = torch.softmax(x.to(wide) @ router.to(wide).T, dim=-1)
    outputs = [backbone.to(wide)]
    for expert_down, expert_up in zip(down, up, strict=True):
        activated = ACTIVATIONS[activation]((x @ expert_down.T).to(wide)).to(dtype)
        outputs.append(x.to(wide) + (activated @ expert_up).to(wide))
    gated = gates.unsqueeze(-1) * torch.stack(outputs, dim=1)
    weight = torch.ones(len(gates), 1, dtype=wide) if row_weight is None else row_weight.to(wide).unsqueeze(-1)
    return gated.sum(1).to(dtype), (weight * gated.norm(dim=-1)).sum(0), (weight * gates).sum(0)
