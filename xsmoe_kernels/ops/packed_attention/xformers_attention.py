"""`packed_attention` by xformers' block-diagonal causal attention."""

import functools
import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Passes(NamedTuple):
    """xformers' operators for forward and backward that agree on what goes from one to the other."""

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
    """The attended values (M, H, d)."""
    if q.numel() == 0:
        return torch.empty_like(q)
    rows = _batch(q, k, v)
    found = _passes(rows)
    assert isinstance(found, _Passes)
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
    """The gradients of q, k and v, each (M, H, d); `grad` is that of the result."""
    needs = (need_q, need_k, need_v)
    if q.numel() == 0:
        return tuple(q.new_empty(q.shape if need else 0) for need in needs)
    fmha, rows = _fmha(), _batch(q, k, v)
    found = _passes(rows)
    assert isinstance(found, _Passes)
    mask = _mask(offsets, max_length, lengths)
    # Forward runs again: the form in which its normalizers would be saved depends on the operator that runs.
    attended, normalizers = fmha.memory_efficient_attention_forward_requires_grad(*rows, mask, op=found.forward)
    gradients = fmha.memory_efficient_attention_backward(
        *_batch(grad), attended, normalizers, *rows, mask, op=found.backward
    )
    return tuple(_unbatch(g, q) if need else q.new_empty(0) for g, need in zip(gradients, needs, strict=True))


def rejects_forward(device: torch.device, dtype: torch.dtype, *arguments: Any) -> str | None:
    """Why xformers cannot serve a call of `forward`; without arguments, an ordinary one of that dtype."""
    if isinstance(reason := _fmha(), str):
        return reason
    if not arguments:
        q = torch.empty(8, 1, 64, device=device, dtype=dtype)
        arguments = (q, q, q, torch.tensor([0, 8], device=device), 8, None, 0.0, [8])
    q, k, v, _, _, keep, _, lengths = arguments
    if keep is not None:
        return "xformers draws dropout by itself, and not the same in backward; pass dropout_p = 0"
    if lengths is None:
        return "xformers needs lengths, the sequences' lengths on the host, and eager code"
    if sum(lengths) != q.shape[0]:
        return f"xformers takes sequences that cover all rows, but lengths sum to {sum(lengths)} of {q.shape[0]}"
    if q.numel() == 0:
        return None
    found = _passes(_batch(q, k, v))
    return None if isinstance(found, _Passes) else found


def rejects_backward(device: torch.device, dtype: torch.dtype, *arguments: Any) -> str | None:
    """The same for `backward`, so that it runs where its forward did."""
    return rejects_forward(device, dtype, *arguments[1:9])


@functools.cache
def _fmha() -> Any:
    """xformers' module, or why there is none: an import that failed would fail anew, and slowly, at each call."""
    try:
        return importlib.import_module("xformers.ops.fmha")
    except Exception as error:
        return f"xformers cannot be imported: {error}"


def _mask(offsets: Tensor, max_length: int, lengths: Sequence[int] | None) -> Any:
    """The block-diagonal mask, which takes lengths on the host and their sums on the device."""
    assert lengths is not None
    mask = _host_mask(list(lengths))
    # The offsets are those sums: copying them anew would bind a CUDA graph to memory of the host. What it is captured
    # with has to do for other offsets too, and so for all lengths that the call allows.
    mask.q_seqinfo.seqstart = mask.k_seqinfo.seqstart = offsets.to(torch.int32).contiguous()
    mask.q_seqinfo.max_seqlen = mask.k_seqinfo.max_seqlen = max_length
    return mask


def _host_mask(lengths: list[int]) -> Any:
    return _fmha().attn_bias.BlockDiagonalCausalMask.from_seqlens(lengths, device=torch.device("cpu"))


def _passes(rows: Sequence[Tensor]) -> _Passes | str:
    """The operators that take these rows, or why there are none; where sequences end does not matter to them."""
    fmha, reasons = _fmha(), []
    inputs = fmha.Inputs(*rows, _host_mask([rows[0].shape[1]]))
    for passes in (fmha.MemoryEfficientAttentionFlashAttentionOp, fmha.MemoryEfficientAttentionCutlassOp):
        why = [f"{one.NAME}: {reason}" for one in passes for reason in one.not_supported_reasons(inputs)]
        if not why:
            return _Passes(*passes)
        reasons += why
    return f"xformers has no kernel for it ({'; '.join(reasons)})"


def _batch(*rows: Tensor) -> list[Tensor]:
    """(M, H, d) -> (1, M, H, d), whose last dimension xformers wants dense."""
    return [(t if t.stride(-1) == 1 else t.contiguous()).unsqueeze(0) for t in rows]


def _unbatch(rows: Tensor, like: Tensor) -> Tensor:
    # An operator's result must be no view, or the caller could not change it in place.
    unbatched: Tensor = torch.ops.aten._unsafe_view(rows, like.shape)
    return unbatched
