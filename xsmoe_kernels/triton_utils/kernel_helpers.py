"""What Triton kernels share: pieces to build them from, their launch, and the precision of their products."""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from xsmoe_kernels.triton_utils.tuning import Config

ENOUGH_PROGRAMS = 264
"""Two for each multiprocessor of an H100: with fewer, sums over rows are cut into slices."""
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def product(left, right, total, PRECISION: tl.constexpr):
    """`total + left right`, in float32."""
    if INTERPRETED:  # which multiplies the bits of bfloat16 as integers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def narrow(value, like):
    """float32 in the dtype that a pointer points to, rounded to nearest."""
    dtype: tl.constexpr = like.dtype.element_ty
    if INTERPRETED and dtype == tl.bfloat16:  # which it would cut off
        bits = value.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        value = tl.where(value == value, rounded, value)
    return value.to(dtype)


@triton.jit
def sortable(values):
    """Integers in the order of float32 values: the two zeros alike, and every NaN above infinity."""
    bits = tl.where(values == 0, 0.0, values).to(tl.int32, bitcast=True)
    keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(values == values, keys, 0x7FFFFFFF)


@triton.jit
def sorted_value(keys):
    """The float32 values whose `sortable` these are."""
    return tl.where(keys < 0, keys ^ 0x7FFFFFFF, keys).to(tl.float32, bitcast=True)


@triton.jit
def pick(values, index):
    """`values[index]` of a tuple, for an index that is known at run time only."""
    picked = values[0]
    for place in tl.static_range(1, len(values)):
        picked = tl.where(index == place, values[place], picked)
    return picked


@triton.jit
def variable(encoded):
    """The number that `as_variable` was given."""
    return (encoded - 3) // 2


def as_variable(number: int) -> int:
    """A number, coded as one that is odd and above 1.

    Triton compiles a kernel anew for integers that are 1 or divisible by 16, in tuples always; not for these.
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
    """Starts a kernel on the current stream of `device`; nothing for an empty grid.

    Args:
        kernel: what `triton.jit` made.
        grid: how many programs, on up to three axes.
        arguments: by name, what it takes at run time.
        constants: by name, what it is compiled for, other than block sizes.
        config: block sizes and how it is compiled.
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
    """Triton's name for how products of this tensor's dtype multiply: float32 as torch's setting says."""
    if tensor.dtype != torch.float32 or not tensor.is_cuda or torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def wide_precision(tensor: torch.Tensor) -> str:
    """How products of float32 multiply that stand beside products of this tensor's dtype.

    16 bits have no more digits than TF32 has.
    """
    if tensor.dtype == torch.float32:
        return precision(tensor)
    return "ieee" if torch.version.hip is not None else "tf32"


def rows_in_place(rows: torch.Tensor) -> torch.Tensor:
    """Rows whose numbers lie next to each other, copied only where they do not."""
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def rows_aligned(*tensors: torch.Tensor) -> bool:
    """Whether Triton sees that it may load 16 bytes at once from tensors whose rows are in place."""
    return all(
        tensor.data_ptr() % 16 == 0 and all(number % 16 == 0 for number in (*tensor.stride()[:-1], tensor.shape[-1]))
        for tensor in tensors
    )
