"""Causal attention within packed sequences in plain PyTorch: the specification of `packed_attention`."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from xsmoe_kernels.runtime import precision


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    max_length: int,
    keep: Tensor | None,
    dropout_p: float,
    lengths: Sequence[int] | None,
) -> Tensor:
    """Return the attended values (M, H, d), zeros in rows outside the offsets. `lengths` is not used."""
    index = _places(offsets, max_length, q.shape[0])
    # Padding is on the right, where causal queries never attend: it needs no mask.
    queries, keys, values = (_pad(t, index) for t in (q, k, v))
    if keep is None:
        padded = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    else:
        weights = _attention_weights(queries, keys)
        padded = ((weights * _dropout(keep, dropout_p, weights.dtype)) @ precision.widen(values)).to(q.dtype)
    return _unpad(padded, index, q.shape[0])


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    max_length: int,
    keep: Tensor | None,
    dropout_p: float,
    lengths: Sequence[int] | None,
    need_q: bool,
    need_k: bool,
    need_v: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, each (M, H, d); `grad` is that of the result."""
    index = _places(offsets, max_length, q.shape[0])
    upstream, queries, keys, values = (precision.widen(_pad(t, index)) for t in (grad, q, k, v))
    weights = _attention_weights(queries, keys)
    factor = None if keep is None else _dropout(keep, dropout_p, weights.dtype)
    kept = weights if factor is None else weights * factor
    grad_weights = upstream @ values.mT
    if factor is not None:
        grad_weights *= factor
    # A softmax's gradient; the scale of the scores is part of it.
    grad_scores = weights * (grad_weights - (grad_weights * weights).sum(-1, keepdim=True)) / math.sqrt(q.shape[-1])
    padded = (
        grad_scores @ keys if need_q else None,
        grad_scores.mT @ queries if need_k else None,
        kept.mT @ upstream if need_v else None,
    )
    grad_q, grad_k, grad_v = (q.new_empty(0) if t is None else _unpad(t.to(q.dtype), index, q.shape[0]) for t in padded)
    return grad_q, grad_k, grad_v


def _places(offsets: Tensor, max_length: int, num_rows: int) -> Tensor:
    """Return the row at each position of each sequence (B, max_length); num_rows where there is none."""
    row = offsets[:-1, None] + torch.arange(max_length, device=offsets.device)
    return torch.where(row < offsets[1:, None], row, num_rows)


def _pad(rows: Tensor, index: Tensor) -> Tensor:
    """Convert (M, H, d) to (B, H, max_length, d), with zeros after the end of a sequence."""
    extended = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])
    return extended[index].transpose(1, 2)


def _unpad(padded: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """Convert (B, H, max_length, d) to (M, H, d), with zeros in rows of no sequence."""
    rows = padded.transpose(1, 2).flatten(0, 1)
    unpadded = rows.new_zeros(num_rows + 1, *rows.shape[1:]).index_copy_(0, index.flatten(), rows)
    # An operator's result must not be a view, or the caller could not change it in place.
    return unpadded[:-1].clone()


def _attention_weights(queries: Tensor, keys: Tensor) -> Tensor:
    """Return the attention weights (B, H, max_length, max_length) before dropout."""
    scores = precision.widen(queries) @ precision.widen(keys).mT / math.sqrt(queries.shape[-1])
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill_(future, -torch.inf).softmax(-1)


def _dropout(keep: Tensor, dropout_p: float, dtype: torch.dtype) -> Tensor:
    return keep.to(dtype) / (1 - dropout_p)
