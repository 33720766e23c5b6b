"""Matrix products of consecutive groups of rows, each with the weight of its expert."""

import torch
from torch import Tensor

from xsmoe_kernels.ops.grouped_mm import reference
from xsmoe_kernels.runtime import checks, dispatch, registration
from xsmoe_kernels.runtime.declaration import Input, Operator


def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor, *, num_frozen: int = 0) -> Tensor:
    """Multiply the rows `offsets[e]:offsets[e+1]` of x by `weight[e]`, for every expert e.

    Accumulates in float32. Autocast casts x and weight. Both are differentiable. The weight gradient of the leading
    num_frozen experts is zero and is not computed.

    Args:
        x: (M, K), float32, bfloat16, float16 or float64; M may be 0.
        weight: (E, K, P), of x's dtype; E may be 0.
        offsets: (E+1,) int32 or int64 on x's device, ascending within [0, M]. Groups may be empty.
        num_frozen: the number of leading experts without a weight gradient, at most E.

    Returns:
        (M, P) in x's dtype, after autocast; rows outside the offsets are zeros.

    Raises:
        TypeError: an argument is no Tensor, of a wrong dtype, or num_frozen is no int.
        ValueError: shapes that do not fit, several devices, num_frozen out of range, or offsets that descend or are
            outside [0, M] (their values are read on a CPU, elsewhere with XSMOE_DEBUG=1).
    """
    if not torch.compiler.is_compiling():
        checks.tensor("x", x, "M", "K")
        checks.tensor("weight", weight, "E", "K", "P")
        checks.tensor("offsets", offsets, "E+1")
        num_frozen = checks.integer("num_frozen", num_frozen)
    x, weight = registration.autocast(x, weight)
    return _operator(x, weight, offsets, num_frozen, dispatch.requested())


def _check(x: Tensor, weight: Tensor, offsets: Tensor, num_frozen: int) -> None:
    _, inner = checks.floating("x", x, "M", "K").shape
    num_experts, _, _ = checks.floating("weight", weight, "E", inner, "P").shape
    checks.index("offsets", offsets, num_experts + 1, dtypes=checks.INDEX)
    checks.together({"x": x, "weight": weight, "offsets": offsets})
    checks.same_dtype({"x": x, "weight": weight})
    checks.integer("num_frozen", num_frozen, 0, num_experts, bound="the number of experts")
    if checks.values_visible(offsets):
        checks.ragged("offsets", offsets, x.shape[0])


def _fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


_operator = registration.define(
    Operator(
        "grouped_mm",
        inputs=(Input("x", grad=True), Input("weight", grad=True), Input("offsets"), Input("num_frozen", "SymInt")),
        outputs=("y",),
    ),
    reference=reference.forward,
    reference_backward=reference.backward,
    fake=_fake,
    check=_check,
)
