"""Side level with sparse routing: each row uses the backbone and its k best experts."""

import torch
from torch import Tensor
from torch.nn import functional

from xsmoe_kernels.ops.grouped_mm import grouped_mm
from xsmoe_kernels.ops.route_topk import route_topk
from xsmoe_kernels.ops.side_moe.checks import check_level, check_types
from xsmoe_kernels.ops.side_moe.utilization import Utilization
from xsmoe_kernels.runtime import checks, precision, registration


def sparse_side_moe(
    x: Tensor,
    backbone: Tensor,
    router: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    top_k: int,
    num_frozen: int = 0,
    gate_offset: Tensor | None = None,
    utilization: Utilization | None = None,
    row_weight: Tensor | None = None,
) -> Tensor:
    """Mix the backbone's row with the outputs of the `top_k` experts whose logits are largest for the row.

        z = x router^T + gate_offset                     # logits of the backbone and of experts 1 .. E
        g = softmax(z_0 and the top_k largest of z_1 .. z_E)
        y = g_0 backbone + sum of the chosen g_e f_e(x),   f_e(x) = x + gelu(x down_e^T) up_e

    With `top_k` of E or more it equals `side_moe`. The cost per row does not depend on the number of experts. It is a
    composition of `route_topk` and `grouped_mm`, which `use_backend` selects kernels for. Differentiable with respect
    to x, backbone, router, down, up and gate_offset. Logits and gates are computed in float32 (float64 for float64).
    Under `torch.autocast` the same arguments are cast as in `side_moe`.

    Args:
        x: (N, D), the side network's state; or (1, D), one state for all N rows.
        backbone: (N, D), hidden states of the frozen encoder.
        router: (E+1, D), row 0 gates the backbone, row e expert e.
        down: (E, R, D), the experts' down projections.
        up: (E, R, D), their up projections.
        top_k: the number of experts per row, at least 1; all of them if E is smaller.
        num_frozen: how many leading experts have no weight gradient, as in `side_moe`.
        gate_offset: (E+1,), floating, added to the logits of the backbone and of every expert; None adds nothing.
        utilization: counters to which this call's rows are added; None counts nothing.
        row_weight: (N,), floating: how much each row counts in `utilization`; 1 if None. Has no gradient.

    All tensors are on one device, and all but `gate_offset` and `row_weight` have one dtype: float32, bfloat16, float16
    or float64.

    Returns:
        y, (N, D), of the inputs' dtype.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: shapes or devices that do not match, `top_k` below 1, `num_frozen` above E, or a `utilization` of
            another number of experts.
        BackendUnavailable: the backend requested with `use_backend` cannot run the call.
    """
    if not torch.compiler.is_compiling():
        check_types(x, backbone, router, down, up, utilization, row_weight)
        num_frozen = checks.integer("num_frozen", num_frozen)
        top_k = checks.integer("top_k", top_k)
        if gate_offset is not None:
            checks.tensor("gate_offset", gate_offset, "E+1")
    x, backbone, router, down, up = registration.autocast(x, backbone, router, down, up)
    check_level(x, backbone, router, down, up, None, None, row_weight, num_frozen, "gelu")
    checks.integer("top_k", top_k, 1)
    if gate_offset is not None:
        checks.floating("gate_offset", gate_offset, router.shape[0])
        checks.together({"x": x, "gate_offset": gate_offset})

    num_experts = down.shape[0]
    chosen = min(top_k, num_experts)
    wide = precision.wide_dtype(x.dtype)
    with registration.without_autocast(x.device.type):
        offset = None if gate_offset is None else gate_offset.to(wide)
        logits = functional.linear(x.to(wide), router.to(wide), offset)
    routing = route_topk(logits[:, 1:], chosen)
    gates = torch.cat([logits[:, :1], logits[:, 1:].gather(1, routing.experts)], dim=1).softmax(dim=1)

    source = functional.embedding(routing.order // chosen, x)
    activated = functional.gelu(grouped_mm(source, down.transpose(1, 2), routing.offsets, num_frozen=num_frozen))
    outputs = source + grouped_mm(activated, up, routing.offsets, num_frozen=num_frozen)
    place = torch.empty_like(routing.order).scatter(
        0, routing.order, torch.arange(routing.order.shape[0], device=x.device)
    )
    outputs = functional.embedding(place, outputs).unflatten(0, (-1, chosen))

    if utilization is not None:
        with torch.no_grad():
            utilization.add_(*_increments(gates, backbone, outputs, routing.experts, row_weight, num_experts))
    mixed = gates[:, :1] * backbone + (gates[:, 1:, None] * outputs).sum(dim=1)
    return mixed.to(backbone.dtype)


def _increments(
    gates: Tensor, backbone: Tensor, outputs: Tensor, experts: Tensor, row_weight: Tensor | None, num_experts: int
) -> tuple[Tensor, Tensor]:
    """Return this call's increments of `Utilization.norm` and `Utilization.gate`."""
    wide = gates.dtype
    weight = backbone.new_ones(backbone.shape[0], dtype=wide) if row_weight is None else row_weight.to(wide)
    # A single row of x is routed once, and represents all rows.
    weight_of_route = weight if gates.shape[0] == backbone.shape[0] else weight.sum(0, keepdim=True)
    mass = gates * weight_of_route[:, None]
    norm = mass[:, 1:] * outputs.to(wide).norm(dim=2)
    empty = norm.new_zeros(norm.shape[0], num_experts)
    backbone_norm = (gates[:, 0] * weight * backbone.to(wide).norm(dim=1)).sum(0, keepdim=True)
    return (
        torch.cat([backbone_norm, empty.scatter(1, experts, norm).sum(0)]),
        torch.cat([mass[:, 0].sum(0, keepdim=True), empty.scatter(1, experts, mass[:, 1:]).sum(0)]),
    )
