"""`side_moe`: the public function, its declaration, checks and shapes."""

from typing import Any

import torch
from torch import Tensor

from xsmoe_kernels.ops.side_moe import reference
from xsmoe_kernels.ops.side_moe.checks import check_level, check_types
from xsmoe_kernels.ops.side_moe.frozen_experts import FrozenExperts
from xsmoe_kernels.ops.side_moe.utilization import Utilization
from xsmoe_kernels.runtime import checks, dispatch, registration
from xsmoe_kernels.runtime.declaration import Input, Operator
from xsmoe_kernels.runtime.precision import wide_dtype


def side_moe(
    x: Tensor,
    backbone: Tensor,
    router: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    num_frozen: int = 0,
    frozen: FrozenExperts | None = None,
    activation: str = "gelu",
    utilization: Utilization | None = None,
    row_weight: Tensor | None = None,
    recompute: bool | None = None,
) -> Tensor:
    """Compute a side level: a softmax mixture of the backbone's row and of E residual experts of rank R.

        g = softmax(x router^T)                          # gates of the backbone and of experts 1 .. E
        f_e(x) = x + activation(x down_e^T) up_e
        y = g_0 backbone + sum_e g_e f_e(x)

    (arXiv 2508.05993). Neither forward nor backward allocates a tensor of N * E * D elements. Differentiable once, with
    respect to x, backbone, router, down and up; only needed gradients are computed. Under `torch.autocast` these
    tensors and the frozen weights are cast, `row_weight` is not. The call never synchronizes with the host.

    Args:
        x: (N, D), the side network's state; or (1, D), one state for all N rows, which costs one row of expert work.
        backbone: (N, D), hidden states of the frozen encoder.
        router: (E+1, D), row 0 gates the backbone, row e expert e.
        down: (E, R, D), the experts' down projections.
        up: (E, R, D), their up projections.
        num_frozen: the number of leading experts without a weight gradient. The gradients of `down` and `up` keep their
            full shape, and are zero for these experts. Gradients flow through all experts to `x` and `router`.
        frozen: frozen experts in front of those of `down` and `up`, which then contain trainable experts only, possibly
            none. E counts both. Cannot be combined with `num_frozen`.
        activation: "gelu" (exact), "gelu_tanh" (its tanh approximation) or "relu".
        utilization: counters to which this call's rows are added in place, once even if activation checkpointing runs
            the forward again; None counts nothing.
        row_weight: (N,), floating: how much each row counts in `utilization`; 1 if None. Has no gradient.
        recompute: False saves `x down^T` with E*R columns for backward; True computes it again in backward; None saves
            it if it is at most twice as wide as x.

    All tensors are on one device, and all but `row_weight` have one dtype: float32, bfloat16, float16 or float64. Any
    number of rows and any strides are accepted.

    Returns:
        y, (N, D), of the inputs' dtype.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: shapes or devices that do not match, an unknown activation, `num_frozen` above E or together with
            `frozen`, or a `utilization` of another number of experts.
        BackendUnavailable: the backend requested with `use_backend` cannot run the call.
    """
    operands = prepare(
        x, backbone, router, down, up, num_frozen, frozen, activation, utilization, row_weight, recompute
    )
    return apply(operands, utilization)


def prepare(
    x: Tensor,
    backbone: Tensor,
    router: Tensor,
    down: Tensor,
    up: Tensor,
    num_frozen: int,
    frozen: FrozenExperts | None,
    activation: str,
    utilization: Utilization | None,
    row_weight: Tensor | None,
    recompute: bool | None,
) -> tuple[Any, ...]:
    """Return the operator's arguments for those of `side_moe`; checks their types in eager mode."""
    if not torch.compiler.is_compiling():
        check_types(x, backbone, router, down, up, utilization, row_weight)
        num_frozen = checks.integer("num_frozen", num_frozen)
        if frozen is not None and not isinstance(frozen, FrozenExperts):
            raise TypeError(f"frozen must be a FrozenExperts or None, not {type(frozen).__name__}")
        if not isinstance(activation, str):
            raise TypeError(f"activation must be a str, not {type(activation).__name__}")
        if recompute is not None:
            checks.flag("recompute", recompute)
    x, backbone, router, down, up = registration.autocast(x, backbone, router, down, up)
    frozen_down = frozen_up = frozen_pack = None
    if frozen is not None:
        frozen = frozen.to(registration.autocast_dtype(frozen.down))
        frozen_down, frozen_up, frozen_pack = frozen.down, frozen.up, frozen.pack()
    if recompute is None:
        saved_columns, dim = (router.shape[0] - 1) * down.shape[1], x.shape[1]
        recompute = not torch.is_grad_enabled() or saved_columns > 2 * dim
    return (
        x,
        backbone,
        router,
        down,
        up,
        frozen_down,
        frozen_up,
        frozen_pack,
        None if row_weight is None else row_weight.detach(),
        num_frozen,
        recompute,
        utilization is not None,
        activation,
        dispatch.requested(),
    )


def apply(operands: tuple[Any, ...], utilization: Utilization | None) -> Tensor:
    """Run the operator on the result of `prepare` and update the counters."""
    y, _, _, norm, gate = _operator(*operands)
    if utilization is not None:
        utilization.add_(norm, gate)
    return y


def fake(
    x: Tensor, backbone: Tensor, router: Tensor, down: Tensor, recompute: bool, count: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return empty results of the operator's shapes and dtypes."""
    gated = router.shape[0]
    gates = x.new_empty((x.shape[0], gated), dtype=wide_dtype(x.dtype))
    hidden_shape = (0,) if recompute else (x.shape[0], (gated - 1) * down.shape[1])
    counted = (gated,) if count else (0,)
    return (
        backbone.new_empty(backbone.shape),
        gates,
        x.new_empty(hidden_shape),
        gates.new_empty(counted),
        gates.new_empty(counted),
    )


OPERATOR = Operator(
    "side_moe",
    inputs=(
        Input("x", grad=True),
        Input("backbone", grad=True),
        Input("router", grad=True),
        Input("down", grad=True),
        Input("up", grad=True),
        Input("frozen_down", "Tensor?"),
        Input("frozen_up", "Tensor?"),
        Input("frozen_pack", "Tensor?"),
        Input("row_weight", "Tensor?", backward=False),
        Input("num_frozen", "SymInt"),
        Input("recompute", "bool"),
        Input("count", "bool", backward=False),
        Input("activation", "str"),
    ),
    outputs=("y", "gates", "hidden", "norm", "gate"),
    saved=("gates", "hidden"),
)
_operator = registration.define(
    OPERATOR,
    reference=reference.forward,
    reference_backward=reference.backward,
    fake=fake,
    check=check_level,
)
