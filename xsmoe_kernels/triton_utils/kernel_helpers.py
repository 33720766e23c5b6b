"""Helpers of all Triton kernels: device functions, the launch, and the precision of products."""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from xsmoe_kernels.triton_utils.tuning import Config

ENOUGH_PROGRAMS = 264
"""Two programs per multiprocessor of an H100; with fewer programs, sums over rows are divided into slices."""
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def product(left, right, total, PRECISION: tl.constexpr):
    """Return `total + left right`, in float32."""
    if INTERPRETED:  # The interpreter multiplies the bits of bfloat16 as integers.
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def narrow(value, like):
    """Round float32 to the dtype of the pointer `like`, to nearest."""
    dtype: tl.constexpr = like.dtype.element_ty
    if INTERPRETED and dtype == tl.bfloat16:  # The interpreter would truncate.
        bits = value.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        value = tl.where(value == value, rounded, value)
    return value.to(dtype)


@triton.jit
def sortable(values):
    """Return integers in the order of float32 values: both zeros are equal, and NaN is above infinity."""
    bits = tl.where(values == 0, 0.0, values).to(tl.int32, bitcast=True)
    keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(values == values, keys, 0x7FFFFFFF)


@triton.jit
def sorted_value(keys):
    """Return the float32 values for results of `sortable`."""
    return tl.where(keys < 0, keys ^ 0x7FFFFFFF, keys).to(tl.float32, bitcast=True)


@triton.jit
def pick(values, index):
    """Return `values[index]` of a tuple for a run-time index."""
    picked = values[0]
    for place in tl.static_range(1, len(values)):
        picked = tl.where(index == place, values[place], picked)
    return picked


@triton.jit
def variable(encoded):
    """Decode a result of `as_variable`."""
    return (encoded - 3) // 2


def as_variable(number: int) -> int:
    """Encode a number as an odd one above 1.

    Triton compiles another binary for integers that are 1 or divisible by 16, and cannot be told otherwise in tuples.
    """
    return 2 * number + 3


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    arguments: Mapping[str, Any],
    constants: Mapping[str, Any],
    config: Config,
) -> None:
    """Launch a kernel on the current stream of `device`; an empty grid launches nothing.

    Args:
        kernel: a function decorated with `triton.jit`.
        grid: the number of programs on up to three axes.
        arguments: run-time arguments, by name.
        constants: compile-time arguments other than block sizes, by name.
        config: block sizes and compile options.
    """
    if 0 in grid:
        return
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](**arguments, **constants, **config.blocks, **options)
    else:
        kernel[grid](**arguments, **constants, **config.blocks, **options)


def precision(tensor: torch.Tensor) -> str:
    """Return Triton's name for the precision of products of this dtype; torch's setting decides for float32."""
    if tensor.dtype != torch.float32 or not tensor.is_cuda or torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def wide_precision(tensor: torch.Tensor) -> str:
    """Return the precision of float32 products next to products of this tensor's dtype.

    TF32 is enough next to 16-bit operands, which have no more digits.
    """
    if tensor.dtype == torch.float32:
        return precision(tensor)
    return "ieee" if torch.version.hip is not None else "tf32"


def rows_in_place(rows: torch.Tensor) -> torch.Tensor:
    """Return rows with a stride of 1 between numbers, copied only if necessary."""
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def rows_aligned(*tensors: torch.Tensor) -> bool:
    """Return whether Triton may load 16 bytes at once from tensors whose numbers have a stride of 1 in a row."""
    return all(
        tensor.data_ptr() % 16 == 0 and all(number % 16 == 0 for number in (*tensor.stride()[:-1], tensor.shape[-1]))
        for tensor in tensors
    )
