"""Sparse routing: each row goes to the backbone and its k best experts, so that cost stays flat as experts grow."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from xsmoe_kernels import Utilization, grouped_mm, route_topk
from xsmoe_kernels.ops.side_moe import op
from xsmoe_kernels.runtime import registration

if TYPE_CHECKING:
    from xsmoe.nn.experts import ExpertBank


def top_k_mixture(
    bank: "ExpertBank", x: Tensor, backbone: Tensor, row_weight: Tensor | None, utilization: Utilization | None
) -> Tensor:
    """`y = g_0 * backbone + sum of the chosen g_e * f_e(x)`, with the softmax over the backbone and the chosen experts.

    Args:
        bank: the router and the experts.
        x: (N, D) or (1, D).
        backbone: (N, D).
        row_weight: (N,), how often each row counts.
        utilization: its counters grow; None leaves them alone.

    Autocast casts what it does for `side_moe`.

    Returns:
        (N, D).

    Raises:
        TypeError, ValueError: what `side_moe` raises of these tensors.
    """
    chosen = min(bank.top_k or bank.num_experts, bank.num_experts)
    down, up = torch.cat([bank.frozen_down, bank.down]), torch.cat([bank.frozen_up, bank.up])
    operands = op.prepare(
        x, backbone, bank.router, down, up, bank.num_frozen, None, "gelu", utilization, row_weight, recompute=None
    )
    op.check(*operands[:-1])
    x, backbone, router, down, up = operands[:5]
    precise = torch.promote_types(x.dtype, torch.float32)
    with registration.without_autocast(x.device.type):
        offset = None if bank.gate_offset is None else bank.gate_offset.to(precise)
        logits = functional.linear(x.to(precise), router.to(precise), offset)
    routing = route_topk(logits[:, 1:], chosen)
    gates = torch.cat([logits[:, :1], logits[:, 1:].gather(1, routing.experts)], dim=1).softmax(dim=1)

    source = functional.embedding(routing.order // chosen, x)
    activated = functional.gelu(grouped_mm(source, down.transpose(1, 2), routing.offsets, num_frozen=bank.num_frozen))
    outputs = source + grouped_mm(activated, up, routing.offsets, num_frozen=bank.num_frozen)
    place = torch.empty_like(routing.order).scatter(
        0, routing.order, torch.arange(routing.order.shape[0], device=x.device)
    )
    outputs = functional.embedding(place, outputs).unflatten(0, (-1, chosen))

    if utilization is not None:
        with torch.no_grad():
            utilization.add_(*_increments(gates, backbone, outputs, routing.experts, row_weight, bank.num_experts))
    mixed = gates[:, :1] * backbone + (gates[:, 1:, None] * outputs).sum(dim=1)
    return mixed.to(backbone.dtype)


def _increments(
    gates: Tensor, backbone: Tensor, outputs: Tensor, experts: Tensor, row_weight: Tensor | None, num_experts: int
) -> tuple[Tensor, Tensor]:
    precise = gates.dtype
    weight = backbone.new_ones(backbone.shape[0], dtype=precise) if row_weight is None else row_weight.to(precise)
    # A constant x is routed once, and stands for every row.
    weight_of_route = weight if gates.shape[0] == backbone.shape[0] else weight.sum(0, keepdim=True)
    mass = gates * weight_of_route[:, None]
    norm = mass[:, 1:] * outputs.to(precise).norm(dim=2)
    empty = norm.new_zeros(norm.shape[0], num_experts)
    backbone_norm = (gates[:, 0] * weight * backbone.to(precise).norm(dim=1)).sum(0, keepdim=True)
    return (
        torch.cat([backbone_norm, empty.scatter(1, experts, norm).sum(0)]),
        torch.cat([mass[:, 0].sum(0, keepdim=True), empty.scatter(1, experts, mass[:, 1:]).sum(0)]),
    )
