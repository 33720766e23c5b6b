"""Softmax cross-entropy over the items of a batch, with logQ correction."""

from typing import Any

import torch
from torch import Tensor

from xsmoe_kernels.ops.in_batch_softmax_loss import reference
from xsmoe_kernels.runtime import checks, dispatch, precision, registration
from xsmoe_kernels.runtime.declaration import Input, Operator, by_name

_NAME = "in_batch_softmax_loss"


def in_batch_softmax_loss(
    queries: Tensor,
    items: Tensor,
    targets: Tensor,
    rejected: Tensor,
    *,
    users: Tensor | None = None,
    logq: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """Compute the mean cross-entropy of each query's target against the items of the batch as negatives.

    With z_i = q.e_i - logq_i, the loss of a query with target t is
    `-z_t + log(exp(z_t) + sum of counts_i exp(z_i))`, the sum over all items except t and those the query
    rejects. A query that rejects all of them has loss 0. Subtracting logq makes the sampled softmax estimate the full
    one (arXiv 2508.05993; Bengio and Senecal, 2008). Accumulates in float32. Autocast casts queries and items only.
    Forward and backward hold the logits of some queries at a time: 2^18 in plain PyTorch, or one query's if C is
    larger; on a CPU half a million, or a quarter of the number of gradient elements if that is more. Queries and items
    are differentiable, logq and counts are not.

    Args:
        queries: (M, d), float32, bfloat16, float16 or float64; M may be 0.
        items: (C, d), of queries' dtype, distinct items, finite. Items that are no query's target may have any values,
            NaN too, if their count is 0 or every query rejects them.
        targets: (M,) int64, the row in items of each query's target.
        rejected: (M, W) int64, rows in items that are not negatives of the query, -1 for none; or (B, W) with users. W
            may be 0. The target is a candidate even if it is rejected.
        users: (M,) int64, each query's row in rejected; None: rejected has a row per query.
        logq: (C,) floating, the logarithm of each item's probability of being sampled; None subtracts nothing.
        counts: (C,), any real dtype, cast to that of the loss: the number of times that each item is in the batch. A
            negative is counted that many times, 0 for never, and a target once; None counts every item once.

    Returns:
        A scalar, float32 (float64 for float64). M = 0 gives 0 and zero gradients.

    Raises:
        TypeError: an argument is no Tensor, or of a wrong dtype.
        ValueError: shapes that do not fit, several devices, targets, rejected or users out of range, or counts below
            0 (values are read on a CPU, elsewhere with XSMOE_DEBUG=1).
    """
    if not torch.compiler.is_compiling():
        checks.tensor("queries", queries, "M", "d")
        checks.tensor("items", items, "C", "d")
        checks.tensor("targets", targets, "M")
        checks.tensor("rejected", rejected, "M" if users is None else "B", "W")
        if users is not None:
            checks.tensor("users", users, "M")
        if logq is not None:
            checks.tensor("logq", logq, "C")
        if counts is not None and checks.tensor("counts", counts, "C").is_complex():
            raise TypeError(f"counts must be of a real dtype, not {counts.dtype}")
    queries, items = registration.autocast(queries, items)
    if counts is not None:
        # Some unsigned dtypes do not support comparisons.
        counts = counts.to(precision.wide_dtype(items.dtype))
    backend = dispatch.requested()
    # Native kernels compute the gradients with the loss, while the logits are in cache, which saves a product.
    ahead = torch.is_grad_enabled() and dispatch.select(_NAME, backend, items.device, items.dtype) == "native"
    needs = ahead and queries.requires_grad, ahead and items.requires_grad
    loss, *_ = _operator(queries, items, targets, rejected, users, logq, counts, *needs, backend)
    return loss


def _check(
    queries: Tensor,
    items: Tensor,
    targets: Tensor,
    rejected: Tensor,
    users: Tensor | None,
    logq: Tensor | None,
    counts: Tensor | None,
) -> None:
    num_queries, dim = checks.floating("queries", queries, "M", "d").shape
    num_items, _ = checks.floating("items", items, "C", dim).shape
    checks.index("targets", targets, num_queries)
    checks.index("rejected", rejected, num_queries if users is None else "B", "W")
    if users is not None:
        checks.index("users", users, num_queries)
    if logq is not None:
        checks.floating("logq", logq, num_items)
    if counts is not None:
        checks.floating("counts", counts, num_items)
    checks.same_dtype({"queries": queries, "items": items})
    checks.together(
        {
            "queries": queries,
            "items": items,
            "targets": targets,
            "rejected": rejected,
            "users": users,
            "logq": logq,
            "counts": counts,
        }
    )
    if not checks.values_visible(queries):
        return
    checks.in_range("targets", targets, 0, num_items)
    checks.in_range("rejected", rejected, -1, num_items)
    if users is not None:
        checks.in_range("users", users, 0, rejected.shape[0])
    if counts is not None and not bool((counts >= 0).all()):
        raise ValueError("counts must be 0 or more everywhere, but some are negative or NaN")


def _fake(
    queries: Tensor, items: Tensor, need_queries: bool, need_items: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = precision.wide_dtype(items.dtype)
    loss, lse = items.new_empty((), dtype=dtype), items.new_empty(queries.shape[0], dtype=dtype)
    grad_queries = queries.new_empty(queries.shape if need_queries else 0)
    return loss, lse, grad_queries, items.new_empty(items.shape if need_items else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    *tensors, need_queries, need_items, ctx.backend = inputs
    _, lse, *gradients = output
    ctx.mark_non_differentiable(lse, *gradients)
    # Backward would receive zeros for the gradients of these outputs otherwise.
    ctx.set_materialize_grads(False)
    ctx.ahead = need_queries, need_items
    ctx.save_for_backward(*tensors, lse, *gradients)


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    need_queries, need_items, *_rest = ctx.needs_input_grad
    *tensors, ahead_queries, ahead_items = ctx.saved_tensors
    ahead = (ahead_queries, ahead_items) if ctx.ahead == (need_queries, need_items) else (None, None)
    if ahead[0] is not None and _may_overwrite(ctx, grad):
        found = ahead_queries, ahead_items
        if len(tensors[0]) and grad != 1:
            found = ahead_queries.mul_(grad), ahead_items.mul_(grad)
    else:
        found = _backward_operator(*tensors, *ahead, grad, need_queries, need_items, ctx.backend)
    return found[0] if need_queries else None, found[1] if need_items else None, *(None,) * 8


def _may_overwrite(ctx: Any, grad: Tensor) -> bool:
    """Return whether gradients that forward computed may be returned without a copy, because no later backward reads
    them. Only hooks on saved tensors can have kept them."""
    # A compiler's tensors have their own class, and no values to read.
    return type(grad) is Tensor and not torch.is_grad_enabled() and registration.last_backward(ctx, grad)


_INPUTS = (
    Input("queries", grad=True),
    Input("items", grad=True),
    Input("targets"),
    Input("rejected"),
    Input("users", "Tensor?"),
    Input("logq", "Tensor?"),
    Input("counts", "Tensor?"),
)
_NEEDS = (Input("need_queries", "bool"), Input("need_items", "bool"))
# Forward may return the gradients, which the derived autograd does not support.
_AHEAD = (Input("lse"), Input("ahead_queries", "Tensor?"), Input("ahead_items", "Tensor?"))

_forward = Operator(_NAME, inputs=(*_INPUTS, *_NEEDS), outputs=("loss", "lse", "ahead_queries", "ahead_items"))
_operator = registration.register(
    _forward,
    reference=reference.forward,
    fake=by_name(_fake, _forward.names),
    check=by_name(_check, _forward.names),
    setup_context=_setup_context,
    backward=_backward,
)
_backward_operator = registration.define_backward(
    Operator(f"{_NAME}_backward", inputs=(*_INPUTS, *_AHEAD, Input("grad"), *_NEEDS), outputs=("queries", "items")),
    reference=reference.backward,
)
