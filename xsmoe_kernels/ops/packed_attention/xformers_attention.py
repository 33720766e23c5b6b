"""`packed_attention` with xformers' block-diagonal causal attention."""

import functools
import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Operators(NamedTuple):
    """A matching pair of xformers' operators for forward and backward."""

    forward: Any
    backward: Any


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
    """Return the attended values (M, H, d)."""
    if q.numel() == 0:
        return torch.empty_like(q)
    rows = _batch(q, k, v)
    found = _operators(rows)
    assert isinstance(found, _Operators)
    mask = _mask(offsets, max_length, lengths)
    attended = _fmha().memory_efficient_attention_forward(*rows, mask, op=found.forward)
    return _unbatch(attended, q)


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
) -> tuple[Tensor, ...]:
    """Return the gradients of q, k and v, each (M, H, d); `grad` is that of the result."""
    needs = (need_q, need_k, need_v)
    if q.numel() == 0:
        return tuple(q.new_empty(q.shape if need else 0) for need in needs)
    fmha, rows = _fmha(), _batch(q, k, v)
    found = _operators(rows)
    assert isinstance(found, _Operators)
    mask = _mask(offsets, max_length, lengths)
    # Forward runs again, because the form of its normalizers depends on the operator that runs.
    attended, normalizers = fmha.memory_efficient_attention_forward_requires_grad(*rows, mask, op=found.forward)
    gradients = fmha.memory_efficient_attention_backward(
        *_batch(grad), attended, normalizers, *rows, mask, op=found.backward
    )
    return tuple(_unbatch(g, q) if need else q.new_empty(0) for g, need in zip(gradients, needs, strict=True))


def rejects_forward(device: torch.device, dtype: torch.dtype, *arguments: Any) -> str | None:
    """Return why xformers cannot run a call of `forward`; without arguments, a typical one of that dtype."""
    if isinstance(reason := _fmha(), str):
        return reason
    if not arguments:
        q = torch.empty(8, 1, 64, device=device, dtype=dtype)
        arguments = (q, q, q, torch.tensor([0, 8], device=device), 8, None, 0.0, [8])
    q, k, v, _, _, keep, _, lengths = arguments
    if keep is not None:
        return "xformers draws its own dropout, and another one in backward; pass dropout_p = 0"
    if lengths is None:
        return "xformers needs lengths, the sequences' lengths on the host, and eager code"
    if sum(lengths) != q.shape[0]:
        return f"xformers needs sequences that cover all rows, but lengths sum to {sum(lengths)} of {q.shape[0]}"
    if q.numel() == 0:
        return None
    found = _operators(_batch(q, k, v))
    return None if isinstance(found, _Operators) else found


def rejects_backward(device: torch.device, dtype: torch.dtype, *arguments: Any) -> str | None:
    """Return the same for `backward`, so that it runs where its forward ran."""
    return rejects_forward(device, dtype, *arguments[1:9])


@functools.cache
def _fmha() -> Any:
    """Return xformers' module, or why there is none; cached, because a failing import is slow at every call."""
    try:
        return importlib.import_module("xformers.ops.fmha")
    except Exception as error:
        return f"xformers cannot be imported: {error}"


def _mask(offsets: Tensor, max_length: int, lengths: Sequence[int] | None) -> Any:
    """Return the block-diagonal mask from lengths on the host and their sums on the device."""
    assert lengths is not None
    mask = _host_mask(list(lengths))
    # The offsets are those sums; copying them again would bind a CUDA graph to host memory. A captured graph must work
    # for other offsets too, and therefore for all lengths that the call allows.
    mask.q_seqinfo.seqstart = mask.k_seqinfo.seqstart = offsets.to(torch.int32).contiguous()
    mask.q_seqinfo.max_seqlen = mask.k_seqinfo.max_seqlen = max_length
    return mask


def _host_mask(lengths: list[int]) -> Any:
    return _fmha().attn_bias.BlockDiagonalCausalMask.from_seqlens(lengths, device=torch.device("cpu"))


def _operators(rows: Sequence[Tensor]) -> _Operators | str:
    """Return the operators that support these rows, or why there are none; the ends of sequences do not matter."""
    fmha, reasons = _fmha(), []
    inputs = fmha.Inputs(*rows, _host_mask([rows[0].shape[1]]))
    for pair in (fmha.MemoryEfficientAttentionFlashAttentionOp, fmha.MemoryEfficientAttentionCutlassOp):
        why = [f"{one.NAME}: {reason}" for one in pair for reason in one.not_supported_reasons(inputs)]
        if not why:
            return _Operators(*pair)
        reasons += why
    return f"xformers has no kernel for this call ({'; '.join(reasons)})"


def _batch(*rows: Tensor) -> list[Tensor]:
    """Convert (M, H, d) to (1, M, H, d) with a last dimension of stride 1, which xformers needs."""
    return [(t if t.stride(-1) == 1 else t.contiguous()).unsqueeze(0) for t in rows]


def _unbatch(rows: Tensor, like: Tensor) -> Tensor:
    # An operator's result must not be a view, or the caller could not change it in place.
    unbatched: Tensor = torch.ops.aten._unsafe_view(rows, like.shape)
    return unbatched
