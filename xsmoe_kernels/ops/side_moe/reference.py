"""`side_moe` in plain PyTorch: the specification, forward and backward.

With the residuals collected, the mixture over E experts needs two wide products instead of E narrow ones:

    a = activation(x down_all^T),   y = g_0 h + (g_1 + .. + g_E) x + (g * a) up_all

where g * a scales each expert's group of R columns by its gate. The sum of the experts' gates replaces 1 - g_0, which
would lose all its digits where g_0 is near 1. Gates, activation and norms are computed in float32 (float64 for
float64), the wide products in the dtype of the operands.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from xsmoe_kernels.runtime.precision import wide_dtype

ACTIVATIONS = ("gelu", "gelu_tanh", "relu")


def forward(
    x: Tensor,
    backbone: Tensor,
    router: Tensor,
    down: Tensor,
    up: Tensor,
    frozen_down: Tensor | None,
    frozen_up: Tensor | None,
    frozen_pack: Tensor | None,
    row_weight: Tensor | None,
    num_frozen: int,
    recompute: bool,
    count: bool,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y (N, D), gates (rows of x, E+1), hidden (rows of x, E*R), and the increments of norm and gate (E+1,).

    `hidden` is x down_all^T, and is empty with `recompute`; the increments are empty without `count`.
    """
    rows, dim = x.shape
    experts, rank = router.shape[0] - 1, down.shape[1]
    wide = wide_dtype(x.dtype)
    down, up = _joined(frozen_down, down), _joined(frozen_up, up)

    gates = torch.softmax(x.to(wide) @ router.to(wide).T, dim=-1)
    expert_gates = gates[:, 1:]
    hidden = x @ down.reshape(experts * rank, dim).T
    activated = _activate(activation, hidden.to(wide)).view(rows, experts, rank)
    gated = (expert_gates.unsqueeze(-1) * activated).to(x.dtype).view(rows, experts * rank)
    mixture = (gated @ up.reshape(experts * rank, dim)).to(wide) + expert_gates.sum(-1, keepdim=True) * x
    y = (gates[:, :1] * backbone + mixture).to(x.dtype)

    norm, gate = gates.new_empty(0), gates.new_empty(0)
    if count:
        norms = gates.new_empty(backbone.shape[0], experts + 1)
        norms[:, 0] = torch.linalg.vector_norm(backbone, dim=-1, dtype=wide)
        # One expert at a time, which avoids a tensor of (rows, E, D).
        for expert in range(experts):
            output = x + (activated[:, expert].to(x.dtype) @ up[expert]).to(wide)
            norms[:, expert + 1] = torch.linalg.vector_norm(output, dim=-1)
        weighted = gates.expand_as(norms) if row_weight is None else row_weight.to(wide).unsqueeze(-1) * gates
        norm, gate = (weighted * norms).sum(0), weighted.sum(0)
    return y.contiguous(), gates, x.new_empty(0) if recompute else hidden, norm, gate


def backward(
    grad: Tensor,
    x: Tensor,
    backbone: Tensor,
    router: Tensor,
    down: Tensor,
    up: Tensor,
    frozen_down: Tensor | None,
    frozen_up: Tensor | None,
    frozen_pack: Tensor | None,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, backbone, router, down and up, empty where not needed.

    With go the gradient of y, dg_0 = go.h and dg_e = go.x + (go up_e^T).a_e. The router's gradient needs only the
    product go up_all^T, which the experts' gradients need too. Frozen experts pass gradients to x and the router only.
    """
    rows, dim = x.shape
    experts, rank = gates.shape[1] - 1, down.shape[1]
    dtype, wide = x.dtype, gates.dtype
    down, up = _joined(frozen_down, down), _joined(frozen_up, up)
    trained = num_frozen if frozen_down is None else frozen_down.shape[0]  # the first trainable expert
    expert_gates = gates[:, 1:]
    dx, dbackbone, drouter, ddown, dup = (grad.new_empty(0) for _ in range(5))

    if need_backbone:
        dbackbone = (gates[:, :1] * grad).to(dtype).contiguous()

    # A single row of x is one row of work, whose gradient is the sum over the rows that it was broadcast to.
    wide_grad = grad.to(wide)
    row_grad = wide_grad.sum(0, keepdim=True) if rows == 1 else wide_grad
    row_grad_narrow = row_grad.to(dtype)

    if need_x or need_router or need_down or need_up:
        if recompute:
            hidden = x @ down.reshape(experts * rank, dim).T
        hidden = hidden.to(wide).view(rows, experts, rank)
        activated = _activate(activation, hidden)

    if need_x or need_router or need_down:
        up_grad = (row_grad_narrow @ up.reshape(experts * rank, dim).T).to(wide).view(rows, experts, rank)

    if need_x or need_router:
        backbone_dot = torch.linalg.vecdot(wide_grad, backbone.to(wide)).unsqueeze(-1)
        expert_dot = torch.linalg.vecdot(row_grad, x.to(wide)).unsqueeze(-1) + (up_grad * activated).sum(-1)
        dgates = torch.cat((backbone_dot.sum(0, keepdim=True) if rows == 1 else backbone_dot, expert_dot), dim=-1)
        dlogits = gates * (dgates - (gates * dgates).sum(-1, keepdim=True))

    if need_router:
        drouter = (dlogits.T @ x.to(wide)).to(dtype)

    if need_x or need_down:
        # Gradients of rows need all experts' hidden states, those of weights only the trainable ones.
        first = 0 if need_x else trained
        dhidden = _activate_backward(
            activation, expert_gates[:, first:].unsqueeze(-1) * up_grad[:, first:], hidden[:, first:]
        ).to(dtype)

    if need_x:
        dx = (dhidden.view(rows, experts * rank) @ down.reshape(experts * rank, dim)).to(wide)
        dx = (dx + expert_gates.sum(-1, keepdim=True) * row_grad + dlogits @ router.to(wide)).to(dtype).contiguous()

    if need_down:
        ddown = _weight_grad(dhidden[:, trained - first :], x, num_frozen)

    if need_up:
        gated = expert_gates[:, trained:].unsqueeze(-1) * activated[:, trained:]
        dup = _weight_grad(gated.to(dtype), row_grad_narrow, num_frozen)

    return dx, dbackbone, drouter, ddown, dup


def _joined(frozen: Tensor | None, trainable: Tensor) -> Tensor:
    return trainable if frozen is None else torch.cat((frozen, trainable))


def _weight_grad(narrow: Tensor, wide: Tensor, num_frozen: int) -> Tensor:
    """Return the products (R, rows) x (rows, D) of the trainable experts, after zeros for `num_frozen` experts."""
    rows, experts, rank = narrow.shape
    product = narrow.reshape(rows, experts * rank).T @ wide
    return F.pad(product.view(experts, rank, wide.shape[1]), (0, 0, 0, 0, num_frozen, 0))


def _activate(activation: str, hidden: Tensor) -> Tensor:
    if activation == "relu":
        return torch.relu(hidden)
    return F.gelu(hidden, approximate="tanh" if activation == "gelu_tanh" else "none")


def _activate_backward(activation: str, grad: Tensor, hidden: Tensor) -> Tensor:
    if activation == "relu":
        return grad * (hidden > 0)
    return torch.ops.aten.gelu_backward(grad, hidden, approximate="tanh" if activation == "gelu_tanh" else "none")
