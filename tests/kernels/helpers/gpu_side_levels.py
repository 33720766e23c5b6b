"""Helpers for tests of GPU kernels with several side levels, for every backend."""

from typing import Any

import torch
from torch import Tensor

from tests.kernels.helpers.side_level import make_level
from tests.kernels.helpers.triton_gpu import DEVICE, ON_GPU
from xsmoe_kernels import FrozenExperts, Utilization, side_moe, side_moe_group, use_backend
from xsmoe_kernels.runtime import dispatch

DIFFERENTIABLE = ("x", "backbone", "router", "down", "up")


def layer(seed: int, rows: int, dim: int, experts: int, rank: int, frozen: int, **options: Any) -> dict[str, Any]:
    """Return a level with separate frozen experts, and counters."""
    one_row = options.pop("one_row", False)
    dtype = options.pop("dtype", torch.float32)
    drawn = make_level(rows, dim, experts, rank, one_row=one_row, dtype=dtype, seed=seed, requires_grad=False)
    level = {name: tensor.to(DEVICE) for name, tensor in drawn._asdict().items()}
    bank = FrozenExperts(level["down"][:frozen], level["up"][:frozen]) if frozen else None
    level |= {name: level[name][frozen:] for name in ("down", "up")}
    level |= {name: level[name].clone().requires_grad_() for name in DIFFERENTIABLE}
    return {**level, "frozen": bank, "utilization": Utilization(experts, DEVICE), **options}


def layers(scale: int) -> list[dict[str, Any]]:
    """Return two modalities that differ in every allowed way, and two levels that need other kernels."""
    weight = torch.rand(33 * scale, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return [
        layer(0, 33 * scale, 40, 3, 8, 2, row_weight=weight),
        layer(5, 150 * scale, 48, 2, 8, 0),
        layer(1, 35 * scale, 64, 1, 8, 0, recompute=True),
        layer(2, 20 * scale, 33, 18, 8, 17),
        layer(3, 33 * scale, 40, 2, 8, 1, one_row=True),
        layer(4, 33 * scale, 40, 2, 5, 0, activation="relu"),
    ]


def outcome(levels: list[dict[str, Any]], results: list[Tensor]) -> list[Tensor]:
    """Return results, gradients and counters."""
    leaves = [level[name] for level in levels for name in DIFFERENTIABLE]
    loss = sum(y.square().sum() for y in results)
    counters = [counter for level in levels for counter in (level["utilization"].norm, level["utilization"].gate)]
    return [*results, *torch.autograd.grad(loss, leaves), *counters]


def check_each_level_has_the_bits_that_it_has_on_its_own(backend: str, places: slice = slice(None)) -> None:
    """Check that one call for a group equals calls for its levels; `places` selects among `layers`."""
    together, apart = (layers(40 if ON_GPU else 1)[places] for _ in range(2))
    before = dispatch.calls.copy()
    with use_backend(backend):
        grouped = outcome(together, side_moe_group(together))
        counted = dispatch.calls - before
        alone = outcome(apart, [side_moe(**level) for level in apart])
    assert counted == {("side_moe_group", backend): 1, ("side_moe_group_backward", backend): 1}
    for found, want in zip(grouped, alone, strict=True):
        assert torch.equal(found, want)
