"""`side_moe` on backend "cuda": CUDA kernels for the rows, with Triton's launchers and matrix products."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from xsmoe_kernels.ops.side_moe.triton import backward as triton_backward
from xsmoe_kernels.ops.side_moe.triton import forward as triton_forward
from xsmoe_kernels.ops.side_moe.triton.launch import Launch

_library = torch.ops.xsmoe_cuda
# Looked up once: the host limits the speed of eager calls.
_side_moe_gate = _library.side_moe_gate.default
_side_moe_count = _library.side_moe_count.default
_side_moe_logit_gradient = _library.side_moe_logit_gradient.default


def _gate(launch: Launch) -> list[Tensor]:
    gates: list[Tensor] = _side_moe_gate(launch.x, [level.router for level in launch.levels])
    return gates


def _count(
    _: Launch,
    gates: list[Tensor],
    squares: list[Tensor],
    backbone_squares: list[Tensor],
    row_weight: list[Tensor | None],
) -> tuple[list[Tensor], list[Tensor]]:
    norms, masses = _side_moe_count(gates, squares, backbone_squares, row_weight)
    return norms, masses


def _logit_gradient(
    launch: Launch,
    grad: Sequence[Tensor],
    gates: list[Tensor],
    dots: list[Tensor],
    backbone_dot: list[Tensor],
    need_logits: bool,
    need_backbone: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    backbone = [level.backbone for level in launch.levels]
    grad_logits, grad_backbone = _side_moe_logit_gradient(
        launch.x, backbone, grad, gates, dots, backbone_dot, need_logits, need_backbone
    )
    return grad_logits, grad_backbone


forward = partial(triton_forward.forward, gate=_gate, count=_count)
backward = partial(triton_backward.backward, logit_gradient=_logit_gradient)
group_forward = partial(triton_forward.group_forward, gate=_gate, count=_count)
group_backward = partial(triton_backward.group_backward, logit_gradient=_logit_gradient)
