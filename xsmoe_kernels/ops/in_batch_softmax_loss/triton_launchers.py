"""Launches of the Triton kernels of `in_batch_softmax_loss`: block sizes, grids, and slices of sums."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor
from torch.nn import functional

from xsmoe_kernels.ops.in_batch_softmax_loss.triton_gradient_kernels import (
    item_gradient_kernel,
    query_gradient_kernel,
    slice_sum_kernel,
)
from xsmoe_kernels.ops.in_batch_softmax_loss.triton_kernels import logit_lse_kernel, mean_kernel, sums_kernel
from xsmoe_kernels.triton_utils import kernel_helpers, tuning
from xsmoe_kernels.triton_utils.tuning import Config, Table, everywhere

Result = TypeVar("Result")


def _of(sizes: str, num_warps: int, num_stages: int) -> Config:
    queries, items, inner, *columns = map(int, sizes.split())
    blocks = {"BLOCK_M": queries, "BLOCK_C": items, "BLOCK_K": inner}
    return Config(blocks | dict(zip(("BLOCK_D",), columns, strict=False)), num_warps, num_stages)


SUMS = Table(
    "in_batch_softmax_loss",
    {
        ("sm_80", "half"): _of("128 64 128", 8, 3),
        ("sm_90", "half"): _of("128 128 128", 8, 3),
        ("sm_100", "half"): _of("128 128 128", 8, 3),
        ("gfx942", "half"): _of("128 64 128", 8, 1),
        ("sm_80", "tf32"): _of("64 64 32", 4, 3),
        ("sm_90", "tf32"): _of("128 64 128", 8, 2),
        ("sm_100", "tf32"): _of("128 64 128", 8, 2),
        **everywhere(_of("64 64 16", 8, 2), "ieee"),
        ("gfx942", "ieee"): _of("64 64 16", 8, 1),
    },
    interpreted=_of("16 32 32", 4, 1),
    candidates=(_of("64 64 128", 4, 3), _of("64 128 128", 4, 3), _of("128 64 128", 8, 3), _of("64 64 64", 4, 4)),
)
"""Block sizes of queries, items and the inner dimension, which is not divided if it fits into its block."""

QUERY_GRADIENT = Table(
    "in_batch_softmax_loss.queries",
    {
        ("sm_80", "half"): _of("64 64 128 128", 8, 2),
        ("sm_90", "half"): _of("128 64 128 128", 8, 2),
        ("sm_100", "half"): _of("128 64 128 128", 8, 2),
        ("gfx942", "half"): _of("64 64 128 128", 8, 1),
        ("sm_80", "tf32"): _of("64 64 32 128", 8, 2),
        ("sm_90", "tf32"): _of("64 64 128 128", 8, 2),
        ("sm_100", "tf32"): _of("64 32 128 128", 8, 2),
        **everywhere(_of("64 32 16 128", 8, 2), "ieee"),
        ("sm_80", "ieee"): _of("32 32 16 128", 8, 2),
        ("gfx942", "ieee"): _of("64 64 16 128", 8, 1),
    },
    interpreted=_of("16 32 32 32", 4, 1),
    candidates=(_of("64 64 128 128", 4, 3), _of("128 128 128 128", 8, 2), _of("64 64 64 64", 4, 3)),
)
"""The same block sizes, and that of the gradient's columns."""

ITEM_GRADIENT = Table(
    "in_batch_softmax_loss.items",
    {
        ("sm_80", "half"): _of("64 64 128 128", 8, 2),
        ("sm_90", "half"): _of("32 128 128 128", 8, 3),
        ("sm_100", "half"): _of("32 128 128 128", 8, 2),
        ("gfx942", "half"): _of("64 64 128 128", 8, 1),
        ("sm_80", "tf32"): _of("32 64 32 128", 8, 2),
        ("sm_90", "tf32"): _of("32 64 128 128", 8, 2),
        ("sm_100", "tf32"): _of("32 64 128 128", 8, 2),
        **everywhere(_of("32 64 16 128", 8, 1), "ieee"),
        ("gfx942", "ieee"): _of("32 64 16 128", 4, 1),
    },
    interpreted=_of("16 32 32 32", 4, 1),
    candidates=(_of("32 64 128 128", 4, 3), _of("64 128 128 128", 8, 2), _of("64 64 64 64", 4, 3)),
)

LOGIT_LSE = Table(
    "in_batch_softmax_loss.logit_lse",
    everywhere(Config({"BLOCK_M": 32, "BLOCK_S": 16, "BLOCK_K": 64})),
    interpreted=Config({"BLOCK_M": 16, "BLOCK_S": 4, "BLOCK_K": 32}),
)
MEAN = Table("in_batch_softmax_loss.mean", everywhere(Config({"BLOCK": 1024})), interpreted=Config({"BLOCK": 4}))
SLICE_SUM = Table(
    "in_batch_softmax_loss.slice_sum", everywhere(Config({"BLOCK": 1024})), interpreted=Config({"BLOCK": 256})
)

SLICE_TILES = 2
"""The fewest tiles for which a slice of a gradient is worth its partial sums."""
SHARE_SCALE = 2.0**15
"""The factor of shares in float16: among many items most shares are below its smallest normal number."""


class Batch(NamedTuple):
    """The operator's tensors for the kernels: rows of stride 1, everything else contiguous."""

    queries: Tensor
    items: Tensor
    targets: Tensor
    rejected: Tensor
    users: Tensor | None
    logq: Tensor | None
    counts: Tensor | None

    def rows(self) -> dict[str, Any]:
        """Return the arguments of queries and items."""
        return {
            "queries": self.queries,
            "items": self.items,
            "targets": self.targets,
            "logq": self.logq,
            "query_stride": self.queries.stride(0),
            "item_stride": self.items.stride(0),
            "num_queries": len(self.queries),
        }

    def all(self) -> dict[str, Any]:
        """Return these and the arguments that select the negatives."""
        return self.rows() | {
            "rejected": self.rejected,
            "users": self.users,
            "counts": self.counts,
            "rejected_stride": self.rejected.stride(0),
            "num_items": len(self.items),
            "width": self.rejected.shape[1],
        }


def forward(
    queries: Tensor,
    items: Tensor,
    targets: Tensor,
    rejected: Tensor,
    users: Tensor | None,
    logq: Tensor | None,
    counts: Tensor | None,
    need_queries: bool,
    need_items: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss (), each query's logsumexp over its candidates (M,), and the needed gradients."""
    batch = _in_place(queries, items, targets, rejected, users, logq, counts)
    num_queries, num_items = len(queries), len(items)

    def launch(config: Config) -> tuple[Tensor, Tensor]:
        config = _fitted(config, batch)
        blocks = triton.cdiv(num_queries, config.blocks["BLOCK_M"])
        slices, slice_items = _slices(blocks, num_items, config.blocks["BLOCK_C"])
        maxima, sums = (queries.new_empty(slices, num_queries, dtype=torch.float32) for _ in range(2))
        kernel_helpers.launch(
            sums_kernel,
            (blocks, slices),
            queries.device,
            {**batch.all(), "maxima": maxima, "sums": sums, "slice_items": slice_items},
            {"DIM": queries.shape[1], "PRECISION": kernel_helpers.precision(queries)},
            config,
        )
        return maxima, sums

    lse, losses = _rows(batch, *_run(SUMS, batch, launch))
    loss = lse.new_empty(())
    kernel_helpers.launch(
        mean_kernel,
        (1,),
        queries.device,
        {"losses": losses, "loss": loss, "num_queries": num_queries, "num_losses": len(losses)},
        {},
        tuning.default(MEAN, queries, "ieee"),
    )
    gradients = _gradients(batch, lse, None, need_queries, need_items)
    return loss, lse, *_as_wide_as(queries, *gradients)


def backward(
    queries: Tensor,
    items: Tensor,
    targets: Tensor,
    rejected: Tensor,
    users: Tensor | None,
    logq: Tensor | None,
    counts: Tensor | None,
    lse: Tensor,
    ahead_queries: Tensor | None,
    ahead_items: Tensor | None,
    grad: Tensor,
    need_queries: bool,
    need_items: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the queries (M, d) and of the items (C, d); `grad` of the loss is read on the device."""
    # Without queries the gradients are zeros, even times infinity.
    if ahead_queries is not None and ahead_items is not None and len(queries) > 0:
        return ahead_queries * grad, ahead_items * grad
    batch = _in_place(queries, items, targets, rejected, users, logq, counts)
    return _as_wide_as(queries, *_gradients(batch, lse.contiguous(), grad, need_queries, need_items))


def _as_wide_as(queries: Tensor, grad_queries: Tensor, grad_items: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients without the columns that were added for alignment."""
    dim = queries.shape[1]
    of_queries, of_items = (
        gradient[:, :dim].contiguous() if gradient.dim() == 2 else gradient for gradient in (grad_queries, grad_items)
    )
    return of_queries, of_items


def _in_place(queries: Tensor, items: Tensor, targets: Tensor, rejected: Tensor, *optional: Tensor | None) -> Batch:
    """Return a batch of queries and items that begin at multiples of 16 bytes, with strides divisible by 16."""
    queries, items = kernel_helpers.rows_in_place(queries), kernel_helpers.rows_in_place(items)
    if not kernel_helpers.rows_aligned(queries, items):
        # Loads of single numbers need more registers than there are. Zeros change no product.
        queries, items = (functional.pad(rows, (0, -rows.shape[1] % 16)) for rows in (queries, items))
    return Batch(
        queries,
        items,
        targets.contiguous(),
        kernel_helpers.rows_in_place(rejected),
        *(None if tensor is None else tensor.contiguous() for tensor in optional),
    )


def _rows(batch: Batch, maxima: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return lse (M,) of the partial sums (slices, M), and the sum of the losses in each block of queries."""
    config = tuning.default(LOGIT_LSE, batch.queries, "ieee")
    num_queries, dim = batch.queries.shape
    blocks = triton.cdiv(num_queries, config.blocks["BLOCK_M"])
    lse, losses = maxima.new_empty(num_queries), maxima.new_empty(blocks)
    kernel_helpers.launch(
        logit_lse_kernel,
        (blocks,),
        batch.queries.device,
        {**batch.rows(), "maxima": maxima, "sums": sums, "lse": lse, "losses": losses, "num_slices": len(maxima)},
        {"DIM": dim},
        config,
    )
    return lse, losses


def _gradients(
    batch: Batch, lse: Tensor, grad: Tensor | None, need_queries: bool, need_items: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of queries and items, as wide as in the batch; `grad` is that of the loss, 1 if None."""
    queries, items = batch.queries, batch.items
    grad_queries = queries.new_empty(queries.shape if need_queries else 0)
    grad_items = items.new_empty(items.shape if need_items else 0)
    if len(queries) == 0:
        return grad_queries, grad_items.zero_()
    if need_queries or need_items:
        # The targets' logits, from the same binary as in forward: bitwise equal to lse for a query without negatives.
        own, _ = _rows(batch, lse.new_empty(0, len(queries)), lse)
        upstream = lse.new_ones(()) if grad is None else grad
        arguments = {**batch.all(), "lse": lse, "own": own, "grad": upstream}
        if need_queries:
            _query_gradient(batch, arguments, grad_queries)
        if need_items:
            _item_gradient(batch, arguments, grad_items)
    return grad_queries, grad_items


def _query_gradient(batch: Batch, arguments: dict[str, Any], gradient: Tensor) -> None:
    def launch(config: Config) -> None:
        config = _fitted(config, batch)
        grid, parts, slice_items = _parts(gradient, len(batch.items), config, "BLOCK_M", "BLOCK_C")
        column_blocks = triton.cdiv(gradient.shape[1], config.blocks["BLOCK_D"])
        undefined = gradient.new_empty(len(parts) * column_blocks, len(gradient), dtype=torch.int32)
        for clean in (False, True):
            kernel_helpers.launch(
                query_gradient_kernel,
                grid,
                gradient.device,
                {**arguments, "gradient": parts, "undefined": undefined, "slice_items": slice_items},
                {"CLEAN": clean, **_constants(gradient)},
                config,
            )
        _sum(parts, gradient)

    _run(QUERY_GRADIENT, batch, launch)


def _item_gradient(batch: Batch, arguments: dict[str, Any], gradient: Tensor) -> None:
    def launch(config: Config) -> None:
        config = _fitted(config, batch)
        grid, parts, slice_queries = _parts(gradient, len(batch.queries), config, "BLOCK_C", "BLOCK_M")
        kernel_helpers.launch(
            item_gradient_kernel,
            grid,
            gradient.device,
            {**arguments, "gradient": parts, "slice_queries": slice_queries},
            _constants(gradient),
            config,
        )
        _sum(parts, gradient)

    _run(ITEM_GRADIENT, batch, launch)


def _run(table: Table, batch: Batch, launch: Callable[[Config], Result]) -> Result:
    precision = kernel_helpers.precision(batch.queries)
    return tuning.run(table, batch.queries, precision, {"dim": batch.queries.shape[1]}, launch)


def _constants(rows: Tensor) -> dict[str, Any]:
    return {
        "DIM": rows.shape[1],
        "PRECISION": kernel_helpers.precision(rows),
        "SCALE": SHARE_SCALE if rows.dtype == torch.float16 else 1.0,
    }


def _parts(gradient: Tensor, others: int, config: Config, own: str, other: str) -> tuple[tuple[int, int], Tensor, int]:
    """Return the grid, its partial sums (slices, rows, d), and the number of the other operand's rows per slice."""
    num_rows, dim = gradient.shape
    blocks = triton.cdiv(num_rows, config.blocks[own]) * triton.cdiv(dim, config.blocks["BLOCK_D"])
    slices, slice_size = _slices(blocks, others, config.blocks[other] * SLICE_TILES)
    parts = gradient[None] if slices == 1 else gradient.new_empty(slices, num_rows, dim, dtype=torch.float32)
    return (blocks, slices), parts, slice_size


def _sum(parts: Tensor, gradient: Tensor) -> None:
    """Sum the slices into the gradient; a single slice is the gradient."""
    if len(parts) == 1:
        return
    config = tuning.default(SLICE_SUM, gradient, "ieee")
    kernel_helpers.launch(
        slice_sum_kernel,
        (triton.cdiv(gradient.numel(), config.blocks["BLOCK"]),),
        gradient.device,
        {"parts": parts, "gradient": gradient, "num_rows": len(gradient), "num_slices": len(parts)},
        {"DIM": gradient.shape[1]},
        config,
    )


def _slices(blocks: int, size: int, step: int) -> tuple[int, int]:
    """Return the number of slices of the other operand that gives enough programs, and the size of each."""
    steps = max(1, triton.cdiv(size, step))
    each = triton.cdiv(steps, max(1, min(kernel_helpers.ENOUGH_PROGRAMS // max(1, blocks), steps)))
    return triton.cdiv(steps, each), each * step


def _fitted(config: Config, batch: Batch) -> Config:
    """Return the configuration with blocks of the inner dimension that are no larger than needed."""
    padded = max(16, triton.next_power_of_2(batch.queries.shape[1]))
    inner = [name for name in ("BLOCK_K", "BLOCK_D") if name in config.blocks]
    return dataclasses.replace(
        config, blocks={**config.blocks, **{name: min(config.blocks[name], padded) for name in inner}}
    )
