"""Causal attention over many packed sequences, without padding."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from xsmoe_kernels.ops.packed_attention import reference
from xsmoe_kernels.runtime import checks, dispatch, registration
from xsmoe_kernels.runtime.declaration import Input, Operator


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    max_length: int,
    lengths: Sequence[int] | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Compute softmax(q k^T / sqrt(d)) v per head; a row attends to itself and to earlier rows of its sequence.

    The softmax is computed in float32. Autocast casts q, k and v, all of which are differentiable.

    Args:
        q, k, v: (M, H, d), one dtype among float32, bfloat16, float16 and float64; M may be 0.
        offsets: (B+1,) int32 or int64 on q's device, ascending within [0, M]; sequence b is the rows
            `offsets[b]:offsets[b+1]`, and may be empty.
        max_length: no sequence is longer; at least 1.
        lengths: the B sequences' lengths as host integers. xformers on CUDA builds its block-diagonal mask from them
            without waiting for the device's offsets. It runs eager calls with lengths, without dropout and without rows
            outside the offsets. Other kernels do not use them, but they are always checked.
        dropout_p: probability in [0, 1) with which an attention weight is dropped; the others are multiplied by
            1 / (1 - dropout_p). Drawn from torch's generator at every call. A module passes 0 in evaluation.

    Returns:
        (M, H, d) in q's dtype, after autocast; rows outside the offsets are zeros.

    Raises:
        TypeError: an argument is no Tensor, of a wrong dtype, max_length no int, dropout_p no float, or lengths no
            sequence of ints.
        ValueError: shapes that do not fit, several devices, max_length or dropout_p out of range, lengths that differ
            from those of the offsets, offsets that descend or are outside [0, M], or a sequence longer than max_length
            (values of offsets are read on a CPU, elsewhere with XSMOE_DEBUG=1).
    """
    if not torch.compiler.is_compiling():
        checks.tensor("q", q, "M", "H", "d")
        checks.tensor("k", k, "M", "H", "d")
        checks.tensor("v", v, "M", "H", "d")
        checks.tensor("offsets", offsets, "B+1")
        if not isinstance(dropout_p, int | float) or isinstance(dropout_p, bool):
            raise TypeError(f"dropout_p must be a float, not {type(dropout_p).__name__}")
        max_length = _check_settings(offsets, max_length, dropout_p)
        if lengths is not None:
            _check_lengths(lengths, offsets, max_length)
    q, k, v = registration.autocast(q, k, v)
    keep = None
    if dropout_p > 0:
        shape = (offsets.shape[0] - 1, q.shape[1], max_length, max_length)
        keep = torch.rand(shape, device=q.device) >= dropout_p
    # A compiled graph would keep these lengths, but each batch has its own.
    host_lengths = None if lengths is None or torch.compiler.is_compiling() or not q.is_cuda else list(lengths)
    return _operator(q, k, v, offsets, max_length, keep, dropout_p, host_lengths, dispatch.requested())


def _check_settings(offsets: Tensor, max_length: int, dropout_p: float) -> int:
    """Check the arguments that the draw of dropout relies on, before it and in the operator; return max_length."""
    if offsets.shape[0] == 0:
        raise ValueError("offsets must have shape (B+1,), not (0,); no sequences at all are offsets of [0]")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must lie in [0, 1), not {dropout_p!r}")
    return checks.integer("max_length", max_length, 1)


def _check_lengths(lengths: Sequence[int], offsets: Tensor, max_length: int) -> None:
    if not isinstance(lengths, Sequence):
        raise TypeError(f"lengths must be a sequence of ints, such as a list, not {type(lengths).__name__}")
    if others := set(map(type, lengths)) - {int}:
        raise TypeError(f"lengths must contain ints only, but has {min(t.__name__ for t in others)}")
    num_sequences = offsets.shape[0] - 1
    if len(lengths) != num_sequences:
        raise ValueError(f"lengths must have {num_sequences} entries, one per sequence of offsets, not {len(lengths)}")
    if lengths and not (min(lengths) >= 0 and max(lengths) <= max_length):
        raise ValueError(
            f"lengths must lie in [0, {max_length}], max_length, but they go from {min(lengths)} to {max(lengths)}"
        )
    if checks.values_visible(offsets) and offsets.diff().tolist() != list(lengths):
        raise ValueError("lengths must be the differences of offsets, but some entry differs")


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    max_length: int,
    keep: Tensor | None,
    dropout_p: float,
) -> None:
    shape = checks.floating("q", q, "M", "H", "d").shape
    checks.floating("k", k, *shape)
    checks.floating("v", v, *shape)
    checks.index("offsets", offsets, "B+1", dtypes=checks.INDEX)
    checks.same_dtype({"q": q, "k": k, "v": v})
    checks.together({"q": q, "k": k, "v": v, "offsets": offsets, "keep": keep})
    _check_settings(offsets, max_length, dropout_p)
    if keep is not None:
        checks.tensor("keep", keep, offsets.shape[0] - 1, shape[1], max_length, max_length)
        if keep.dtype != torch.bool:
            raise TypeError(f"keep must be bool, not {keep.dtype}; kernels read its bytes")
    if not checks.values_visible(offsets):
        return
    bounds = offsets.tolist()
    found = [end - begin for begin, end in pairwise(bounds)]
    # Valid offsets pass by their ends and lengths alone; `ragged` raises the error for others.
    if min(found, default=0) < 0 or bounds[0] < 0 or bounds[-1] > q.shape[0]:
        checks.ragged("offsets", offsets, q.shape[0])
    if (longest := max(found, default=0)) > max_length:
        raise ValueError(f"max_length must be at least {longest}, the longest sequence of offsets, not {max_length}")


def _fake(q: Tensor) -> Tensor:
    return q.new_empty(q.shape)


_operator = registration.define(
    Operator(
        "packed_attention",
        inputs=(
            Input("q", grad=True),
            Input("k", grad=True),
            Input("v", grad=True),
            Input("offsets"),
            Input("max_length", "SymInt"),
            Input("keep", "Tensor?"),
            Input("dropout_p", "float"),
            Input("lengths", "SymInt[]?"),
        ),
        outputs=("y",),
    ),
    reference=reference.forward,
    reference_backward=reference.backward,
    fake=_fake,
    check=_check,
)
