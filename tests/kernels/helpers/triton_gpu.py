"""Device of the tests of Triton kernels: a GPU if there is one, else Triton's interpreter."""

import dataclasses
import functools
import mmap
from typing import Any

import pytest
import torch
from torch import Tensor

from xsmoe_kernels.runtime import dispatch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_reason = dispatch.unavailable_reason("side_moe", "triton", DEVICE, torch.float32)
needs_triton = pytest.mark.skipif(_reason is not None, reason=_reason or "")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")


def spread(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Return the same numbers with the given strides, in memory of which only the used pages exist."""
    length = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, stride, strict=True))
    if ON_GPU:
        far = torch.empty(0, dtype=tensor.dtype, device=DEVICE).new_zeros(length)
    else:
        pages = mmap.mmap(-1, length * tensor.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        far = torch.frombuffer(pages, dtype=tensor.dtype)
    return far.as_strided(tensor.shape, stride).copy_(tensor)


def reverse_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the interpreter run a kernel's programs in reverse order; on a GPU the order is arbitrary."""
    if ON_GPU:
        return
    from triton.runtime.interpreter import interpreter_builder

    def set_grid_idx(x: int, y: int, z: int) -> None:
        columns, rows, _ = interpreter_builder.grid_dim
        interpreter_builder.grid_idx = (columns - 1 - x, rows - 1 - y, z)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", set_grid_idx)


def leave_memory_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevent the interpreter from copying arguments back: they are on the CPU, and too large."""
    if not ON_GPU:
        monkeypatch.setattr("triton.runtime.interpreter.GridExecutor._restore_args_dev", lambda *_: None)


def _patch_once() -> None:
    """Make Triton's interpreter patch its language once per launch, not once per function call.

    Later patches change nothing, but searching for them is half of the time of these tests.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def patch_if_needed(function: Any) -> Any:
        used = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        return patch(function) if any(tl.core.is_builtin(language.load) for language in used) else None

    interpreter._patch_lang = patch_if_needed


def _xor_at_once() -> None:
    """Make Triton's interpreter reduce by exclusive or in one step, not per number; all sorting does it."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import ReduceOps

    reduce = ReduceOps.generic_reduce

    def reduce_faster(self: Any, values: Any) -> Any:
        if self.combine_fn != tl.standard._xor_combine or self.axis is None:
            return reduce(self, values)
        (value,) = values
        reduced = np.bitwise_xor.reduce(value.handle.data, self.axis, keepdims=self.keep_dims)
        return [self.to_tensor(reduced, value.dtype)]

    ReduceOps.generic_reduce = reduce_faster


def _look_up_once() -> None:
    """Make Triton's interpreter look up NumPy's type for its own type, without a list of all each time."""
    from triton.runtime import interpreter

    list_all = interpreter._get_np_dtype
    known = functools.cache(list_all)
    interpreter._get_np_dtype = lambda of: list_all(of) if of.scalar.is_ptr() else known(of.scalar)


def _leave_out_sanitizer() -> None:
    """Prevent Triton's interpreter from computing sums and products twice for an assertion that it skips.

    It asserts nothing unless its option `debug` is set, which nothing sets.
    """
    from triton.runtime.interpreter import interpreter_builder

    assert not interpreter_builder.options.debug
    interpreter_builder.options = dataclasses.replace(interpreter_builder.options, sanitize_overflow=False)


if _reason is None and not ON_GPU:
    _patch_once()
    _xor_at_once()
    _look_up_once()
    _leave_out_sanitizer()
