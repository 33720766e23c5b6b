"""Libraries for mixtures of experts that have the grouped product by itself.

Their weights are one tensor (E, K, P), of which all take gradients: neither can leave out frozen experts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.kernels import rivals
from bench.workload import Absent

GroupedProduct = Callable[[Tensor, Tensor], Tensor]
"""Rows (M, K), sorted by expert, and weights (E, K, P)."""

MODULES = {"scattermoe": "scattermoe.parallel_experts", "megablocks": "megablocks.grouped_gemm_util"}


def product_of(name: str, counts: Sequence[int], device: torch.device, dtype: torch.dtype) -> GroupedProduct:
    """A library's product for groups of so many rows.

    Raises:
        Absent: it is not installed, or does not run here.
    """
    make = _scattermoe if name == "scattermoe" else _megablocks

    def trial() -> None:
        sizes = [16, 0, 48]
        rows = torch.zeros(sum(sizes), 64, device=device, dtype=dtype, requires_grad=True)
        weight = torch.zeros(len(sizes), 64, 64, device=device, dtype=dtype, requires_grad=True)
        y = make(sizes, device, dtype)(rows, weight)
        torch.autograd.grad(y, [rows, weight], torch.zeros_like(y))

    product = make(counts, device, dtype)
    rivals.attempt(name, trial)
    return product


def _scattermoe(counts: Sequence[int], device: torch.device, dtype: torch.dtype) -> GroupedProduct:
    """ScatterMoE's linear layer of experts, from rows that are grouped already to rows that stay so."""
    module = rivals.load("scattermoe", MODULES["scattermoe"], device)
    kernels: Any = getattr(getattr(module, "kernels", None), "ops", None)
    if dtype == torch.float32 and hasattr(kernels, "ALLOW_TF32"):
        # Its default is TF32, whose errors the gate refuses; products of float32 are to be what torch's are.
        kernels.ALLOW_TF32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    sizes = torch.tensor(list(counts), device=device)
    experts = torch.arange(len(counts), device=device).repeat_interleave(sizes)
    places, ends = torch.arange(len(experts), device=device), sizes.cumsum(0)

    def product(rows: Tensor, weight: Tensor) -> Tensor:
        y: Tensor = module.parallel_linear(
            rows,
            weight,
            1,
            sorted_expert_idxs=experts,
            sorted_scattered_idxs=places,
            expert_offsets=ends,
            grouped_in=True,
            grouped_out=True,
        )
        return y

    return product


def _megablocks(counts: Sequence[int], device: torch.device, dtype: torch.dtype) -> GroupedProduct:
    """What the dropless layers of MegaBlocks multiply with, the grouped_gemm that comes as `megablocks[gg]`."""
    module = rivals.load("megablocks", MODULES["megablocks"], device)
    if module.ops is None:
        raise Absent("megablocks is installed without grouped_gemm, which megablocks[gg] brings")
    # On the host, where its layers bring them, too.
    sizes = torch.tensor(list(counts))

    def product(rows: Tensor, weight: Tensor) -> Tensor:
        y: Tensor = module.ops.gmm(rows, weight, sizes)
        return y

    return product
