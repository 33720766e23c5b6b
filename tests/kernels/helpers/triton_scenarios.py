"""Calls of training for the offline compilation of Triton kernels."""

import importlib
from collections.abc import Callable
from typing import Any

import torch

Scenario = Callable[[torch.dtype], None]


def side_moe(dtype: torch.dtype) -> None:
    """Training steps of two levels in one launch, and of one, at the paper's sizes with 9 of 10 experts frozen."""
    needs_all = (True,) * 5
    weights_only = (False, False, True, True, True)
    side_moe_step(dtype, levels=2, needs=weights_only)
    side_moe_step(dtype, levels=2, needs=(True, False, True, True, True))
    side_moe_step(dtype, levels=2, needs=(True, False, True, True, True), recompute=True)
    side_moe_step(dtype, levels=1, needs=(True, False, True, True, True))
    side_moe_step(dtype, levels=1, needs=needs_all, recompute=True, apart=False)
    side_moe_step(dtype, levels=2, needs=weights_only, one_row=True)
    side_moe_step(dtype, levels=2, needs=weights_only, count=False, recompute=True)
    # More columns of an expert than a block holds.
    side_moe_step(dtype, levels=1, needs=(True, False, True, True, True), sizes=(2816, 768, 128, 4))


def side_moe_step(
    dtype: torch.dtype,
    *,
    levels: int,
    needs: tuple[bool, ...],
    recompute: bool = False,
    one_row: bool = False,
    count: bool = True,
    apart: bool = True,
    sizes: tuple[int, int, int, int] = (2816, 768, 64, 10),
) -> None:
    rows, dim, rank, experts = sizes
    frozen = experts - 1 if apart else 0

    def several(*shape: int, of: torch.dtype = dtype) -> list[torch.Tensor]:
        return [torch.empty(shape, dtype=of) for _ in range(levels)]

    x, backbone, router = several(1 if one_row else rows, dim), several(rows, dim), several(experts + 1, dim)
    down, up = several(experts - frozen, rank, dim), several(experts - frozen, rank, dim)
    frozen_down: list[Any] = several(frozen, rank, dim) if apart else [None] * levels
    frozen_up: list[Any] = several(frozen, rank, dim) if apart else [None] * levels

    def each(value: Any) -> list[Any]:
        return [value] * levels

    operands = x, backbone, router, down, up, frozen_down, frozen_up, each(None)
    num_frozen = 0 if apart else experts - 1
    _, gates, hidden, *_ = launcher("side_moe_group")(
        *operands, each(None), each(num_frozen), each(recompute), each(count), each("gelu")
    )
    settings = each(num_frozen), each(recompute), each("gelu")
    launcher("side_moe_group_backward")(several(rows, dim), *operands, gates, hidden, *settings, *map(each, needs))


def routing(dtype: torch.dtype) -> None:
    """Two of ten experts, and of sixty-four."""
    for experts in (10, 64):
        logits = torch.empty(2816, experts, dtype=dtype)
        for renormalize in (True, False):
            gates, chosen, *_ = launcher("route_topk")(logits, 2, renormalize)
            launcher("route_topk_backward")(gates, logits, chosen, renormalize)


def grouped_mm(dtype: torch.dtype) -> None:
    """The products of a top-k side level, to its rank and back, all experts but the last one frozen."""
    offsets = torch.zeros(11, dtype=torch.int64)
    for inner, columns in ((768, 64), (64, 768)):
        x, weight = torch.empty(5632, inner, dtype=dtype), torch.empty(10, inner, columns, dtype=dtype)
        y = launcher("grouped_mm")(x, weight, offsets, 9)
        launcher("grouped_mm_backward")(torch.empty_like(y), x, weight, offsets, 9, True, True)


def rank_of_target(dtype: torch.dtype) -> None:
    """Ranks in a catalogue of the paper's width, with wider rows, and with rows that are loaded number by number."""
    for dim in (128, 768, 100):
        for most in (None, 20):
            queries, items, targets, seen, offsets = ranking(dtype, dim, most)
            launcher("rank_of_target")(queries, items, targets, seen, offsets)


def topk_items(dtype: torch.dtype) -> None:
    """The top 10; and the top 100 and 1000 of few queries, whose lists are divided into slices, and of many."""
    for dim in (128, 768, 100):
        for most in (None, 20):
            queries, items, _, seen, offsets = ranking(dtype, dim, most)
            launcher("topk_items")(queries, items, 10, seen, offsets)
    queries, items, _, seen, offsets = ranking(dtype, 128, 20, num_items=30_000)
    for k in (100, 1000):
        launcher("topk_items")(queries, items[:5000], k, seen, offsets)
        launcher("topk_items")(queries[:10], items, k, seen, offsets[:11])


def ranking(dtype: torch.dtype, dim: int, most_seen: int | None, num_items: int = 100_000) -> tuple[Any, ...]:
    """Return queries, items, targets, and the values and offsets of seen items."""
    num_queries = 2000
    queries, items = torch.empty(num_queries, dim, dtype=dtype), torch.empty(num_items, dim, dtype=dtype)
    targets = torch.zeros(num_queries, dtype=torch.int64)
    if most_seen is None:
        return queries, items, targets, None, None
    offsets = torch.arange(0, most_seen * num_queries + 1, most_seen)
    return queries, items, targets, torch.zeros(most_seen * num_queries, dtype=torch.int64), offsets


def in_batch_softmax_loss(dtype: torch.dtype) -> None:
    """The paper's batch, and one without corrections and with so many queries and items that no sum is divided."""
    in_batch_softmax_loss_step(dtype, sizes=(2560, 2640, 128, 11))
    in_batch_softmax_loss_step(dtype, sizes=(40000, 40000, 256, 3), users=None, corrected=False)


def in_batch_softmax_loss_step(
    dtype: torch.dtype, *, sizes: tuple[int, int, int, int], users: int | None = 256, corrected: bool = True
) -> None:
    num_queries, num_items, dim, width = sizes

    def indices(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int64)

    correction = torch.empty(num_items) if corrected else None
    batch = (
        torch.empty(num_queries, dim, dtype=dtype),
        torch.empty(num_items, dim, dtype=dtype),
        indices(num_queries),
        indices(users or num_queries, width),
        indices(num_queries) if users else None,
        correction,
        correction,
    )
    loss, lse, *_ = launcher("in_batch_softmax_loss")(*batch, False, False)
    launcher("in_batch_softmax_loss_backward")(*batch, lse, None, None, loss, True, True)


SCENARIOS: tuple[Scenario, ...] = (
    side_moe,
    routing,
    grouped_mm,
    rank_of_target,
    topk_items,
    in_batch_softmax_loss,
)


def launcher(operator: str) -> Callable[..., Any]:
    """Return the function that launches an operator's kernels."""
    from xsmoe_kernels.backends import triton as triton_backend

    module, function = triton_backend.LAUNCHERS[operator].split(":")
    found: Callable[..., Any] = getattr(importlib.import_module(f"xsmoe_kernels.{module}"), function)
    return found
