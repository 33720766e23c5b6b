"""`side_moe`: the public function, its checks, schema, shapes and autograd."""

from typing import Any

import torch
from torch import Tensor

from xsmoe_kernels import checks, dispatch, library
from xsmoe_kernels.precision import wide_dtype
from xsmoe_kernels.side_moe import reference
from xsmoe_kernels.side_moe.frozen import FrozenExperts
from xsmoe_kernels.side_moe.utilization import Utilization


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
    """One level of a side network: a softmax mixture of the backbone's row and of E residual experts of rank R.

        g = softmax(x router^T)                          # gates of the backbone and of experts 1 .. E
        f_e(x) = x + activation(x down_e^T) up_e
        y = g_0 backbone + sum_e g_e f_e(x)

    (arXiv 2508.05993), without a tensor of N * E * D elements, forward or backward. Differentiable once, with respect
    to x, backbone, router, down and up; only the gradients that are needed are computed. Under `torch.autocast` these
    and the frozen weights are cast, `row_weight` is not. Nothing here synchronises with the host.

    Args:
        x: (N, D), the side network's state; or (1, D), one state for all N rows, which costs one row of expert work.
        backbone: (N, D), hidden states of the frozen encoder.
        router: (E+1, D), row 0 gates the backbone, row e expert e.
        down: (E, R, D), the experts' down projections.
        up: (E, R, D), their up projections.
        num_frozen: the leading experts that take no weight gradient: the gradients of `down` and `up` keep their full
            shape, and are zero there. Gradients flow through all experts to `x` and `router`.
        frozen: frozen experts that come before those of `down` and `up`, which then hold trainable experts only,
            perhaps none; E counts both. Not together with `num_frozen`.
        activation: "gelu" (exact), "gelu_tanh" (its tanh approximation) or "relu".
        utilization: counters that grow in place by this call's rows, once even if activation checkpointing runs the
            forward again; None counts nothing.
        row_weight: (N,), floating: how much each row counts in `utilization`; 1 if None. Has no gradient.
        recompute: True saves nothing of E*R columns for backward, which computes `x down^T` again; False saves it; None
            saves it where it is at most twice as wide as x.

    All tensors share one device, and all but `row_weight` one dtype: float32, bfloat16, float16 or float64. Any number
    of rows and any strides are accepted.

    Returns:
        y, (N, D), of the inputs' dtype.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: shapes or devices that do not match, an unknown activation, `num_frozen` above E or together with
            `frozen`, or a `utilization` of another number of experts.
        BackendUnavailable: the backend asked for with `use_backend` cannot serve the call.
    """
    if not torch.compiler.is_compiling():
        check_arguments(
            x, backbone, router, down, up, num_frozen, frozen, activation, utilization, row_weight, recompute
        )
    x, backbone, router, down, up = library.autocast(x, backbone, router, down, up)
    frozen_down, frozen_up = (None, None) if frozen is None else library.autocast(frozen.down, frozen.up)
    if recompute is None:
        saved_columns, dim = (router.shape[0] - 1) * down.shape[1], x.shape[1]
        recompute = not torch.is_grad_enabled() or saved_columns > 2 * dim
    count = utilization is not None
    y, _, _, norm, gate = torch.ops.xsmoe.side_moe(
        x,
        backbone,
        router,
        down,
        up,
        frozen_down,
        frozen_up,
        row_weight.detach() if count and row_weight is not None else None,
        num_frozen,
        recompute,
        count,
        activation,
        dispatch.requested(),
    )
    if utilization is not None:
        utilization.add_(norm, gate)
    return y


def check_arguments(
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
) -> None:
    """Raises what `side_moe` promises to raise, from types, dtypes, shapes and devices alone."""
    rows, dim = checks.floating("backbone", backbone, "N", "D").shape
    checks.floating("x", x, "N", dim)
    if x.shape[0] not in (1, rows):
        raise ValueError(f"x must have the {rows} rows of backbone, or a single row for all of them, not {x.shape[0]}")
    checks.floating("router", router, "E+1", dim)
    experts, rank, _ = checks.floating("down", down, "E", "R", dim).shape
    checks.floating("up", up, experts, rank, dim)
    weights = {"router": router, "down": down, "up": up}
    if frozen is not None:
        if not isinstance(frozen, FrozenExperts):
            raise TypeError(f"frozen must be a FrozenExperts or None, not {type(frozen).__name__}")
        checks.tensor("frozen.down", frozen.down, "F", rank, dim)
        experts += frozen.num_experts
        weights |= {"frozen.down": frozen.down, "frozen.up": frozen.up}
    if experts == 0:
        raise ValueError("down and up hold no expert, and frozen none either; give at least one")
    if router.shape[0] != experts + 1:
        held = f"{experts} experts" if frozen is None else f"{experts} experts ({frozen.num_experts} of them frozen)"
        raise ValueError(
            f"router must have {experts + 1} rows, one for the backbone and one for each of the {held}, "
            f"not {router.shape[0]}"
        )
    _check_num_frozen(num_frozen, experts, frozen)
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(reference.ACTIVATIONS)}, not {activation!r}")
    if utilization is not None:
        if not isinstance(utilization, Utilization):
            raise TypeError(f"utilization must be a Utilization or None, not {type(utilization).__name__}")
        if utilization.num_experts != experts:
            raise ValueError(f"utilization counts {utilization.num_experts} experts, but this level has {experts}")
        checks.together(x=x, utilization=utilization.norm)
    if row_weight is not None:
        checks.floating("row_weight", row_weight, rows)
    if recompute is not None and not isinstance(recompute, bool):
        raise TypeError(f"recompute must be True, False or None, not {type(recompute).__name__}")
    operands = {"x": x, "backbone": backbone, **weights}
    checks.together(**operands, row_weight=row_weight)
    if not torch.is_autocast_enabled(x.device.type) or any(t.dtype == torch.float64 for t in operands.values()):
        checks.same_dtype(**operands)


def _check_num_frozen(num_frozen: int, experts: int, frozen: FrozenExperts | None) -> None:
    if not isinstance(num_frozen, int) or isinstance(num_frozen, bool):
        raise TypeError(f"num_frozen must be an int, not {type(num_frozen).__name__}")
    if frozen is not None and num_frozen != 0:
        raise ValueError(
            f"num_frozen must be 0 where frozen is given, not {num_frozen}: frozen holds the frozen experts"
        )
    if not 0 <= num_frozen <= experts:
        raise ValueError(f"num_frozen must lie between 0 and the {experts} experts, not {num_frozen}")


def _fake(
    x: Tensor,
    backbone: Tensor,
    router: Tensor,
    down: Tensor,
    up: Tensor,
    frozen_down: Tensor | None,
    frozen_up: Tensor | None,
    row_weight: Tensor | None,
    num_frozen: int,
    recompute: bool,
    count: bool,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
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


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    backbone: Tensor,
    router: Tensor,
    down: Tensor,
    up: Tensor,
    frozen_down: Tensor | None,
    frozen_up: Tensor | None,
    gates: Tensor,
    hidden: Tensor,
    num_frozen: int,
    recompute: bool,
    activation: str,
    need_x: bool,
    need_backbone: bool,
    need_router: bool,
    need_down: bool,
    need_up: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    inputs = (x, backbone, router, down, up)
    needed = (need_x, need_backbone, need_router, need_down, need_up)
    return tuple(t.new_empty(t.shape if need else (0,)) for t, need in zip(inputs, needed, strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, backbone, router, down, up, frozen_down, frozen_up, _, num_frozen, recompute, _, activation, backend = inputs
    _, gates, hidden, norm, gate = output
    # Only y has a gradient; zeros for the others would be tensors of E*R columns.
    ctx.mark_non_differentiable(gates, hidden, norm, gate)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, backbone, router, down, up, frozen_down, frozen_up, gates, hidden)
    ctx.settings = num_frozen, recompute, activation
    ctx.backend = backend


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 13
    needed = ctx.needs_input_grad[:5]
    gradients = torch.ops.xsmoe.side_moe_backward(grad, *ctx.saved_tensors, *ctx.settings, *needed, ctx.backend)
    return *(g if need else None for g, need in zip(gradients, needed, strict=True)), *(None,) * 8


library.define(
    "side_moe",
    "(Tensor x, Tensor backbone, Tensor router, Tensor down, Tensor up, Tensor? frozen_down, Tensor? frozen_up, "
    "Tensor? row_weight, int num_frozen, bool recompute, bool count, str activation, str backend) "
    "-> (Tensor y, Tensor gates, Tensor hidden, Tensor norm, Tensor gate)",
    reference=reference.forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
library.define(
    "side_moe_backward",
    "(Tensor grad, Tensor x, Tensor backbone, Tensor router, Tensor down, Tensor up, Tensor? frozen_down, "
    "Tensor? frozen_up, Tensor gates, Tensor hidden, int num_frozen, bool recompute, str activation, bool need_x, "
    "bool need_backbone, bool need_router, bool need_down, bool need_up, str backend) "
    "-> (Tensor x, Tensor backbone, Tensor router, Tensor down, Tensor up)",
    reference=reference.backward,
    fake=_backward_fake,
    backward=library.no_second_derivative("side_moe"),
)
